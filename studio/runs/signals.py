"""Signals as requests: a worker that is told to end stops between two steps and saves what it has."""

import signal
import threading
from types import FrameType
from typing import Any

from studio.runs.control import request
from studio.runs.layout import RunPaths

_NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]


class StopOnSignal:
    """Turns the first SIGTERM or SIGINT into a stop request and the second one into `KeyboardInterrupt`."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._signalled = False
        self._before: dict[int, Any] = {}

    def catch(self) -> None:
        """Take the handlers; outside the main thread, where Python allows none, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in _NAMES:
            number = getattr(signal, name)
            self._before[number] = signal.signal(number, self._on_signal)
        if hasattr(signal, "SIGHUP"):
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        request(self._paths, "stop")
