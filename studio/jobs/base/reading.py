"""Reading a base's weights for its fingerprint, as a job tells it: with progress, and an end when that is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.core.events import Phase
from studio.jobs.base.failures import Cancelled
from studio.probe.fingerprint import fingerprint
from studio.runs.worker import Worker

READING = "reading the base's weights"
_TWENTIETHS = 20


def read_fingerprint(worker: Worker, folder: Path, stopped: Callable[[str], Exception] = Cancelled) -> dict[str, Any]:
    """Return the fingerprint of a base; says how far the reading is, in twentieths, where its weights must be read.

    Args:
        worker: Told the progress, asked whether to stop.
        folder: The base.
        stopped: Makes the job's own exception for an early end.

    Raises:
        BadInput: A file is damaged.
        OSError: A file cannot be read.
        Exception: That of `stopped`; the user asked for it.
    """
    told = -1

    def tell(fraction: float) -> None:
        nonlocal told
        if worker.requested("stop"):
            raise stopped("stopped while the base's weights were read")
        if (now := int(_TWENTIETHS * fraction)) != told:
            told = now
            worker.emit(Phase, name=READING, fraction=fraction, detail="")

    return fingerprint(folder, tell)
