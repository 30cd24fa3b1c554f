"""A disk that really fills: a tmpfs of a few hundred KiB, where the system lets us mount one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a disk of this size for a while; the test is skipped without the right to."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root on Linux")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Filler:
    """A file that takes all the room that a disk has left, to the last byte."""

    def __init__(self, disk: Path) -> None:
        self._file = disk / "filler"

    @property
    def full(self) -> bool:
        """Whether it holds the room now."""
        return self._file.exists()

    def fill(self) -> None:
        """Take all the room."""
        with self._file.open("ab", buffering=0) as file:
            size = 64 * 1024
            while size:
                try:
                    file.write(b"x" * size)
                except OSError:
                    size //= 2

    def free(self) -> None:
        """Give it back."""
        self._file.unlink(missing_ok=True)
