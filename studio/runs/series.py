"""The numbers of a run over its steps, as packed arrays: 100 000 steps take about 6 MB."""

import math
from array import array
from dataclasses import dataclass, field

from studio.core.events import MemorySeen, StepDone

_MEMORY_FIELDS = (
    "allocated_bytes",
    "reserved_bytes",
    "peak_bytes",
    "device_bytes",
    "resident_bytes",
    "resident_peak_bytes",
)


def _integers() -> "array[int]":
    return array("q")


def _floats() -> "array[float]":
    return array("d")


@dataclass(slots=True)
class TrainSeries:
    """One entry per optimizer step, in order of steps. A loss or norm that was not finite stays what it was."""

    steps: "array[int]" = field(default_factory=_integers)
    losses: "array[float]" = field(default_factory=_floats)
    lrs: "array[float]" = field(default_factory=_floats)
    grad_norms: "array[float]" = field(default_factory=_floats)
    tokens: "array[int]" = field(default_factory=_integers)
    seconds: "array[float]" = field(default_factory=_floats)
    at: "array[float]" = field(default_factory=_floats)

    def append(self, event: StepDone) -> None:
        """Add a step; steps that are not before it are replaced by it."""
        self.cut_from(event.step)
        self.steps.append(event.step)
        self.losses.append(event.loss)
        self.lrs.append(event.learning_rate)
        self.grad_norms.append(event.grad_norm)
        self.tokens.append(event.tokens)
        self.seconds.append(event.seconds)
        self.at.append(event.at)

    def cut_from(self, step: int) -> None:
        """Forget this step and all after it."""
        keep = _kept(self.steps, step)
        if keep < len(self.steps):
            for series in (self.steps, self.losses, self.lrs, self.grad_norms, self.tokens, self.seconds, self.at):
                del series[keep:]


@dataclass(slots=True)
class MemorySeries:
    """One entry per reading, in order. Bytes; what was not available is NaN, so that a plot shows a gap."""

    steps: "array[int]" = field(default_factory=_integers)
    stages: list[str] = field(default_factory=list)
    allocated_bytes: "array[float]" = field(default_factory=_floats)
    reserved_bytes: "array[float]" = field(default_factory=_floats)
    peak_bytes: "array[float]" = field(default_factory=_floats)
    device_bytes: "array[float]" = field(default_factory=_floats)
    resident_bytes: "array[float]" = field(default_factory=_floats)
    resident_peak_bytes: "array[float]" = field(default_factory=_floats)
    last: MemorySeen | None = None

    def append(self, event: MemorySeen) -> None:
        """Add a reading."""
        self.steps.append(event.step)
        self.stages.append(event.stage)
        for name in _MEMORY_FIELDS:
            value = getattr(event, name)
            getattr(self, name).append(math.nan if value is None else value)
        self.last = event

    def cut_from(self, step: int) -> None:
        """Forget the readings of this step and of all after it."""
        keep = _kept(self.steps, step)
        for name in ("steps", "stages", *_MEMORY_FIELDS):
            del getattr(self, name)[keep:]


def _kept(steps: "array[int]", step: int) -> int:
    """How many leading entries are before the step; looks from the end, where a resume cuts."""
    keep = len(steps)
    while keep and steps[keep - 1] >= step:
        keep -= 1
    return keep
