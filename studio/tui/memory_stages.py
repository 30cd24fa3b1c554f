"""The memory of a run by stage: what the plan said beside what torch's counters saw. Knows no widget."""

import json
import math
from dataclasses import dataclass

from studio.runs.history import History
from studio.runs.layout import RunPaths

TOGETHER = {
    "load": ("load",),
    "backward": ("forward", "loss", "backward"),
    "step": ("optimizer",),
    "eval": ("eval",),
    "save": ("save",),
}
"""The stages of an estimate that lie between two readings of the counters, by the name of the later reading."""

_LATER = "later steps"
_STEP = ("forward", "loss", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class StageRow:
    """One or more stages that were measured together.

    Attributes:
        stages: Their names.
        predicted: Predicted peak of live tensors of each, bytes.
        measured: The highest that was measured over them, bytes; None where it was not.
    """

    stages: tuple[str, ...]
    predicted: tuple[int, ...]
    measured: float | None

    @property
    def off(self) -> float | None:
        """How far the measured peak is from the highest predicted one, as a share of the latter."""
        highest = max(self.predicted, default=0)
        return None if self.measured is None or not highest else self.measured / highest - 1


def planned_stages(paths: RunPaths) -> dict[str, int]:
    """Return the predicted peak of live tensors by stage; empty where `plan.json` does not tell."""
    try:
        stages = json.loads(paths.plan.read_bytes())["stages"]
        return {
            str(name): size
            for name, size in stages.items()
            if isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**53
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


class StagePeaks:
    """The highest measured peak of each stage, kept up to date reading by reading.

    The first step is read after its backward and again after the optimizer; later ones only at their end.
    """

    def __init__(self) -> None:
        self._peaks: dict[str, float] = {}
        self._first: set[int] = set()
        self._source: object = None
        self._seen = 0

    @property
    def highest(self) -> float | None:
        """The highest peak of all, bytes; None where none was measured."""
        return max(self._peaks.values(), default=None)

    def take(self, history: History) -> None:
        """Take in the readings that are new; what a resumed worker did again makes those of before void."""
        memory = history.memory
        if history.started is not self._source or len(memory.steps) < self._seen:
            self._peaks, self._first, self._seen, self._source = {}, set(), 0, history.started
        for place in range(self._seen, len(memory.steps)):
            step, stage, peak = memory.steps[place], memory.stages[place], memory.peak_bytes[place]
            if stage == "backward":
                self._first.add(step)
            if math.isfinite(peak):
                name = _LATER if stage == "step" and step not in self._first else stage
                self._peaks[name] = max(self._peaks.get(name, 0.0), peak)
        self._seen = len(memory.steps)

    def rows(self, planned: dict[str, int]) -> list[StageRow]:
        """Return the stages in the order in which they come, and at last the later steps as wholes."""
        rows = [
            StageRow(known, tuple(planned[name] for name in known), self._peaks.get(reading))
            for reading, names in TOGETHER.items()
            if (known := tuple(name for name in names if name in planned))
        ]
        if _LATER in self._peaks and (known := tuple(name for name in _STEP if name in planned)):
            rows.append(StageRow((_LATER,), (max(planned[name] for name in known),), self._peaks[_LATER]))
        return rows
