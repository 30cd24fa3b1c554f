"""Reads a safetensors file without any library: its header, which is checked, and the bytes of single tensors.

The format: 8 bytes of header length (little-endian), the header as JSON, then one buffer of tensors that the header's
offsets cover completely, in order, without holes. The rules are the safetensors library's own
(`safetensors/src/tensor.rs`), except that the limit of a header is below its 100 MB. What the tensors are for is not
known here.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.json_size import MOST_VALUES, values_in

MAX_HEADER_BYTES = 40_000_000
"""The headers of mixtures with 100 000 tensors in one file have some 15 MB, and huggingface_hub reads none above 25 MB.
A header of 100 MB, which the format allows, can take a gigabyte when it is parsed."""

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

Fault = Literal[
    "unreadable", "too_short", "header_too_large", "header_cut", "not_utf8", "bad_json", "bad_entry", "bad_offsets",
    "wrong_length",
]  # fmt: skip


class CorruptSafetensors(BadInput):
    """A file that is not a whole safetensors file.

    Attributes:
        fault: Which rule is broken.
    """

    def __init__(self, name: str, fault: Fault, found: str) -> None:
        super().__init__(
            f"{plain(name, one_line=True)} is corrupt or truncated: {found}. Download or copy the file again."
        )
        self.fault = fault


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file. Offsets are bytes from the start of the buffer, the end exclusive."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes in the buffer."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The header of a whole file: its tensors by name, and the text that its writer left in it."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    header_bytes: int

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all tensors."""
        return max((entry.end for entry in self.tensors.values()), default=0)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file.

    Attributes:
        path: The file.
        offset: Where its bytes begin, from the start of the file.
        entry: Format and shape.
    """

    path: Path
    offset: int
    entry: TensorEntry

    def pieces(self, room: memoryview, first: int = 0, last: int | None = None) -> Iterator[memoryview]:
        """Yield its bytes in order, piece by piece in the same memory, so that a piece is valid until the next one.

        The file is read, not mapped: every page of a map that was touched counts as the process's memory until the
        system takes it back.

        Args:
            room: The memory for a piece; every piece but the last fills it.
            first: The first byte of the tensor that is wanted.
            last: The byte after the last one; None for all.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        left = (self.entry.size_bytes if last is None else last) - first
        with FileIO(self.path) as file:
            file.seek(self.offset + first)
            while left:
                piece = room[: min(left, len(room))]
                done = 0
                while done < len(piece):
                    got = file.readinto(piece[done:])
                    if not got:
                        raise changed(self.path)
                    done += got
                left -= done
                yield piece


def changed(path: Path) -> BadInput:
    """Return the refusal of a file that has changed since its header was read."""
    return BadInput(f"{plain(str(path), one_line=True)} was changed while it was read. Try again when it is whole.")


def stored_in(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file by name, in its order.

    Raises:
        CorruptSafetensors: The file cannot be opened, or breaks a rule of the format.
    """
    header = read_header(path)
    start = 8 + header.header_bytes
    ordered = sorted(header.tensors.items(), key=lambda item: item[1].begin)
    return {key: Stored(path, start + entry.begin, entry) for key, entry in ordered}


def read_header(path: Path) -> SafetensorsHeader:
    """Return the header of a file whose length is what the header says.

    Raises:
        CorruptSafetensors: The file cannot be opened, or breaks a rule of the format.
    """
    try:
        if not path.is_file():
            raise CorruptSafetensors(path.name, "unreadable", "it is not a file")
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            header_bytes = header_length(file.read(8), path.name, file_bytes)
            raw = file.read(header_bytes)
    except OSError as error:
        raise CorruptSafetensors(path.name, "unreadable", f"it cannot be read ({error.strerror or error})") from None
    header = parse_header(raw, path.name)
    wanted = 8 + header_bytes + header.buffer_bytes
    if file_bytes != wanted:
        raise CorruptSafetensors(path.name, "wrong_length", f"it has {file_bytes} bytes; its header speaks of {wanted}")
    return header


def header_length(first: bytes, name: str, file_bytes: int | None = None) -> int:
    """Return the length of the header in bytes, from the first 8 bytes of a file.

    Raises:
        CorruptSafetensors: Too few bytes, a length above the cap, or above what the file holds.
    """
    if len(first) < 8:
        raise CorruptSafetensors(name, "too_short", f"it has {len(first)} bytes; the shortest whole file has 10")
    length = int(struct.unpack("<Q", first)[0])
    if length > MAX_HEADER_BYTES:
        raise CorruptSafetensors(
            name, "header_too_large", f"its header claims {length} bytes; wanted at most {MAX_HEADER_BYTES}"
        )
    if file_bytes is not None and length > file_bytes - 8:
        raise CorruptSafetensors(name, "header_cut", f"its header claims {length} bytes; {file_bytes - 8} are there")
    return length


def parse_header(raw: bytes, name: str) -> SafetensorsHeader:
    """Return the header from its own bytes (without the 8 before it).

    Raises:
        CorruptSafetensors: Too many values, not UTF-8, not JSON, a wrong entry, or offsets with holes or overlaps.
    """
    if (values := values_in(raw)) > MOST_VALUES:
        found = f"its header holds {values} values; wanted at most {MOST_VALUES}, which is 150 000 tensors"
        raise CorruptSafetensors(name, "header_too_large", found)
    try:
        table = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorruptSafetensors(name, "not_utf8", f"its header is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        found = plain(str(error), one_line=True, limit=120)
        raise CorruptSafetensors(name, "bad_json", f"its header is not JSON ({found})") from None
    if not isinstance(table, dict):
        raise CorruptSafetensors(name, "bad_json", "its header is not a JSON object")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptSafetensors(name, "bad_entry", "its __metadata__ is not text by text")
    entries = {key: _entry(key, value, name) for key, value in table.items()}
    _check_offsets(entries, name)
    return SafetensorsHeader(entries, metadata, len(raw))


def _entry(key: str, value: Any, name: str) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _wrong(key, name, "bad_entry", "lacks dtype, shape or data_offsets") from None
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        found = plain(str(dtype), one_line=True, limit=40)
        raise _wrong(key, name, "bad_entry", f"has the unknown dtype {found}")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise _wrong(key, name, "bad_entry", "has a shape or offset that is not a whole number")
    if end - begin != math.prod(shape) * bits / 8:
        found = f"takes {end - begin} bytes; its shape {list(shape)} and dtype {dtype} ask for other"
        raise _wrong(key, name, "bad_offsets", plain(found, limit=200))
    return TensorEntry(dtype, shape, begin, end)


def _check_offsets(entries: dict[str, TensorEntry], name: str) -> None:
    expected = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != expected:
            found = "overlaps the one before it" if entry.begin < expected else "leaves a hole before it"
            raise _wrong(key, name, "bad_offsets", found)
        expected = entry.end


def _wrong(key: str, name: str, fault: Fault, found: str) -> CorruptSafetensors:
    return CorruptSafetensors(name, fault, f"tensor {plain(key, one_line=True, limit=80)} {found}")
