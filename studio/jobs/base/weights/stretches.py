"""Stretches of large files, a piece in memory at a time: read into one buffer, written from one."""

from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_WRITE_BYTES = 2**20
_COPY_BYTES = 2**18


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
        self._buffer, self._filled = _memory(_WRITE_BYTES), 0
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
            self._buffer = _memory(size)
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


def read_stretch(path: Path, at: int, size: int, piece: int) -> Iterator[memoryview]:
    """Yield the bytes of a stretch of a file in pieces; one is only good until the next.

    Args:
        path: The file.
        at: Where the stretch begins, in bytes from the file's start.
        size: Of the stretch, in bytes.
        piece: Bytes of each piece but the last.

    Raises:
        OSError: The file cannot be read.
        EOFError: It ends within the stretch.
    """
    buffer = _memory(min(piece, size))
    with FileIO(path) as file:
        file.seek(at)
        for done in range(0, size, piece):
            part = buffer[: size - done]
            _fill(part, file)
            yield part


def _fill(view: memoryview, file: FileIO) -> None:
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise EOFError
        done += got


def _memory(size: int) -> memoryview:
    """Return memory in which numbers of any format may lie."""
    view: memoryview = torch.empty(size, dtype=torch.uint8).numpy().data
    return view
