"""Requests to a live worker. A file in `control/` is the request, so that it outlives the terminal that left it."""

import signal
from typing import Literal, get_args

from studio.runs.layout import RunPaths
from studio.runs.process import read_mark, send_signal

Request = Literal["stop", "pause", "checkpoint-now", "from-start", "queued"]
REQUESTS: tuple[Request, ...] = get_args(Request)


def request(paths: RunPaths, what: Request) -> None:
    """Ask the worker for something; asking twice is asking once.

    Where the disk does not take even an empty file, a stop is sent to a worker of this machine as a signal.

    Raises:
        OSError: The request cannot be left.
    """
    try:
        leave_request(paths, what)
    except OSError:
        worker = read_mark(paths.process)
        if what != "stop" or worker is None or not send_signal(worker[0], signal.SIGTERM):
            raise


def leave_request(paths: RunPaths, what: Request) -> None:
    """Leave the file that is the request.

    Raises:
        OSError: It cannot be made.
    """
    paths.control.mkdir(mode=0o700, exist_ok=True)
    (paths.control / what).touch(mode=0o600)


def asked_at(paths: RunPaths, what: Request) -> int | None:
    """Return when something was asked for last, in nanoseconds of the disk's clock; None without a request."""
    try:
        return (paths.control / what).stat().st_mtime_ns
    except OSError:
        return None


def withdraw(paths: RunPaths, what: Request) -> None:
    """Take a request back, or mark it as served; without a request nothing happens."""
    (paths.control / what).unlink(missing_ok=True)


def requested(paths: RunPaths, what: Request) -> bool:
    """Return whether the request stands. One `stat`, so a worker may ask at every step."""
    return (paths.control / what).exists()


def withdraw_all(paths: RunPaths) -> None:
    """Forget what was asked of an earlier worker."""
    for what in REQUESTS:
        withdraw(paths, what)
