"""The lock that says "a worker lives here". It goes when its process goes, however that ends."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def lock_held(path: Path) -> bool:
    """Return whether a living worker holds the lock.

    Looks with a shared lock, so that two who look at once do not see each other. A worker that starts in that instant
    waits for it (`Worker` retries), so looking never keeps a run from starting.
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
