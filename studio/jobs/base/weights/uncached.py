"""Reads and writes of large files past the system's cache, where the file system can do that.

For bytes that are used once, finding pages in the cache took longer than the disk (tests/bench/merge_results.md). The
disk takes whole pages only, from memory that begins at one: what lies before the first whole page of a stretch and
behind the last goes through the cache.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

PAGE_BYTES = max(4096, mmap.PAGESIZE)
"""No disk or file system in use asks for more than 4096; the cache must not hold a page that goes past it in part."""
_WRITE_BYTES = 2**20
"""Blocks of 1 MiB reached all of a disk's 2.9 GB/s."""
_COPY_BYTES = 2**18
_ALIGN_BYTES = 8
"""Of the widest number: where a stretch begins elsewhere, its numbers would not lie right in memory."""
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP)


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
        self._cached = FileIO(path, "rb+")
        self._uncached = _open_uncached(path, "rb+")
        self._buffer = _aligned(_WRITE_BYTES)
        # The buffer stands for whole pages of the file, from the one on in which the stretch begins.
        self._page, self._begin = at - at % PAGE_BYTES, at % PAGE_BYTES
        self._end = self._begin

    def room(self, size: int) -> memoryview:
        """Return memory for the next so many bytes; they count as given at the next call or at the end.

        Raises:
            OSError: The disk refuses what was given before.
        """
        if self._end + size > len(self._buffer):
            self._put_pages(_aligned(_up(PAGE_BYTES + size)) if PAGE_BYTES + size > len(self._buffer) else self._buffer)
        self._end += size
        return self._buffer[self._end - size : self._end]

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
        try:
            if kind is None:
                self._put(self._end)
        finally:
            self._cached.close()
            if self._uncached is not None:
                self._uncached.close()

    def _put_pages(self, next_buffer: memoryview) -> None:
        """Write all whole pages; what begins the next one stands first in the next buffer."""
        last = _down(self._end)
        if self._begin < last:
            self._put(last)
            self._begin = 0
        else:
            last = 0
        rest = self._buffer[last : self._end]
        next_buffer[: len(rest)] = rest
        self._buffer, self._page, self._end = next_buffer, self._page + last, len(rest)

    def _put(self, end: int) -> None:
        self._see(self._buffer[self._begin : end])
        whole = min(_up(self._begin), end)
        at = self._put_part(self._begin, whole, self._cached)
        if self._uncached is not None:
            try:
                at = self._put_part(at, max(whole, _down(end)), self._uncached)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                self._uncached.close()
                self._uncached = None
        self._put_part(at, end, self._cached)

    def _put_part(self, begin: int, end: int, file: FileIO) -> int:
        file.seek(self._page + begin)
        while begin < end:
            begin += file.write(self._buffer[begin:end])
        return begin


def read_stretch(path: Path, at: int, size: int, piece: int, *, cached: bool) -> Iterator[memoryview]:
    """Yield the bytes of a stretch of a file in pieces; one is only good until the next.

    Args:
        path: The file.
        at: Where the stretch begins, in bytes from the file's start.
        size: Of the stretch, in bytes.
        piece: Bytes of each piece but the last.
        cached: Whether to go through the system's cache, which may hold the file already.

    Raises:
        OSError: The file cannot be read.
        EOFError: It ends within the stretch.
    """
    buffer = _aligned(min(piece, size) + 2 * PAGE_BYTES)
    uncached = None if cached or at % _ALIGN_BYTES else _open_uncached(path, "rb")
    file = FileIO(path) if uncached is None else uncached
    try:
        for begin in range(at, at + size, piece):
            end = min(begin + piece, at + size)
            try:
                read = _read(file, buffer, begin, end, whole_pages=file is uncached)
            except OSError as error:
                if file is not uncached or error.errno not in _CANNOT:
                    raise
                file.close()
                file = FileIO(path)
                read = _read(file, buffer, begin, end, whole_pages=False)
            yield read
    finally:
        file.close()


def _read(file: FileIO, buffer: memoryview, begin: int, end: int, *, whole_pages: bool) -> memoryview:
    """Return the bytes between two places of a file, read into a buffer."""
    first = _down(begin) if whole_pages else begin
    file.seek(first)
    _fill(buffer[: (_up(end) if whole_pages else end) - first], file, end - first)
    return buffer[begin - first : end - first]


def _fill(view: memoryview, file: FileIO, least: int) -> None:
    done = 0
    while done < least:
        got = file.readinto(view[done:])
        if not got:
            raise EOFError
        done += got


def _open_uncached(path: Path, mode: str) -> FileIO | None:
    """Open a file past the cache; None where that is not to be had for it."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return FileIO(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return None


def _aligned(size: int) -> memoryview:
    """Return memory that begins at a page."""
    whole = torch.empty(size + PAGE_BYTES, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE_BYTES
    view: memoryview = whole[first : first + size].numpy().data
    return view


def _down(place: int) -> int:
    return place - place % PAGE_BYTES


def _up(place: int) -> int:
    return _down(place + PAGE_BYTES - 1)
