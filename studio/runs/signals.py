"""Signals as requests: a worker that is told to end stops between two steps and saves what it has."""

import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from studio.runs.control import leave_request, requested
from studio.runs.layout import RunPaths

_NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]


class StopOnSignal:
    """Turns SIGTERM or SIGINT into a stop request, and into `KeyboardInterrupt` where one stands already.

    Attributes:
        asked: Whether a signal asked for a stop: on a full disk the request may not become a file.
    """

    def __init__(self, paths: RunPaths) -> None:
        self.asked = False
        self._paths = paths
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

    def ignore(self) -> None:
        """Let nothing interrupt the worker's last words."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked or requested(self._paths, "stop"):
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):
            leave_request(self._paths, "stop")
