"""The memory of a run, as a gauge and as a table by stage: the plan at launch beside what torch's counters saw."""

import math
from dataclasses import dataclass, replace
from typing import Any

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from studio.runs.atomic import read_object
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.tui.readable import UNKNOWN, gib, to_gib
from widgets.gauge import Gauge, Part, Reading

TOGETHER = {
    "load": ("load",),
    "backward": ("forward", "loss", "backward"),
    "step": ("optimizer",),
    "eval": ("eval",),
    "save": ("save",),
}
"""The stages of an estimate that lie between two readings of the counters, by the name of the later reading."""

_HEAD = f"{'stage':14}{'predicted':>11}{'measured':>11}\n"
_WRONG = 0.05
"""A measured peak that exceeds the prediction by more than this share is marked."""
_BRACKETS = {1: " ", 2: "┐┘", 3: "┐│┘"}
"""Marks that join the rows of stages that were measured together, by how many there are."""
_OUTSIDE_TENSORS = "context"
"""The one component that torch's counters do not see."""

_LATER = "later steps"
_STEP = ("forward", "loss", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class StageRow:
    """One or more stages that were measured together.

    Attributes:
        stages: Their names.
        predicted: Predicted peak of live tensors of each, bytes.
        measured: The highest peak that was measured over them, bytes; None where none was.
    """

    stages: tuple[str, ...]
    predicted: tuple[int, ...]
    measured: float | None

    @property
    def off(self) -> float | None:
        """By how much the measured peak exceeds the highest predicted one, as a share of it; negative if lower."""
        highest = max(self.predicted, default=0)
        return None if self.measured is None or not highest else self.measured / highest - 1


def planned_peak_bytes(paths: RunPaths) -> int | None:
    """Return the peak that was estimated at launch, or None where `plan.json` does not tell."""
    return _size(read_object(paths.plan).get("peak_bytes")) or None


def planned_reading(paths: RunPaths) -> Reading | None:
    """Return the estimated peak of live tensors by component, in GiB; None where `plan.json` does not tell."""
    plan = read_object(paths.plan)
    components = _sizes(plan.get("components"))
    try:
        # A component that is no size would make the sum of the parts wrong: then nothing is shown.
        whole = len(components) == len(plan["components"])
        low, high = (_size(plan["ranges"]["allocated"][end]) for end in ("low", "high"))
    except (TypeError, KeyError):
        return None
    parts = tuple(
        Part(name, to_gib(size))
        for name, size in components.items()
        if name != _OUTSIDE_TENSORS and name.isidentifier() and name.isascii()
    )
    if not parts or not whole or low is None or high is None:
        return None
    return Reading(parts, low=to_gib(low), high=to_gib(high), verdict="predicted")


def planned_stages(paths: RunPaths) -> dict[str, int]:
    """Return the predicted peak of live tensors by stage; empty where `plan.json` does not tell."""
    return _sizes(read_object(paths.plan).get("stages"))


def _sizes(named: Any) -> dict[str, int]:
    """Return the entries that are sizes."""
    if not isinstance(named, dict):
        return {}
    return {str(name): size for name, value in named.items() if (size := _size(value)) is not None}


def _size(value: Any) -> int | None:
    """Return a value if it is a number of bytes, else None."""
    return value if type(value) is int and 0 <= value < 2**53 else None


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
        """Take in the new readings. After a resume all are taken in anew, because steps may have been done again."""
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
        """Return the stages in their order, and as the last row the later steps as wholes."""
        rows = [
            StageRow(known, tuple(planned[name] for name in known), self._peaks.get(reading))
            for reading, names in TOGETHER.items()
            if (known := tuple(name for name in names if name in planned))
        ]
        if _LATER in self._peaks and (known := tuple(name for name in _STEP if name in planned)):
            rows.append(StageRow((_LATER,), (max(planned[name] for name in known),), self._peaks[_LATER]))
        return rows


class PeakGauge(Gauge):
    """The gauge of the peak. It appears once the run has told its card; a run on the CPU has no such estimate."""

    DEFAULT_CSS = """
    PeakGauge { height: 1; padding: 0 1; display: none; }
    PeakGauge.-shown { display: block; }
    """

    def __init__(self, paths: RunPaths) -> None:
        """Start hidden."""
        super().__init__(unit="GiB", label="peak")
        self._paths = paths
        self._planned: Reading | None = None

    def show(self, history: History, highest_bytes: float | None) -> bool:
        """Show the estimate and the highest measured peak of live tensors; return whether this is the first time."""
        if history.planned is None or history.planned.device == "cpu":
            return False
        first = self._planned is None
        self._planned = self._planned or planned_reading(self._paths) or Reading()
        if self._planned.parts:
            self.reading = with_measured(self._planned, highest_bytes)
            self.set_class(True, "-shown")
        return first


def with_measured(planned: Reading, peak: float | None) -> Reading:
    """Return the reading with the highest measured peak of live tensors, bytes, and whether it lies in the range."""
    if peak is None or planned.low is None or planned.high is None:
        return planned
    measured = to_gib(peak)
    if measured > planned.high:
        return replace(planned, measured=measured, verdict=f"{_percent(measured, planned.total)} over", level="bad")
    if measured < planned.low:
        return replace(
            planned, measured=measured, verdict=f"{_percent(measured, planned.total)} under", level="doubtful"
        )
    return replace(planned, measured=measured, verdict="in the range", level="good")


class MemoryTable(VerticalScroll):
    """Peaks of live tensors in GiB. Repaints only when a figure changed."""

    DEFAULT_CSS = """
    MemoryTable {
        padding: 0 1;
        & > Static { height: auto; }
    }
    """

    def __init__(self, paths: RunPaths, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Show the memory of a run."""
        self._text = Static("", markup=False)
        super().__init__(self._text, id=id)
        self.border_title = "Memory by stage"
        self._paths = paths
        self._planned: dict[str, int] | None = None
        self._peaks = StagePeaks()

    @property
    def highest_bytes(self) -> float | None:
        """The highest peak of live tensors that was measured; None where none was."""
        return self._peaks.highest

    def show(self, history: History) -> None:
        """Show what is known by now."""
        if self._planned is None:
            self._planned = planned_stages(self._paths)
        self._peaks.take(history)
        text = table_text(self._peaks.rows(self._planned), history)
        if text != self._text.content:
            self._text.update(text)


def table_text(rows: list[StageRow], history: History) -> Content:
    """Return the table, or why there is none."""
    device = history.planned.device if history.planned is not None else ""
    parts: list[str | tuple[str, str]] = []
    if not rows:
        return Content("This run has no estimate by stage.")
    parts.append((_HEAD, "bold"))
    for row in rows:
        for place, (name, predicted) in enumerate(zip(row.stages, row.predicted, strict=True)):
            last = place == len(row.stages) - 1
            bracket = _BRACKETS.get(len(row.stages), " ")[min(place, 2)] if row.measured is not None else " "
            figure, style = _measured(row) if last else ("", "")
            parts += [f"{name:14}{gib(predicted):>11} {bracket}", (f"{figure}\n", style)]
    measured = any(row.measured is not None for row in rows)
    if not measured:
        resident = next((value for value in history.memory.resident_peak_bytes[-1:] if math.isfinite(value)), None)
        on_cpu = device == "cpu"
        seen = f" The process held {gib(resident)} GiB at most, libraries included." if resident else ""
        why = "A CPU counts no tensors." if on_cpu else "Nothing was measured yet."
        parts.append((f"{why}{seen}\n", "dim"))
    together = "; bracketed ones are measured together" if measured else ""
    parts.append((f"GiB of live tensors at the peak of each stage{together}.", "dim"))
    return Content.assemble(*parts)


def _measured(row: StageRow) -> tuple[str, str]:
    off = row.off
    if row.measured is None:
        return f"{UNKNOWN:>9}", ""
    words = f"{gib(row.measured):>9}"
    if off is None:
        return words, ""
    return f"{words}  {off:+.0%}", "$text-warning" if off > _WRONG else ""


def _percent(measured: float, predicted: float) -> str:
    return f"{abs(measured / predicted - 1):.0%}" if predicted else "all"
