"""The bytes of a data file, unpacked as they are read, and what they are by their first ones.

A packed file may hold a thousand times its size, so what is unpacked is counted while it is read. Nothing is unpacked
to the disk.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from studio.core.errors import BadInput
from studio.core.text import plain

Progress = Callable[[int, int], None]
MAX_LINE_BYTES = 64 * 2**20  # a row of some ten million tokens; a longer line is no row
BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 4096
_MEMORY_SHARE = 0.5
"""Most of the free memory that a packed file may unpack to: a plain one has at least its size on the disk."""
_XZ_MEMORY_BYTES = 512 * 2**20
_BLOCK_BYTES = 2**18
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")

FOREIGN = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save the sheet as CSV",
    b"PK\x05\x06": "an empty zip archive",
    b"\xd0\xcf\x11\xe0": "a document or spreadsheet of Microsoft Office; save the sheet as CSV, the text as .txt",
    b"%PDF": "a PDF document; save its text as .txt",
    b"\x89HDF": "an HDF5 file; save its rows as JSON Lines or Parquet",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"SQLite format 3\x00": "an SQLite database; save the table as CSV",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"\x04\x22\x4d\x18": "compressed with lz4; unpack it first: lz4 -d",
    b"ORC": "an ORC file; save it as Parquet",
    b"Obj\x01": "an Avro file; save it as Parquet or JSON Lines",
    b"GGUF": "a model (GGUF), not data",
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself; fetch it with: git lfs pull",
}
"""Things that people point at instead of rows, by their first bytes."""


@dataclass(slots=True)
class Opened:
    """A data file that is being read.

    Attributes:
        name: The file for messages, harmless to print.
        stream: Its bytes, unpacked.
        total: Its size on the disk, in bytes.
        head: Its first bytes, unpacked; they come from the stream again.
        packed: Whether it is unpacked while it is read.
    """

    name: str
    stream: "io.BufferedReader[Any]"
    total: int
    head: bytes
    packed: bool
    _disk: BinaryIO

    @property
    def done(self) -> int:
        """How many bytes on the disk have been read."""
        return self._disk.tell()


@contextmanager
def opened(path: Path, name: str = "") -> Iterator[Opened]:
    """Open a file to read its bytes, unpacked if they are packed with gzip, bzip2, xz or zstd.

    Args:
        path: The file.
        name: What messages call it; empty for its name.

    Raises:
        BadInput: While it is read: it is damaged, or unpacks to more than half of the free memory.
        OSError: It cannot be read.
    """
    shown = plain(name or path.name, one_line=True)
    with path.open("rb") as disk:
        total = path.stat().st_size
        kind = next((kind for magic, kind in _PACKED.items() if disk.peek(8).startswith(magic)), "")
        if not kind:
            yield Opened(shown, disk, total, disk.peek(HEAD_BYTES)[:HEAD_BYTES], False, disk)
            return
        with io.BufferedReader(_Unpacked(_unpacker(kind, disk), shown, kind), _BLOCK_BYTES) as stream:
            yield Opened(shown, stream, total, stream.peek(HEAD_BYTES)[:HEAD_BYTES], True, disk)


def kind_of(file: Opened) -> str:
    """Return what kind of rows a file holds: `json`, `table`, `text`, `parquet` or `arrow`.

    Raises:
        BadInput: It holds no rows that can be read; says what it is.
    """
    head, suffix = file.head, plain_suffix(file.name)
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or suffix in (".arrow", ".feather"):
        return "arrow"
    what = next((what for magic, what in FOREIGN.items() if head.startswith(magic)), "")
    if not what and head[257:262] == b"ustar":
        what = "a tar archive; unpack it first: tar xf"
    if not what and (packed := next((k for magic, k in _PACKED.items() if head.startswith(magic)), "")):
        what = f"packed twice; unpack the outer {packed} first"
    if what:
        raise BadInput(f"{file.name} is {what}. {WANTED}")
    first = head.removeprefix(BOM).lstrip()[:1]
    if suffix in (".txt", ".md", ".markdown"):
        return "json" if suffix == ".txt" and _is_row(head) else "text"
    if suffix in (".csv", ".tsv", ".tab"):
        return "json" if first in (b"{", b"[") and _is_row(head) else "table"
    return "json"


WANTED = "Wanted JSON Lines, JSON, CSV or TSV, Parquet, Arrow or text."


def plain_suffix(name: str) -> str:
    """Return the last suffix of a file's name in small letters, without that of packing: `.jsonl` of `a.JSONL.gz`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def decoded(raw: bytes, name: str, *, offset: int, line: int) -> str:
    """Return the bytes as text, without a byte order mark at the start of the file.

    Args:
        raw: The bytes.
        name: The file, for the message.
        offset: Where in the file `raw` starts, in bytes.
        line: Line number of its first byte, from 1.

    Raises:
        NotUtf8: The bytes are not UTF-8; says where.
    """
    marked = offset == 0 and raw.startswith(BOM)
    if marked:
        raw = raw.removeprefix(BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        at = offset + error.start + (len(BOM) if marked else 0)
        utf16 = offset == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        guess = "It looks like UTF-16. " if utf16 else ""
        byte = f"byte 0x{raw[error.start]:02x} at offset {at}"
        raise NotUtf8(
            f"{name} is not UTF-8: {byte} (line {line}). {guess}"
            f"Save it as UTF-8, for example with: iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8",
            byte,
        ) from None


class NotUtf8(BadInput):
    """Bytes that are no UTF-8.

    Attributes:
        byte: The first wrong one, in words.
    """

    def __init__(self, message: str, byte: str) -> None:
        super().__init__(message)
        self.byte = byte


def free_bytes() -> float:
    """Return the memory that is free now, in bytes."""
    import psutil  # noqa: PLC0415  20 ms that only readers of packed files pay

    return float(psutil.virtual_memory().available)


def _is_row(head: bytes) -> bool:
    """Return whether a file that is not named so begins as rows of JSON do."""
    start = b"".join(head.removeprefix(BOM).split())
    return start.startswith((b'{"', b'[{"'))


class _Unpacked(io.RawIOBase):
    """What is unpacked, counted."""

    def __init__(self, stream: Any, name: str, kind: str) -> None:
        self._stream, self._name, self._kind = stream, name, kind
        self._read_bytes, self._most_bytes = 0, free_bytes() * _MEMORY_SHARE

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        try:
            block = self._stream.read(len(target))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, MemoryError) as error:
            said = plain(str(error), one_line=True, limit=160)
            raise BadInput(
                f"{self._name} is packed with {self._kind} and damaged or cut off ({said or type(error).__name__}). "
                "Fetch or pack it again."
            ) from None
        self._read_bytes += len(block)
        if self._read_bytes > self._most_bytes:
            raise BadInput(
                f"{self._name} unpacks to more than {self._most_bytes / 1e9:,.1f} GB, half of the free memory. Where "
                "that is meant, unpack it yourself; a plain file may be of any size."
            )
        target[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _unpacker(kind: str, disk: BinaryIO) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=disk)
    if kind == "bzip2":
        return bz2.BZ2File(disk)
    if kind == "xz":
        return _Xz(disk)
    try:
        import pyarrow as pa  # noqa: PLC0415  0.2 s that only readers of its files pay
    except ImportError:
        raise BadInput("A file packed with zstd needs pyarrow: pip install pyarrow") from None
    return pa.CompressedInputStream(disk, "zstd")


class _Xz:
    """An xz file, unpacked in bounded memory: its header says how much that takes, up to 4 GiB."""

    def __init__(self, disk: BinaryIO) -> None:
        self._disk = disk
        self._part = self._next()

    def read(self, size: int) -> bytes:
        while True:
            if self._part.eof:
                rest = (self._part.unused_data or self._disk.read(_BLOCK_BYTES)).lstrip(b"\0")
                if not rest:
                    return b""
                self._part = self._next()
            elif self._part.needs_input:
                if not (rest := self._disk.read(_BLOCK_BYTES)):
                    raise EOFError("the end is missing")
            else:
                rest = b""
            if block := self._part.decompress(rest, size):
                return block

    def close(self) -> None:
        """Nothing is held but the file."""

    @staticmethod
    def _next() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
