"""Says what the job is busy with, but not more often than anyone could read."""

import time
from collections.abc import Callable

from studio.core.events import Phase

_LEAST_SECONDS = 0.5


class PhaseTeller:
    """Emits a `Phase` for every new name, and for progress under the same name at most twice a second."""

    def __init__(self, emit: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._name = ""
        self._told = 0.0

    def __call__(self, name: str, fraction: float | None = None, detail: str = "") -> None:
        """Say the phase; `fraction` is 0 to 1 where progress is known."""
        now = self._clock()
        if name == self._name and not detail and now - self._told < _LEAST_SECONDS:
            return
        self._name, self._told = name, now
        self._emit(Phase, name=name, fraction=fraction, detail=detail)
