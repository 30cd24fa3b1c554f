"""Steps and memory readings of a run, one after another, as screens and reports draw them.

Of a log that has an index only some entries of each block are here; where a series is cut inside a block, or its last
steps are asked for one by one, the block's lines are read.
"""

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from studio.core.events import MEMORY_FIELDS, PAIR_FIGURES, MemorySeen, RunEvent, StepDone
from studio.runs.log import event_from_line
from studio.runs.log_index import Block, read_lines

RECENT_STEPS = 20
"""Steps over which the pace is measured."""

_Kind = TypeVar("_Kind", bound=RunEvent)


def _integers() -> "array[int]":
    return array("q")


def _floats() -> "array[float]":
    return array("d")


class Taken(NamedTuple):
    """A block of the log in a series: only some of its entries are there.

    Attributes:
        place: The index of the first of them.
        points: How many there are.
        block: The block.
        log: Where the others can be read.
    """

    place: int
    points: int
    block: Block
    log: Path

    @property
    def behind(self) -> int:
        """The index behind the last of them."""
        return self.place + self.points

    def events(self, kind: type[_Kind]) -> list[_Kind]:
        """Return all events of a kind in the block; none where the log is gone."""
        name = kind.kind.encode()
        lines = read_lines(self.log, [(self.block.begin, self.block.end)])
        events = (event_from_line(line) for piece in lines for line in piece.split(b"\n") if name in line)
        return [event for event in events if isinstance(event, kind)]


@dataclass(slots=True)
class TrainSeries:
    """Optimizer steps, in order. A loss or norm may be NaN or infinite, as it was.

    Of a log that has an index the last steps are all here, and of each block before them some: first, last, lowest and
    highest loss.
    """

    steps: "array[int]" = field(default_factory=_integers)
    losses: "array[float]" = field(default_factory=_floats)
    lrs: "array[float]" = field(default_factory=_floats)
    grad_norms: "array[float]" = field(default_factory=_floats)
    tokens: "array[int]" = field(default_factory=_integers)
    seconds: "array[float]" = field(default_factory=_floats)
    at: "array[float]" = field(default_factory=_floats)
    pairs: "dict[str, array[float]]" = field(default_factory=dict)
    """By the names of `PAIR_FIGURES`, where steps learn from pairs of answers; else empty. An unknown one is NaN; of a
    block each kept step has the means over the block."""
    blocks: "list[Taken]" = field(default_factory=list)

    @property
    def all_tokens(self) -> int:
        """Tokens of all steps, also of those that are not here."""
        return sum(self.tokens) + sum(taken.block.tokens_between for taken in self.blocks)

    def levels(self, begin: int = 0) -> "array[float]":
        """Return the losses from an index on, for a mean over them: of a block's steps each has the block's mean."""
        levels = self.losses[begin:]
        for taken in self.blocks:
            for place in range(max(taken.place, begin), taken.behind):
                levels[place - begin] = taken.block.mean_loss
        return levels

    def append(self, event: StepDone) -> None:
        """Add a step in place of the same and any later one."""
        self.cut_from(event.step)
        self.steps.append(event.step)
        self.losses.append(event.loss)
        self.lrs.append(event.learning_rate)
        self.grad_norms.append(event.grad_norm)
        self.tokens.append(event.tokens)
        self.seconds.append(event.seconds)
        self.at.append(event.at)
        if event.margin is not None:
            self._have_pairs(len(self.steps) - 1)
        for name, figures in self.pairs.items():
            value = getattr(event, name)
            figures.append(math.nan if value is None else value)

    def take(self, block: Block, log: Path) -> None:
        """Add the steps of a block of the log, in place of the same and any later ones."""
        if not block.steps:
            return
        self.cut_from(block.first_step)
        taken = Taken(len(self.steps), len(block.points), block, log)
        self.blocks.append(taken)
        for series, values in zip(self._plain(), zip(*block.points, strict=True), strict=True):
            series.extend(values)
        if block.mean_pairs:
            self._have_pairs(taken.place)
        for place, figures in enumerate(self.pairs.values()):
            figures.extend([block.mean_pairs[place] if block.mean_pairs else math.nan] * taken.points)

    def cut_from(self, step: int) -> None:
        """Drop this step and all after it."""
        while self.blocks and self.blocks[-1].block.last_step >= step:
            taken = self.blocks.pop()
            self._keep(taken.place)
            if taken.block.first_step < step:
                for event in taken.events(StepDone):
                    self.append(event)
        keep = _kept(self.steps, step)
        if keep < len(self.steps):
            self._keep(keep)

    def settle(self) -> None:
        """See to it that the last steps are here one by one, and not only some of them."""
        while self.blocks and len(self.steps) - self.blocks[-1].behind < RECENT_STEPS:
            taken = self.blocks.pop()
            every = [*self._plain(), *self.pairs.values()]
            rest = [series[taken.behind :] for series in every]
            self._keep(taken.place)
            for event in taken.events(StepDone):
                self.append(event)
            for series, values in zip(every, rest, strict=True):
                series.extend(values)

    def _plain(self) -> "tuple[array[Any], ...]":
        return self.steps, self.losses, self.lrs, self.grad_norms, self.tokens, self.seconds, self.at

    def _have_pairs(self, before: int) -> None:
        self.pairs = self.pairs or {name: array("d", [math.nan] * before) for name in PAIR_FIGURES}

    def _keep(self, count: int) -> None:
        for series in (*self._plain(), *self.pairs.values()):
            del series[count:]


