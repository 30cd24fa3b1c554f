"""The lock that says "a worker lives here". The system releases it when the process ends, in whatever way."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock_held(path: Path) -> bool:
    """Return whether a living worker holds the lock.

    The look takes a shared lock for an instant, so that two processes that look at once do not see each other's lock. A
    worker that starts in that instant tries again (`Worker`), so looking never keeps a run from starting.
    """
    if fcntl is None:
        return _held_without_fcntl(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _held_without_fcntl(path: Path) -> bool:
    from filelock import FileLock, Timeout  # noqa: PLC0415  0.1 s to import, needed on Windows only

    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
