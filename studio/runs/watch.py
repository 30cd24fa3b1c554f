"""A run that is looked at again and again: what is new in its log is folded into its history."""

from contextlib import suppress
from dataclasses import dataclass, field

from studio.core.events import RunEvent
from studio.runs.atomic import write_whole
from studio.runs.history import History
from studio.runs.last_words import printed_lines
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.log import POLL_BYTES, EventTail, blocks_of
from studio.runs.log_index import BLOCK_BYTES, IndexMaker, read_index

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
    def behind(self) -> int:
        """How many bytes wait to be read, a torn last line included."""
        return self._tail.behind_bytes

    def take_index(self, *, make: bool = False) -> None:
        """Take what the index tells of a log of which nothing was read yet.

        Args:
            make: Whether a long log of an ended run that is not indexed to its end is indexed now, which takes as long
                as reading it.
        """
        log = self.paths.events
        if self._tail.offset or self._tail.behind_bytes <= BLOCK_BYTES:
            return
        blocks = read_index(self.paths.index, log)
        end = blocks[-1].end if blocks else 0
        if make and self._tail.behind_bytes - end > POLL_BYTES and not lock_held(self.paths.lock):
            blocks += blocks_of(log, IndexMaker(end))
            with suppress(OSError):
                write_whole(self.paths.index, b"".join(block.line() for block in blocks))
        if blocks:
            self._tail.skip_to(blocks[-1].end)
            self.history.fold_blocks(blocks, log)

    def catch_up(self) -> History:
        """Read to the end of the log and return the history."""
        self.take_index(make=True)
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
