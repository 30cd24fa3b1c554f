"""Bytes that are written to a file one after another and read again at any place, for data that is too much for memory.

If the disk takes no more, they are held in memory: a full disk is no reason to give up what could still be done.
"""

import io
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from studio.runs.data_cache import remove_folder

_BLOCK_BYTES = 2**20


class FileBytes:
    """A file that is read at any place; stays readable after it was removed, except on Windows.

    It is not mapped into memory: pages of a mapping that were read count as memory of the process.
    """

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            OSError: It cannot be opened.
        """
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._file)

    def read(self, begin: int, stop: int) -> bytes:
        """Return the bytes `[begin, stop)`.

        Raises:
            OSError: They cannot be read.
        """
        if hasattr(os, "pread"):
            return os.pread(self._file, stop - begin, begin)
        with self._lock:
            os.lseek(self._file, begin, os.SEEK_SET)
            return os.read(self._file, stop - begin)


class HeldBytes:
    """Bytes in memory, read as a file is."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, begin: int, stop: int) -> bytes:
        """Return the bytes `[begin, stop)`."""
        return self._content[begin:stop]


class Spool:
    """Bytes on their way into a file of a scratch folder."""

    def __init__(self, scratch: Callable[[], Path], name: str) -> None:
        """Begin the file.

        Args:
            scratch: Makes the folder; may raise OSError.
            name: Of the file in it.
        """
        self._name = name
        self._folder: Path | None = None
        self._file: io.FileIO | None = None
        self._written = 0
        self._pending = bytearray()
        with suppress(OSError):
            self._folder = scratch()
            self._file = (self._folder / name).open("w+b", buffering=0)

    def add(self, data: bytes) -> None:
        """Take more bytes."""
        self._pending += data
        if len(self._pending) >= _BLOCK_BYTES:
            self._flush()

    def done(
        self, others: Mapping[str, bytes], publish: Callable[[Path], Path]
    ) -> tuple[FileBytes | HeldBytes, Path | None]:
        """Return all bytes, and the folder that they lie in; None if they are held in memory.

        Args:
            others: More files of the folder.
            publish: Gives the folder its final place and returns that; the same folder where it has none, which is
                then removed by `drop`. May raise OSError.
        """
        self._flush()
        if self._folder is not None and self._file is not None:
            scratch = self._folder
            with suppress(OSError):
                for name, content in others.items():
                    (scratch / name).write_bytes(content)
                self._file.close()
                folder = publish(scratch)
                source = FileBytes(folder / self._name)
                if folder != scratch:
                    self._folder = self._file = None
                return source, folder
            self._file = (scratch / self._name).open("rb", buffering=0)
            self._hold()
        return HeldBytes(bytes(self._pending)), None

    def drop(self) -> None:
        """Remove what was written; what was published stays."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._folder is not None:
            remove_folder(self._folder)
        self._folder = self._file = None

    def _flush(self) -> None:
        if self._file is None:
            return
        try:
            while self._pending:
                done = self._file.write(self._pending)
                self._written += done
                del self._pending[:done]
        except OSError:
            self._hold()

    def _hold(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._pending[:0] = self._file.read(self._written)
        self.drop()
