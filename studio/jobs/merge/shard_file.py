"""A file of merged tensors: its layout, known before the first byte, and the writing of it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from studio.jobs.base.weights.tensor_files import DTYPE_NAMES
from studio.jobs.merge.steps import Output
from studio.probe.safetensors_file import TensorEntry
from studio.probe.weight_sums import begun_sum
from studio.runs.atomic import sync_folder, write_whole

SUMS = ".sums"
"""Behind a shard's name: the file of its checksums, while the folder is not whole."""
_ALIGN_BYTES = 8
_WRITE_BYTES = 2**20
_COPY_BYTES = 2**18


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written, with the tensors that it will hold in order."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """Format, shape and place of each tensor, as the header says them."""
        found, begin = {}, 0
        for output in self.outputs:
            found[output.key] = TensorEntry(DTYPE_NAMES[output.dtype], output.shape, begin, begin + output.size_bytes)
            begin += output.size_bytes
        return found

    @property
    def header(self) -> bytes:
        """The first bytes of the file: length and JSON, padded with spaces so that the tensors are aligned."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for key, entry in self.entries.items():
            table[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGN_BYTES)
        return len(text).to_bytes(8, "little") + text

    @property
    def size_bytes(self) -> int:
        """Of the file without its header."""
        return sum(output.size_bytes for output in self.outputs)


class StretchWriter:
    """Writes one stretch of a file from its first byte on; others may write other stretches meanwhile."""

    def __init__(self, path: Path, at: int, see: Callable[[memoryview], None] = lambda written: None) -> None:
        """Open a file that is there already.

        Args:
            path: The file.
            at: Where the stretch begins, in bytes from the file's start.
            see: Gets all bytes in order, before they are written.

        Raises:
            OSError: It cannot be opened.
        """
        self._see = see
        self._buffer, self._filled = memoryview(bytearray(_WRITE_BYTES)), 0
        self._file = FileIO(path, "rb+")
        self._file.seek(at)

    def room(self, size: int) -> memoryview:
        """Return memory for the next so many bytes; they count as given at the next call or at the end.

        Who makes bytes makes them here: to copy a block from elsewhere took a sixth of a merge's time.

        Raises:
            OSError: The disk refuses what was given before.
        """
        if self._filled + size > len(self._buffer):
            self._put()
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        self._filled += size
        return self._buffer[self._filled - size : self._filled]

    def write(self, data: memoryview) -> None:
        """Add bytes.

        Raises:
            OSError: The disk refuses.
        """
        for at in range(0, len(data), _COPY_BYTES):
            part = data[at : at + _COPY_BYTES]
            self.room(len(part))[:] = part

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write the rest, unless something went wrong, and close the file."""
        with self._file:
            if kind is None:
                self._put()

    def _put(self) -> None:
        left = self._buffer[: self._filled]
        self._see(left)
        while len(left):
            left = left[self._file.write(left) :]
        self._filled = 0


class OpenShard:
    """A shard that is being written, under another name until it is whole; its tensors may come in any order."""

    def __init__(self, folder: Path, shard: Shard, sums: dict[str, str] | None = None) -> None:
        """Write the header.

        Args:
            folder: Where to.
            shard: What it will hold.
            sums: Gets the checksums of its tensors, once the shard is whole.

        Raises:
            OSError: The disk refuses.
        """
        self._final, self._aside = folder / shard.name, folder / f".{shard.name}.part"
        self._entries, self._start, self._all_sums = shard.entries, len(shard.header), sums
        self._sums: dict[str, str] = {}
        with self._aside.open("wb") as file:
            file.write(shard.header)
            file.truncate(len(shard.header) + shard.size_bytes)

    @contextmanager
    def writing(self, key: str) -> Iterator[StretchWriter]:
        """Take the bytes of a tensor, in order.

        Raises:
            OSError: The disk refuses.
        """
        entry = self._entries[key]
        hashed = begun_sum(entry)
        with StretchWriter(self._aside, self._start + entry.begin, hashed.update) as stretch:
            yield stretch
        self._sums[key] = hashed.hexdigest()

    def flush(self) -> None:
        """Wait until the disk has what was written so far, and leave the system's cache to others.

        New pages then cost less (tests/bench/merge_results.md), and what is read back is what the disk holds.

        Raises:
            OSError: The disk refuses.
        """
        with self._aside.open("rb+") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Flush to the disk and give the file its name.

        Raises:
            OSError: The disk refuses.
        """
        self.flush()
        if self._all_sums is not None:
            self._all_sums |= self._sums
            # Before the shard has its name, so that there is no shard without sums.
            write_whole(self._final.with_name(self._final.name + SUMS), json.dumps(self._sums))
        self._aside.replace(self._final)
        sync_folder(self._final.parent)

    def abandon(self) -> None:
        """Leave no result."""
        self._aside.unlink(missing_ok=True)
