"""Requests to a live worker. A file in `control/` is the request, so that it outlives the terminal that left it."""

import signal
from typing import Literal, get_args

from studio.runs.layout import RunPaths
from studio.runs.process import read_mark, send_signal

Request = Literal["stop", "pause", "checkpoint-now", "from-start", "from-checkpoint", "queued"]
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


def leave_request(paths: RunPaths, what: Request, words: str = "") -> None:
    """Leave the file that is the request; `words` say more of it.

    Raises:
        OSError: It cannot be made.
    """
    paths.control.mkdir(mode=0o700, exist_ok=True)
    (paths.control / what).touch(mode=0o600)
    if words:
        (paths.control / what).write_text(words, encoding="utf-8")


def asked_at(paths: RunPaths, what: Request) -> int | None:
    """Return when something was asked for last, in nanoseconds of the disk's clock; None without a request."""
    try:
        return (paths.control / what).stat().st_mtime_ns
    except OSError:
        return None


def asked_step(paths: RunPaths) -> int | None:
    """Return the step of the checkpoint after which the run is asked to go on; None for its newest whole one."""
    try:
        return int((paths.control / "from-checkpoint").read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
