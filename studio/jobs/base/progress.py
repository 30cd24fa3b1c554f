"""How a job tells what it is busy with, and how it ends early when the user asks for that."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.core.events import Phase
from studio.jobs.base.failures import Cancelled
from studio.probe.fingerprint import fingerprint
from studio.runs.worker import Worker

READING = "reading the base's weights"
_LEAST_SECONDS = 0.5
"""Before the same phase is told again: it shows that the job is alive."""


def heed(worker: Worker, words: str) -> None:
    """Raise if the user asked for an early end; long work calls this again and again.

    Args:
        worker: Of the job.
        words: What was not finished, for the exception.

    Raises:
        Cancelled: The user asked for an early end.
    """
    if worker.requested("stop"):
        raise Cancelled(words)


class PhaseTeller:
    """Emits a `Phase` for every new name, detail or percent of progress, and repeats one at most twice a second."""

    def __init__(self, emit: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._last: tuple[str, str, int] | None = None
        self._told = 0.0

    def __call__(self, name: str, fraction: float | None = None, detail: str = "") -> None:
        """Emit the phase; `fraction` is 0 to 1, None where the progress is not known."""
        now, said = self._clock(), (name, detail, int(100 * (fraction or 0)))
        if said == self._last and now - self._told < _LEAST_SECONDS:
            return
        self._last, self._told = said, now
        self._emit(Phase, name=name, fraction=fraction, detail=detail)


def read_fingerprint(worker: Worker, folder: Path) -> dict[str, Any]:
    """Return the fingerprint of a base folder; emit progress while its weights are read.

    Raises:
        BadInput: A file is damaged.
        OSError: A file cannot be read.
        Cancelled: The user asked for an early end.
    """
    say = PhaseTeller(worker.emit)

    def tell(fraction: float) -> None:
        heed(worker, "stopped while the base's weights were read")
        say(READING, fraction)

    return fingerprint(folder, tell)
