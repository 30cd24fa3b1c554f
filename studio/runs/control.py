"""Requests to a live worker. A file in `control/` is the request, so they outlive every terminal."""

from typing import Literal, get_args

from studio.runs.layout import RunPaths

Request = Literal["stop", "pause", "checkpoint-now"]
REQUESTS: tuple[Request, ...] = get_args(Request)


def request(paths: RunPaths, what: Request) -> None:
    """Ask the worker for something; asking twice is asking once."""
    paths.control.mkdir(mode=0o700, exist_ok=True)
    (paths.control / what).touch(mode=0o600)


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
