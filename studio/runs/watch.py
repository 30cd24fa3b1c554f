"""A run that is looked at again and again: what is new in its log is folded into its history."""

from dataclasses import dataclass, field

from studio.core.events import RunEvent
from studio.runs.history import History
from studio.runs.last_words import printed_lines
from studio.runs.layout import RunPaths
from studio.runs.log import POLL_BYTES, EventTail

_LAST_LINES_BYTES = 16 * 1024


@dataclass(slots=True)
class RunWatch:
    """Follows one run; `poll` as often as something is drawn.

    Attributes:
        paths: The run.
        history: The events so far; a new object when the log was replaced or cut.
    """

    paths: RunPaths
    history: History = field(default_factory=History)
    _tail: EventTail = field(init=False)
    _restarts: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._tail = EventTail(self.paths.events)

    def poll(self, limit: int = POLL_BYTES) -> list[RunEvent]:
        """Fold new events into the history and return them; at most about `limit` bytes at once, see `behind`."""
        events = self._tail.poll(limit)
        if self._tail.restarts != self._restarts:
            self._restarts = self._tail.restarts
            self.history = History()
        self.history.fold(events)
        return events

    @property
    def behind(self) -> bool:
        """Whether something waits to be read, be it a torn last line."""
        return self._tail.behind_bytes > 0

    def catch_up(self) -> History:
        """Read to the end of the log and return the history."""
        before = -1
        # Where a poll has taken nothing the end is reached, even if a torn last line stays behind.
        while self._tail.behind_bytes != before:
            before = self._tail.behind_bytes
            self.poll()
        return self.history


def read_history(paths: RunPaths) -> History:
    """Return the history of all that is in a run's log."""
    return RunWatch(paths).catch_up()


def last_output(paths: RunPaths, lines: int = 12) -> list[str]:
    """Return the last lines that the worker's process printed, unchanged: pass them through `plain` to show them."""
    return printed_lines(paths.output, _LAST_LINES_BYTES)[-lines:] if lines > 0 else []
