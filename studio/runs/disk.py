"""Errors of a disk: which kind of failure each is, whichever library raised it, and what to do about it.

This is the one place that turns such an error into a failure of ours: log, jobs and command line all ask here.
"""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from studio.core.errors import JobFailed, StudioError
from studio.core.text import plain

DISK_FULL = "disk_full"
"""The kind of failure when a disk has no room."""

RESUME = "lora-studio runs resume RUN"
"""How a failure advises to resume; whoever shows it puts the run's name in place of RUN."""

RESERVE_BYTES = 32 * 1024
"""Size of the file that reserves room on the disk of a live run: enough for some hundred lines of its log."""

_FULL = {
    errno.ENOSPC: ("is full", "free some space"),
    errno.EDQUOT: ("has no room left for you: your quota is used up", "free some space of yours, or ask for more"),
    errno.EFBIG: (
        "does not let the file grow further: a limit of its file system or of this session (`ulimit -f`)",
        "raise the limit, or use a file system that takes large files (FAT32 ends at 4 GB)",
    ),
}
_REFUSES = {
    errno.EROFS: ("read_only", "is read-only", "make it writable (a disk with faults is made read-only: see dmesg)"),
    errno.EACCES: ("no_permission", "may not be used: permission denied", "give yourself the right to it"),
    errno.EPERM: ("no_permission", "may not be used: operation not permitted", "give yourself the right to it"),
    errno.ENAMETOOLONG: ("name_too_long", "has too long a name", "choose a shorter path"),
    errno.EIO: ("disk_error", "has a read or write error: it may be failing", "look at dmesg, and save what you can"),
    errno.ESTALE: ("disk_error", "is a network disk that was lost", "connect it again"),
    errno.ENODEV: ("disk_error", "is gone", "connect it again"),
}
_RUST = re.compile(r"\(os error (\d+)\)")


def os_errno(error: BaseException) -> int | None:
    """Return the system's error number in an error or in its causes; None where there is none.

    safetensors and tokenizers are written in Rust and raise classes of their own, with the number only in the text.
    """
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return None
        if isinstance(seen, OSError) and seen.errno:
            return seen.errno
        if found := _RUST.search(str(seen)):
            return int(found.group(1))
        seen = seen.__cause__
    return None


def refuses(error: BaseException) -> bool:
    """Return whether a disk raised an error that may pass: no room, read-only, not reachable, not permitted."""
    number = os_errno(error)
    # A name that is too long stays too long.
    return number in _FULL or (number in _REFUSES and number != errno.ENAMETOOLONG)


def disk_failure(
    error: BaseException, *, place: Path | None = None, kept: str = "", advice: str = ""
) -> JobFailed | None:
    """Return our failure for an error that a disk raised; None for any other error, and for one of our own.

    Args:
        error: As a library raised it.
        place: What was written to; shown where the error names no file, or a file inside of it.
        kept: What has become of the work, for the message.
        advice: What to do once the disk is in order; empty advises to resume the run.
    """
    number = None if isinstance(error, StudioError) else os_errno(error)
    shown = plain(str(_place_of(error, place) or ""), one_line=True, limit=300)
    more = f": {kept}" if kept else ""
    then = advice or f"then continue with: {RESUME}"
    if number in _FULL:
        what, first = _FULL[number]
        return JobFailed(DISK_FULL, f"the disk{f' of {shown}' if shown else ''} {what}{more}", f"{first}, {then}")
    if number in _REFUSES:
        kind, what, first = _REFUSES[number]
        return JobFailed(kind, f"{shown or 'a file or folder of this run'} {what}{more}", f"{first}, {then}")
    return None


def disk_words(error: BaseException) -> str:
    """Return what a disk's error means, as a part of a sentence; of any other error its own text."""
    failure = disk_failure(error)
    return plain(str(failure or error), one_line=True, limit=400)


class Reserve:
    """Room that a worker reserves on the disk of its run, so that its last events fit when the disk is full."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is written yet."""
        self._path = path

    def fill(self) -> bool:
        """Reserve what is missing and return whether all of it is there; what was reserved before stays in any case.

        The file holds random bytes, since a file system that compresses would give zeros no room.
        """
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError:
            return False
        try:
            before = written = os.fstat(descriptor).st_size
            try:
                while written < RESERVE_BYTES:
                    written += os.write(descriptor, os.urandom(RESERVE_BYTES - written))
            except OSError:
                os.ftruncate(descriptor, before)
                return False
            return True
        finally:
            os.close(descriptor)

    def give_half(self) -> None:
        """Make room for a few lines, and keep half of the reserve for the last one."""
        with suppress(OSError):
            os.truncate(self._path, min(RESERVE_BYTES // 2, self._path.stat().st_size))

    def give_all(self) -> None:
        """Make room for the last line."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _place_of(error: BaseException, place: Path | None) -> Path | None:
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    if not isinstance(name, str) or (place and Path(name).is_relative_to(place)):
        return place
    return Path(name)
