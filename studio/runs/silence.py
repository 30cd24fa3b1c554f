"""Trainings that tell nothing for long: the job's own watchdog, and what readers say of a run that is silent.

A process may hang where nothing fails: on a network disk that does not answer, in a driver that waits for a card which
is gone. Such a run lives, so its status is "running"; that it told nothing for many times as long as its steps take is
the only sign.
"""

import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from studio.core.events import SILENT, Warned
from studio.core.text import duration_text
from studio.runs.history import History
from studio.runs.status import Status

if TYPE_CHECKING:
    from studio.runs.worker import Worker

_LEAST_SECONDS = 600.0
"""Silence that is never told of: evaluations, saves on slow disks and samples tell of themselves well within it."""
_FIRST_STEP_SECONDS = 1800.0
"""The same before the first step, in which a large base is read or a step compiled."""
_TIMES = 20
"""Steps of the usual length that a silence must last."""
_POLL_SECONDS = 5.0


def limit_seconds(step_seconds: Sequence[float]) -> float:
    """Return how long a training may be silent before somebody is told.

    Args:
        step_seconds: How long its last steps took; none before the first.
    """
    if not step_seconds:
        return _FIRST_STEP_SECONDS
    return max(_LEAST_SECONDS, _TIMES * statistics.median(step_seconds))


def silent_seconds(history: History, status: Status, now: float) -> float | None:
    """Return how long a training has been silent; None where it has not been for long, waits, or is over.

    Args:
        history: What it told.
        status: How it stands.
        now: Unix seconds.
    """
    started, heard = history.started, history.last_at
    if status is not Status.running or started is None or started.job != "train" or heard is None:
        return None
    silence = now - heard
    return silence if silence > limit_seconds(history.train.seconds[-_TIMES:]) else None


class Watchdog:
    """A thread in a training's process that warns once when it is silent, and prints where every thread stands.

    A Python thread runs while another waits in a library, unless that one holds the interpreter.
    """

    def __init__(self, worker: "Worker", *, clock: Callable[[], float] = time.monotonic) -> None:
        """Watch what a worker tells; `clock` gives seconds, and need not count the time while a machine sleeps."""
        self._worker, self._clock = worker, clock
        self._heard, self._at = worker.told, clock()
        self._warned = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._over.set()

    def look(self) -> None:
        """Compare with what had been told at the last look, and warn where that is too long ago."""
        if self._worker.told != self._heard:
            self._heard, self._at, self._warned = self._worker.told, self._clock(), False
            return
        silence = self._clock() - self._at
        if self._warned or self._worker.waits or silence <= limit_seconds(self._worker.step_seconds):
            return
        self._warned = True
        with suppress(OSError, ValueError, RuntimeError):  # stderr is no file, as under a test
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        message = (
            f"nothing was heard of this training for {duration_text(silence)}: it may hang, on a disk or a card that "
            "does not answer. Where each of its threads stands is in output.log. Stopping it by force, then resuming "
            "it, goes on after its last checkpoint"
        )
        self._worker.emit(Warned, topic=SILENT, message=message)
        self._heard = self._worker.told  # its own warning is no sign of life

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            for look in (self.look, *self._worker.looks):
                with suppress(Exception):  # a disk that refuses, a run that has just ended: the work goes on without it
                    look()
