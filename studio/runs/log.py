"""`events.jsonl`: one writer that appends a line per event, and readers that follow it from a kept offset.

A writer that was killed may leave a torn last line; the next writer ends it. A reader takes whole lines only, and waits
for the rest of a torn one. A line that is not one of our events is kept as `Unknown` and is never an error.
"""

import json
import math
import os
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from studio.core.events import (
    KINDS,
    Failed,
    Finished,
    MemorySeen,
    RunEvent,
    Saved,
    StepDone,
    Unknown,
    event_from_dict,
    event_to_dict,
)
from studio.runs.disk import disk_failure
from studio.runs.log_index import Block, IndexFile, IndexMaker, read_index

TERMINAL = (Failed, Finished)
_DURABLE = (*TERMINAL, Saved)
POLL_BYTES = 4 * 2**20
"""What one poll reads at most: about 30 000 steps, which take a third of a second to read."""
_LONGEST_LINE_BYTES = 2**20
MOST_LINE_BYTES = 48 * 1024
"""A line up to this length keeps all of its event's texts; in a longer one they are cut. A text that is needed whole
belongs into report.json."""
_MOST_THINGS_BYTES = 2**19
"""A line above this length, with its texts cut, loses lists and tables too."""
_SHORTER = (8192, 2048, 512, 128)
"""Characters that are left of each text: one after another is tried until the line is short enough."""
_KEPT_OF_BAD_LINE = 2000


class EventWriter:
    """The one writer of a run's events; may be used from several threads of its process."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open the log for appending and end a torn last line, so that the next event starts a line of its own."""
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
        # The length up to which all lines are whole: a write that fails half-way is cut off there.
        self._size = os.fstat(self._descriptor).st_size
        if self._size and not _ends_with_newline(self._descriptor, self._size):
            self._append(b"\n")
        blocks = read_index(index_of(path), path)
        self._index, self._maker = IndexFile(index_of(path), blocks), IndexMaker(blocks[-1].end if blocks else 0)
        for block in blocks_of(path, self._maker):
            self._index.append(block)

    def emit(self, kind: type[RunEvent], **fields: Any) -> RunEvent:
        """Stamp an event with the clock, write it and return it; see `write`."""
        event = kind(at=self._clock(), **fields)
        self.write(event)
        return event

    def write(self, event: RunEvent) -> None:
        """Append one event. Terminal events and `Saved` are on the disk when this returns.

        Raises:
            JobFailed: The disk refuses (kind `disk_full` and others); no part of the line is left behind.
            OSError: The log cannot be written for another reason.
        """
        self.write_all([event])

    def write_all(self, events: Iterable[RunEvent]) -> None:
        """Append events that belong together: all of their lines or none; see `write`.

        Raises:
            JobFailed: As for `write`.
            OSError: As for `write`.
        """
        kept = tuple(events)
        # One piece of bytes for all lines: where the disk takes only a part of it, all of it is taken back.
        lines = [_line_of(event) for event in kept]
        with self._lock:
            indexed = self._maker.end == self._size
            self._append(b"".join(lines), durable=any(isinstance(event, _DURABLE) for event in kept))
            for event, line in zip(kept, lines, strict=True) if indexed else ():
                for block in self._maker.take(_as_read(event, line), line):
                    self._index.append(block)

    def close(self) -> None:
        """Close the log; closing twice is closing once."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _append(self, data: bytes, *, durable: bool = False) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            if durable:
                os.fsync(self._descriptor)  # a network disk may say only now that it is full
        except OSError as error:
            # A part of a line must not stay: the next event would be appended to it, and both would be unreadable.
            if written:
                os.ftruncate(self._descriptor, self._size)
            if failure := disk_failure(error, place=self._path.parent, kept="the run's log could not be written"):
                raise failure from error
            raise
        self._size += len(data)


class EventTail:
    """A reader that follows a log from where it stopped.

    Attributes:
        offset: How many bytes of the file were returned.
        restarts: How often the file was replaced or cut since the first read. Events from before then no longer count.
    """

    def __init__(self, path: Path, begin: int = 0) -> None:
        """Follow a log from this byte on, where a line begins."""
        self.path = path
        self.restarts = 0
        self.offset = begin
        self._inode: int | None = None
        self._inside_long_line = False

    def poll(self, limit: int = POLL_BYTES) -> list[RunEvent]:
        """Return the events of the whole lines that came since the last call, about `limit` bytes of them at most.

        A missing file has no events. When `limit` was reached, more may wait: `behind_bytes` tells how much. No event
        of ours makes a line longer than 1 MiB; a line longer than that and than `limit` becomes one `Unknown`.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                self._notice_replacement(status)
                file.seek(self.offset)
                chunk = file.read(limit)
                if limit < _LONGEST_LINE_BYTES and len(chunk) == limit and b"\n" not in chunk:
                    chunk += file.read(_LONGEST_LINE_BYTES - limit)  # a line longer than the poll
                    limit = _LONGEST_LINE_BYTES
        except OSError:
            return []
        return [event for line in self._whole_lines(chunk, limit) if (event := event_from_line(line)) is not None]

    def skip_to(self, offset: int) -> None:
        """Read from a byte on, at which a line begins; what stands before it counts as read."""
        with suppress(OSError):
            self._inode, self.offset = self.path.stat().st_ino, offset

    @property
    def behind_bytes(self) -> int:
        """Bytes of the file that were not returned yet, a torn last line included."""
        try:
            return max(0, self.path.stat().st_size - self.offset)
        except OSError:
            return 0

    def _notice_replacement(self, status: os.stat_result) -> None:
        # Another file in its place has another inode; one that was cut in place is shorter than what was read.
        replaced = self._inode is not None and status.st_ino != self._inode
        if replaced or status.st_size < self.offset:
            self.restarts += 1
            self.offset, self._inside_long_line = 0, False
        self._inode = status.st_ino

    def _whole_lines(self, chunk: bytes, limit: int) -> list[bytes]:
        """Return the whole lines of what was read, and move on behind them.

        Of a line that is too long the beginning is returned once; the rest is skipped, poll by poll, up to its end.
        """
        end = chunk.rfind(b"\n") + 1
        if end:
            self.offset += end
            lines = chunk[:end].split(b"\n")[:-1]
            skipped, self._inside_long_line = self._inside_long_line, False
            return lines[1:] if skipped else lines
        if len(chunk) < limit:
            return []  # no line end yet: the writer is not done with it, so it is read again from its beginning
        self.offset += len(chunk)
        first, self._inside_long_line = not self._inside_long_line, True
        return [chunk[:_KEPT_OF_BAD_LINE]] if first else []


