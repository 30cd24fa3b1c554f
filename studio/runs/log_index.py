"""`events.index`: what stands in each stretch of a long log, so that a reader need not parse millions of lines.

The log is cut into blocks of about 512 KiB. A line of the index holds what a run's history needs of one block: a few
steps and memory readings with the totals of those between them, and where its other lines lie. The index only helps:
the log alone is the truth. A line of the index counts while its own checksum and that of the end of its block in the
log are right and every line before it counts; what is not indexed is read from the log.
"""

import json
import math
import os
import statistics
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from studio.core.events import (
    MEMORY_FIELDS,
    PAIR_FIGURES,
    SILENT,
    MemorySeen,
    Paused,
    Phase,
    Planned,
    RunEvent,
    Saved,
    Shrunk,
    Started,
    StepDone,
    Unknown,
    Warned,
)

_VERSION = 1
BLOCK_BYTES = 512 * 1024
"""A reader parses up to so much at the end of a log, and again for each resume that cuts a block: some 25 ms."""
_LEAST_BYTES = 64 * 1024
"""A block that is at least as long ends behind a saved checkpoint, where a resume will cut."""
_CHECKED_BYTES = 1024
"""More than the last line of a block, so that its time is among them: no other log has the same."""
_LAST_FINITE = 3
_REPLACED = (Phase, Paused, Planned)
"""Of these the last one before the next start tells all."""

_Entry = tuple[RunEvent, int, int]
"""An event, and where its line begins and ends."""


@dataclass(frozen=True, slots=True)
class Block:
    """What stands in one stretch of a log. Its steps rise, and `Started` and `Shrunk` are nowhere but at its beginning.

    Attributes:
        begin: Its first byte.
        end: The byte behind its last line.
        checked: How many of its last bytes the checksum is over.
        checksum: Their CRC-32.
        last_at: Unix seconds of its last event that is a sign of life; None where it has none.
        unknown: How many lines this version could not read.
        rare: Where the lines begin and end that are no steps and no readings, in order.
        steps: How many steps it has.
        tokens: Tokens of all steps.
        mean_loss: Mean of the finite losses, NaN without any.
        mean_pairs: The means of `PAIR_FIGURES`; empty where no step has them.
        points: Some steps, the first, the last, and those of the lowest and the highest loss among them: step, loss,
            learning rate, norm, tokens, seconds and time.
        least_reading_step: The lowest step of a memory reading.
        readings: Some memory readings, the first, the last and the highest ones of each stage among them: step, stage,
            and the `MEMORY_FIELDS`, where None is not available.
    """

    begin: int
    end: int
    checked: int
    checksum: int
    last_at: float | None
    unknown: int
    rare: Sequence[Sequence[int]]
    steps: int
    tokens: int
    mean_loss: float
    mean_pairs: Sequence[float]
    points: Sequence[Sequence[Any]]
    least_reading_step: int
    readings: Sequence[Sequence[Any]]

    @property
    def first_step(self) -> int:
        """Its first step; it has one."""
        return int(self.points[0][0])

    @property
    def last_step(self) -> int:
        """Its last step; it has one."""
        return int(self.points[-1][0])

    @property
    def tokens_between(self) -> int:
        """Tokens of the steps that are not among its points."""
        return self.tokens - sum(int(point[4]) for point in self.points)

    def line(self) -> bytes:
        """Return it as a line of the index, with the line's checksum in front."""
        data = json.dumps(astuple(self), separators=(",", ":")).encode()
        return b"%08x %b\n" % (zlib.crc32(data, _VERSION), data)


class IndexMaker:
    """Makes blocks of events as they come, one after another."""

    def __init__(self, begin: int) -> None:
        """Begin at a byte of the log at which a line begins."""
        self._begin = self._end = begin
        self._entries: list[_Entry] = []
        self._last_step = -1
        self._last_line = b""

    @property
    def end(self) -> int:
        """The byte behind the last line that was taken."""
        return self._end

    def take(self, event: RunEvent | None, line: bytes) -> Iterator[Block]:
        """Take the next line, its line end included, and yield the blocks that it ends.

        Args:
            event: What a reader makes of the line; None where it is empty.
            line: Its bytes.
        """
        if isinstance(event, (Started, Shrunk)) or (isinstance(event, StepDone) and event.step <= self._last_step):
            yield from self._cut()
        begin, self._end, self._last_line = self._end, self._end + len(line), line
        if event is not None:
            self._entries.append((event, begin, self._end))
        if isinstance(event, StepDone):
            self._last_step = event.step
        size = self._end - self._begin
        if size >= BLOCK_BYTES or (isinstance(event, Saved) and size >= _LEAST_BYTES):
            yield from self._cut()

    def _cut(self) -> Iterator[Block]:
        if self._end > self._begin:
            last = self._last_line[-_CHECKED_BYTES:]
            yield _block(self._entries, self._begin, self._end, last)
        self._begin, self._entries, self._last_step = self._end, [], -1


