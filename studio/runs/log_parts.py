"""Parts of a log that are read without the rest of it: its two ends, and steps from evenly spaced places.

The ends are enough for a list of runs, which need not read hundreds of whole logs. Only lines in which the name of a
wanted kind of event occurs are parsed, which keeps it cheap. From the steps a curve can be drawn before a long log is
read.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from studio.core.events import RunEvent, StepDone
from studio.runs.log import POLL_BYTES, event_from_line

_HEAD_BYTES = 16 * 1024
"""Enough for `Started` (3 KB with its recipe) and the tens of lines while base and data are read, up to `Planned`."""
_TAIL_BYTES = 64 * 1024
_WIDER = 4
_WIDEST_BYTES = POLL_BYTES
"""A longer line was not written by us; `EventTail` skips it too."""

_STEP_BYTES = 1024
"""More than two lines of a step, so that a whole line is in it wherever reading begins."""

_Kind = TypeVar("_Kind", bound=RunEvent)


@dataclass(frozen=True, slots=True)
class LogEnd:
    """Whole lines from one end of a log, as they stand in the file."""

    data: bytes

    def last(self, *kinds: type[_Kind]) -> _Kind | None:
        """Return the last event of these kinds."""
        names = [kind.kind.encode() for kind in kinds]
        end = len(self.data)
        while (place := max(self.data.rfind(name, 0, end) for name in names)) >= 0:
            end = self.data.rfind(b"\n", 0, place) + 1
            event = event_from_line(self.data[end : self.data.index(b"\n", place)])
            if isinstance(event, kinds):
                return event
        return None

    def first(self, kind: type[_Kind]) -> _Kind | None:
        """Return the first event of a kind."""
        name, end = kind.kind.encode(), 0
        while (place := self.data.find(name, end)) >= 0:
            begin = self.data.rfind(b"\n", 0, place) + 1
            end = self.data.index(b"\n", place)
            event = event_from_line(self.data[begin:end])
            if isinstance(event, kind):
                return event
        return None

    def all(self, kind: type[_Kind]) -> list[_Kind]:
        """Return the events of a kind, in the order of the log."""
        name = kind.kind.encode()
        events = (event_from_line(line) for line in self.data.split(b"\n") if name in line)
        return [event for event in events if isinstance(event, kind)]

    @property
    def last_at(self) -> float | None:
        """The time of the last line, unix seconds."""
        event = event_from_line(self.data[self.data.rfind(b"\n", 0, -1) + 1 :])
        return event.at if event else None


def log_tail(path: Path, limit: int = _TAIL_BYTES) -> LogEnd:
    """Return the last whole lines of a log, `limit` bytes of them or one longer line; a missing log has none."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while True:
                file.seek(max(0, size - limit))
                chunk = file.read(limit)
                found = _whole_lines(chunk.partition(b"\n")[2] if size > limit else chunk)
                if found or limit >= min(size, _WIDEST_BYTES):
                    return LogEnd(found)
                limit *= _WIDER
    except OSError:
        return LogEnd(b"")


def log_head(path: Path, limit: int = _HEAD_BYTES) -> LogEnd:
    """Return the first whole lines of a log, `limit` bytes of them or one longer line; a missing log has none."""
    try:
        with path.open("rb") as file:
            while True:
                file.seek(0)
                chunk = file.read(limit)
                found = _whole_lines(chunk)
                if found or len(chunk) < limit or limit >= _WIDEST_BYTES:
                    return LogEnd(found)
                limit *= _WIDER
    except OSError:
        return LogEnd(b"")


def _whole_lines(chunk: bytes) -> bytes:
    return chunk[: chunk.rfind(b"\n") + 1]


def sample_steps(path: Path, count: int = 400) -> list[StepDone]:
    """Return up to `count` steps from evenly spaced places of a log, each later than the one before.

    Each takes some 20 microseconds, however long the log is. A missing log has none.
    """
    found: list[StepDone] = []
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for place in range(count):
                file.seek(place * size // count)
                step = _step_in(file.read(_STEP_BYTES))
                if step is not None and (not found or step.step > found[-1].step):
                    found.append(step)
    except OSError:
        return found
    return found


def _step_in(chunk: bytes) -> StepDone | None:
    """Return the first whole step of a piece of a log; its first line may be torn."""
    for line in chunk.split(b"\n")[1:-1]:
        event = event_from_line(line)
        if isinstance(event, StepDone):
            return event
    return None
