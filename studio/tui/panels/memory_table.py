"""Memory by stage, predicted beside measured."""

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.tui.memory_stages import StagePeaks, StageRow, planned_stages
from studio.tui.readable import UNKNOWN, gib

_HEAD = f"{'stage':14}{'predicted':>11}{'measured':>11}\n"
_WRONG = 0.05
_BRACKETS = {1: " ", 2: "┐┘", 3: "┐│┘"}


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
            measured, style = _measured(row) if last else ("", "")
            parts += [f"{name:14}{gib(predicted):>11} {bracket}", (f"{measured}\n", style)]
    if all(row.measured is None for row in rows):
        resident = history.memory.last.resident_peak_bytes if history.memory.last is not None else None
        on_cpu = device == "cpu"
        seen = f" The process held {gib(resident)} GiB at most, libraries included." if resident else ""
        why = "A CPU counts no tensors." if on_cpu else "Nothing was measured yet."
        parts.append((f"{why}{seen}\n", "$text-muted"))
    parts.append(
        ("GiB of live tensors at the peak of each stage; bracketed ones are measured together.", "$text-muted")
    )
    return Content.assemble(*parts)


def _measured(row: StageRow) -> tuple[str, str]:
    off = row.off
    if row.measured is None:
        return f"{UNKNOWN:>9}", ""
    words = f"{gib(row.measured):>9}"
    if off is None:
        return words, ""
    return f"{words}  {off:+.0%}", "$text-warning" if off > _WRONG else ""