def _block(entries: Sequence[_Entry], begin: int, end: int, last: bytes) -> Block:
    steps = [event for event, _, _ in entries if isinstance(event, StepDone)]
    readings = [event for event, _, _ in entries if isinstance(event, MemorySeen)]
    alive = [
        event.at for event, _, _ in entries if event.at and not (isinstance(event, Warned) and event.topic == SILENT)
    ]
    replaced: dict[type[RunEvent], int] = {
        type(event): first for event, first, _ in entries if isinstance(event, _REPLACED)
    }
    rare = [
        (first, behind)
        for event, first, behind in entries
        if not isinstance(event, (StepDone, MemorySeen, Unknown)) and replaced.get(type(event), first) == first
    ]
    finite = [step.loss for step in steps if math.isfinite(step.loss)]
    pairs: list[float] = []
    if any(step.margin is not None for step in steps):
        told = ([value for step in steps if (value := getattr(step, name)) is not None] for name in PAIR_FIGURES)
        pairs = [statistics.fmean(values) if values else math.nan for values in told]
    return Block(
        begin=begin,
        end=end,
        checked=len(last),
        checksum=zlib.crc32(last),
        last_at=alive[-1] if alive else None,
        unknown=sum(isinstance(event, Unknown) for event, _, _ in entries),
        rare=rare,
        steps=len(steps),
        tokens=sum(step.tokens for step in steps),
        mean_loss=statistics.fmean(finite) if finite else math.nan,
        mean_pairs=pairs,
        points=[
            (one.step, one.loss, one.learning_rate, one.grad_norm, one.tokens, one.seconds, one.at)
            for one in map(steps.__getitem__, _kept_steps(steps))
        ],
        least_reading_step=min((one.step for one in readings), default=0),
        readings=[
            (one.step, one.stage, *(getattr(one, name) for name in MEMORY_FIELDS))
            for one in map(readings.__getitem__, _kept_readings(readings))
        ],
    )


def _kept_steps(steps: Sequence[StepDone]) -> list[int]:
    """Return the places of the steps that are kept.

    With the first and the last three finite losses of each block those of the whole run are known.
    """
    if not steps:
        return []
    finite = [place for place, step in enumerate(steps) if math.isfinite(step.loss)]
    kept = {0, len(steps) - 1, *finite[:1], *finite[-_LAST_FINITE:]}
    if finite:
        kept |= {choose(finite, key=lambda place: steps[place].loss) for choose in (min, max)}
    return sorted(kept)


def _kept_readings(readings: Sequence[MemorySeen]) -> list[int]:
    """Return the places of the readings that are kept: of each stage the first, and the highest ones after it.

    The first apart, because the first step of a run is shown apart from the later ones.
    """
    kept = {len(readings) - 1} if readings else set()
    by_stage: dict[str, list[int]] = {}
    for place, reading in enumerate(readings):
        by_stage.setdefault(reading.stage, []).append(place)
    for first, *later in by_stage.values():
        kept.add(first)
        for name in MEMORY_FIELDS:
            known = [place for place in later if getattr(readings[place], name) is not None]
            if known:
                kept.add(max(known, key=lambda place: getattr(readings[place], name)))
    return sorted(kept)


def read_index(index: Path, log: Path) -> list[Block]:
    """Return the blocks of a log that are indexed and still as they were, without a gap from the first byte on."""
    blocks: list[Block] = []
    try:
        with index.open("rb") as lines, log.open("rb", buffering=0) as file:
            size, end = os.fstat(file.fileno()).st_size, 0
            for line in lines:
                data = line[9:-1]
                if not line.endswith(b"\n") or line[:8] != b"%08x" % zlib.crc32(data, _VERSION):
                    break
                block = Block(*json.loads(data.decode()))
                file.seek(block.end - block.checked)
                if block.begin != end or block.end > size or zlib.crc32(file.read(block.checked)) != block.checksum:
                    break
                blocks.append(block)
                end = block.end
    except OSError:
        pass  # what was read so far is right; a missing index has no blocks
    return blocks


def read_lines(log: Path, places: Iterable[Sequence[int]]) -> Iterator[bytes]:
    """Yield what stands between two bytes of a log, place by place; nothing where it cannot be read."""
    with suppress(OSError), log.open("rb", buffering=0) as file:
        for begin, end in places:
            file.seek(begin)
            yield file.read(end - begin)


class IndexFile:
    """The index as the one writer of a log keeps it. Where the disk refuses it is left as it is: it only helps."""

    def __init__(self, index: Path, blocks: Sequence[Block]) -> None:
        """Keep the lines of these blocks, which are its first ones, and cut off what follows them.

        The file is made when the first block is written.
        """
        self._index = index
        self._failed = False
        kept = sum(len(block.line()) for block in blocks)
        try:
            if index.exists() and index.stat().st_size != kept:
                os.truncate(index, kept)
        except OSError:
            self._failed = True

    def append(self, block: Block) -> None:
        """Write the line of the next block."""
        if self._failed:
            return
        try:
            # Opened for each line, one in 512 KiB of log: a descriptor would outlive an index that a reader replaced.
            descriptor = os.open(
                self._index, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600
            )
            try:
                os.write(descriptor, block.line())
            finally:
                os.close(descriptor)
        except OSError:
            self._failed = True
