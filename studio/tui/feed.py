"""A run as a screen follows it: events, output and status, read at the pace at which it is drawn. Knows no widget."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from studio.core.events import MemorySeen, StepDone
from studio.core.text import duration_text, plain
from studio.runs.control import requested
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.silence import silent_seconds
from studio.runs.status import Status, run_status
from studio.runs.watch import RunWatch
from widgets.log_view import visible_lines

_LOOKS_PER_STATUS = 4
"""While nothing but steps comes, the status is found anew at every so many looks."""
_BYTES_PER_LOOK = 128 * 1024
"""About 1000 steps, 10 ms: more than comes between two looks at a run that is drawn twice a second."""
_BYTES_PER_READ = 16 * 1024
"""How much of a long log is read between two looks at the clock."""
_FIRST_BYTES = 64 * 1024
"""How much of the end of the output the first look reads."""
_MOST_BYTES = 256 * 1024
"""How much new output a later look reads; what is older is skipped."""
_MOST_LINES = 2000
_LONGEST_LINE = 4000


@dataclass(frozen=True, slots=True)
class Glance:
    """What one look at a run found.

    Attributes:
        status: How it stands.
        history: Everything told so far.
        output: New lines of its output, harmless.
        news: How many events this look has read.
        behind: Whether the log holds more events than one look reads.
    """

    status: Status
    history: History
    output: list[str]
    news: int
    behind: bool


class RunFeed:
    """Looks at one run again and again."""

    def __init__(self, paths: RunPaths, *, status_of: Callable[[RunPaths], Status] = run_status) -> None:
        """Follow a run; nothing is read yet."""
        self.paths = paths
        self._watch = RunWatch(paths)
        self._output = OutputTail(paths.output)
        self._status_of = status_of
        self._status: Status | None = None
        self._looks = 0

    def read_on(self, seconds: float) -> tuple[History, bool]:
        """Read events of a long log for about so many seconds; return the history and whether more wait.

        Status and output are left to the next `look`.
        """
        end = time.perf_counter() + seconds
        while self._watch.poll(_BYTES_PER_READ):
            if time.perf_counter() >= end:
                return self._watch.history, True
        return self._watch.history, False

    def look(self) -> Glance:
        """Return what is new. Of a long log it reads a slice only, which is cheap enough for the thread that draws."""
        self._watch.take_index()
        events = self._watch.poll(_BYTES_PER_LOOK)
        behind = self._watch.behind > 0 and bool(events)
        self._looks += 1
        only_steps = all(isinstance(event, (StepDone, MemorySeen)) for event in events)
        # To find the status, the end of the log is read again, which takes some 10 ms. New steps show that the worker
        # lives; so while nothing but steps comes, the status is looked at every fourth time.
        if self._status is None or not events or not only_steps or self._looks % _LOOKS_PER_STATUS == 0:
            self._status = self._status_of(self.paths)
        return Glance(self._status, self._watch.history, self._output.poll(), len(events), behind)


class OutputTail:
    """Follows `output.log`. Any library may have written it, so each line is made harmless before it is returned.

    A line is returned once it is whole. The first look reads the end of the file only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset: int | None = None
        self._torn = b""

    def poll(self) -> list[str]:
        """Return the whole lines that came since the last call; of a flood only the newest 2000, 256 KiB at most."""
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                begin = self._begin(size)
                file.seek(begin)
                chunk = file.read(size - begin)
        except OSError:
            return []
        skipped = begin != self._offset
        self._offset = begin + len(chunk)
        # After a jump `begin` lies somewhere in a line: what is left of that line is dropped.
        if skipped:
            self._torn = b""
            chunk = chunk.partition(b"\n")[2] if begin else chunk
        whole, newline, self._torn = (self._torn + chunk).rpartition(b"\n")
        if not newline:
            return []
        newest = whole.rsplit(b"\n", _MOST_LINES)[-_MOST_LINES:]
        return harmless(b"\n".join(newest).decode("utf-8", "replace"))

    def _begin(self, size: int) -> int:
        """Return the byte to read from. A log that shrank is a new one, of which the end is read, as at first."""
        if self._offset is None or size < self._offset:
            return max(0, size - _FIRST_BYTES)
        return max(self._offset, size - _MOST_BYTES)


def harmless(text: str) -> list[str]:
    """Return the lines of foreign text as a terminal may show them: no control, no reordering, no endless line."""
    return [plain(line, one_line=True, limit=_LONGEST_LINE) for line in visible_lines(text)]


class Cursor:
    """Remembers how much of a growing series a plot has got, and notices when the series was replaced."""

    def __init__(self) -> None:
        self._sent = 0
        self._last: int | None = None
        self._source: object = None

    def start(self, steps: Sequence[int], source: object) -> int:
        """Return the index of the first point that is new; 0 where the plot must begin anew.

        After this call all points count as handed on.

        Args:
            steps: The steps of the series now.
            source: What the series came from. Another object, as after a resume, means another series.
        """
        known = self._sent
        holds = source is self._source and known <= len(steps) and (not known or steps[known - 1] == self._last)
        self._sent, self._source = len(steps), source
        self._last = steps[-1] if steps else None
        return known if holds else 0


def waits_for(paths: RunPaths, glance: Glance) -> str:
    """Return in words a request that the worker has not answered yet, else that it is silent; mostly empty."""
    status = glance.status
    if status in (Status.starting, Status.running) and requested(paths, "pause"):
        return "pause asked for: after this step"
    if status is Status.paused:
        then = ", then saves a checkpoint" if requested(paths, "checkpoint-now") else ""
        return f"p goes on{then}" if requested(paths, "pause") else "going on"
    if status.live and requested(paths, "checkpoint-now"):
        return "checkpoint asked for: after this step"
    return silence_of(glance)


def silence_of(glance: Glance, now: float | None = None) -> str:
    """Return in words that a training has told nothing for long; empty while it tells, or its log is still read."""
    if glance.behind:
        return ""
    silent = silent_seconds(glance.history, glance.status, time.time() if now is None else now)
    return f"silent for {duration_text(silent)}: it may hang; x, then x again, ends it" if silent else ""