def read_events(path: Path) -> list[RunEvent]:
    """Return all events of a log, in order; a missing log has none."""
    tail = EventTail(path)
    events = tail.poll()
    before = 0
    # A torn last line stays behind for good: where a poll has taken nothing, there is no more to take.
    while 0 < tail.behind_bytes != before:
        before = tail.behind_bytes
        events.extend(tail.poll())
    return events


def index_of(path: Path) -> Path:
    """Return where the index of a log lies."""
    return path.with_suffix(".index")


def blocks_of(path: Path, maker: IndexMaker) -> Iterator[Block]:
    """Yield the blocks of a log from where a maker of its index stands; the lines after the last are left with it.

    It stops before a line that is longer than a poll reads, which is none of ours.
    """
    try:
        with path.open("rb") as file:
            file.seek(maker.end)
            while (line := file.readline(POLL_BYTES)).endswith(b"\n"):
                yield from maker.take(event_from_line(line[:-1]), line)
    except OSError:
        return


def _as_read(event: RunEvent, line: bytes) -> RunEvent | None:
    """Return what a reader makes of an event's line. The commonest ones are read as they were written."""
    if isinstance(event, (StepDone, MemorySeen)) and len(line) <= MOST_LINE_BYTES and well_typed(event):
        return event
    return event_from_line(line[:-1])


def event_from_line(line: bytes) -> RunEvent | None:
    """Return the event on a line, `Unknown` for anything that is not one of ours, None for an empty line."""
    if not line.strip():
        return None
    try:
        table = json.loads(line)
        if isinstance(table, dict):
            event = event_from_dict(table)
            return event if well_typed(event) else Unknown(at=event.at if is_moment(event.at) else 0.0, raw=table)
    except (ValueError, OverflowError, RecursionError):
        pass
    return Unknown(at=0.0, raw={"text": line[:_KEPT_OF_BAD_LINE].decode("utf-8", "replace")})


def _line_of(event: RunEvent) -> bytes:
    """Return an event's line. In a line that would be too long texts are cut, and then lists and tables left out."""
    table = _finite(event_to_dict(event))
    line = _as_line(table)
    for characters in _SHORTER:
        if len(line) <= MOST_LINE_BYTES:
            return line
        line = _as_line(_shortened(table, characters))
    # The texts are at their shortest, so the line is long because it holds many things. Half of a list would mislead:
    # the largest list or table is left out whole, then the next.
    for name in sorted(table, key=lambda name: -len(_as_line(table[name]))):
        if len(line) <= _MOST_THINGS_BYTES:
            return line
        if isinstance(table[name], (dict, list)):
            table[name] = type(table[name])()
            line = _as_line(_shortened(table, _SHORTER[-1]))
    return line


def _as_line(table: Any) -> bytes:
    return (json.dumps(table, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


def _shortened(value: Any, most: int) -> Any:
    """Return a value with every text cut after `most` characters; a text that was cut says how many are missing."""
    if isinstance(value, dict):
        return {_shortened(key, most): _shortened(inner, most) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shortened(inner, most) for inner in value]
    if isinstance(value, str) and len(value) > most:
        return f"{value[:most]} ... ({len(value) - most} more characters)"
    return value


def _finite(value: Any) -> Any:
    """Return a value with null for every non-finite number in it: inside nested tables there is no flag beside it."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _ends_with_newline(descriptor: int, size: int) -> bool:
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1) == b"\n"


_LARGEST = 2**53
"""The largest whole number up to which a 64-bit float, as which many readers of JSON take numbers, is exact."""
_LATEST_SECONDS = 2.5e11
"""Unix seconds in the year 9892: later moments have no date, and asking for one ends the program that asks."""


def well_typed(event: RunEvent) -> bool:
    """Return whether every field holds its declared type and every whole number fits a 64-bit float exactly."""
    if not is_moment(event.at):
        return False
    if isinstance(event, Unknown):
        return True
    for name, allowed in _ALLOWED[event.kind]:
        value = getattr(event, name)
        kind = type(value)
        if kind not in allowed or (kind is int and not -_LARGEST <= value <= _LARGEST):
            return False
    return True


def is_moment(at: float) -> bool:
    """Return whether unix seconds have a date."""
    return math.isfinite(at) and abs(at) <= _LATEST_SECONDS


def _types(hint: Any) -> set[type]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return set().union(*(_types(part) for part in get_args(hint)))
    plain_type = origin or hint
    return {int, float} if plain_type is float else {plain_type}


_ALLOWED = {
    name: tuple((item.name, frozenset(_types(get_type_hints(kind)[item.name]))) for item in fields(kind))
    for name, kind in KINDS.items()
}