@dataclass(slots=True)
class MemorySeries:
    """Memory readings, in order. Bytes; what was not available is NaN, so that a plot shows a gap.

    Of a log that has an index these are some of the readings, the highest ones among them.
    """

    steps: "array[int]" = field(default_factory=_integers)
    stages: list[str] = field(default_factory=list)
    allocated_bytes: "array[float]" = field(default_factory=_floats)
    reserved_bytes: "array[float]" = field(default_factory=_floats)
    peak_bytes: "array[float]" = field(default_factory=_floats)
    device_bytes: "array[float]" = field(default_factory=_floats)
    resident_bytes: "array[float]" = field(default_factory=_floats)
    resident_peak_bytes: "array[float]" = field(default_factory=_floats)
    blocks: "list[Taken]" = field(default_factory=list)

    def append(self, event: MemorySeen) -> None:
        """Add a reading."""
        self.steps.append(event.step)
        self.stages.append(event.stage)
        for name in MEMORY_FIELDS:
            value = getattr(event, name)
            getattr(self, name).append(math.nan if value is None else value)

    def take(self, block: Block, log: Path) -> None:
        """Add the readings of a block of the log."""
        if block.readings:
            self.blocks.append(Taken(len(self.steps), len(block.readings), block, log))
            steps, stages, *figures = zip(*block.readings, strict=True)
            self.steps.extend(steps)
            self.stages.extend(stages)
            for name, values in zip(MEMORY_FIELDS, figures, strict=True):
                getattr(self, name).extend([math.nan if value is None else value for value in values])

    def cut_from(self, step: int) -> int:
        """Drop the readings of this step and of all after it; return how many of the others were left untouched."""
        untouched: int | None = None
        while self.blocks:
            taken = self.blocks[-1]
            self._keep(max(_kept(self.steps, step), taken.behind))
            if len(self.steps) > taken.behind or self.steps[-1] < step:
                return len(self.steps) if untouched is None else untouched
            self.blocks.pop()
            self._keep(taken.place)
            untouched = taken.place
            if taken.block.least_reading_step < step:
                for event in taken.events(MemorySeen):
                    self.append(event)
        self._keep(_kept(self.steps, step))
        return len(self.steps) if untouched is None else min(untouched, len(self.steps))

    def _keep(self, count: int) -> None:
        for name in ("steps", "stages", *MEMORY_FIELDS):
            del getattr(self, name)[count:]


def _kept(steps: "array[int]", step: int) -> int:
    """Return how many entries are before the step. Searches from the end, since a resume drops only the last steps."""
    keep = len(steps)
    while keep and steps[keep - 1] >= step:
        keep -= 1
    return keep
