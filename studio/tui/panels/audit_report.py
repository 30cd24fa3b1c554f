"""An audit's report on a screen: what it advises, its tables, and a plot of what it measured along the way."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from studio.core.answer_text import shown_answers
from studio.core.audit_cells import Table
from studio.core.audit_text import DAMAGED, advice_lines, note_lines, tables_of, title_of
from studio.core.text import plain
from studio.tui.readable import number
from widgets.line_picture import Hue
from widgets.line_plot import Curve, LinePlot

_MOST_LANES = 4
_UNREADABLE = (
    "This report is damaged, or of another version of this program: its page is report.md in the run's folder."
)


class AuditReport(Vertical):
    """Words and tables above, a plot below. Everything in a report came from files, so nothing is read as markup."""

    DEFAULT_CSS = """
    AuditReport {
        & #audit-words { height: 2fr; padding: 0 1; }
        & #audit-words Static { width: auto; height: auto; }
        & LinePlot { height: 1fr; padding: 0 1; display: none; }
        & LinePlot.-shown { display: block; }
    }
    """

    def compose(self) -> ComposeResult:
        """Words, then a plot of lanes and one of blocks; one of the two is shown."""
        with VerticalScroll(id="audit-words"):
            yield Static("", markup=False)
        hues = [cast(Hue, place) for place in range(1, _MOST_LANES + 1)]
        yield LinePlot([Curve(str(hue), f"lane {hue}", hue=hue) for hue in hues], x_label="step", id="audit-lanes")
        yield LinePlot([Curve("blocks", "block by block", hue=1)], x_label="block", from_zero=True, id="audit-blocks")

    def show(self, report: Mapping[str, Any] | None, otherwise: str = "") -> None:
        """Show a report, or a few words where there is none."""
        words = Content(plain(otherwise))
        if report:
            try:
                words = report_content(report)
            except DAMAGED:
                words, report = Content(_UNREADABLE), None
        self.query_one("#audit-words Static", Static).update(words)
        lanes, blocks = self.query_one("#audit-lanes", LinePlot), self.query_one("#audit-blocks", LinePlot)
        curves = lane_curves(report) if report else []
        line = block_curve(report) if report else ([], [])
        lanes.set_class(bool(curves), "-shown")
        blocks.set_class(bool(line[0]), "-shown")
        for place in range(_MOST_LANES):
            steps, losses = curves[place] if place < len(curves) else ([], [])
            lanes.replace(str(place + 1), steps, losses)
        blocks.replace("blocks", *line)


def report_content(report: Mapping[str, Any]) -> Content:
    """Return title, advice and tables of a report."""
    parts: list[Content | tuple[str, str] | str] = [(f"{title_of(report)}\n\n", "bold")]
    parts += [f"{plain(line)}\n" for line in advice_lines(report)]
    for heading, table in tables_of(report):
        parts += [(f"\n{plain(heading, one_line=True)}\n", "bold"), f"{aligned(table)}\n"]
    parts += [f"\n{line}\n" for line in note_lines(report)]
    for place, one in enumerate(shown_answers(report), start=1):
        parts += [(f"\nPrompt {place}  ", "bold"), f"{one.prompt}\n"]
        for who, text, marks in one.said:
            parts += [(f"{who}  ", "bold"), (f"{marks}\n" if marks else "\n", "dim"), f"{text}\n"]
    if report["what"] == "race":
        names = ", ".join(f"lane {place}: {lane['name']}" for place, lane in enumerate(report["lanes"], start=1))
        parts.append(f"\n{plain(names, one_line=True)} (training loss below)\n")
    seconds = (report.get("cost") or {}).get("seconds")
    parts.append(f"\nmeasured in {number(seconds)} s" if isinstance(seconds, int | float) else "")
    return Content.assemble(*parts)


def aligned(table: Table) -> str:
    """Return a table as text, its columns below each other."""
    safe = [[plain(cell, one_line=True) for cell in row] for row in table]
    widths = [max(len(row[column]) for row in safe) for column in range(len(safe[0]))]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in safe)
    return "\n".join(row.rstrip() for row in rows)


def lane_curves(report: Mapping[str, Any]) -> list[tuple[list[float], list[float]]]:
    """Return the training losses of a race's lanes; nothing for other audits."""
    if report.get("what") != "race":
        return []
    return [_columns(lane.get("curve") or []) for lane in report["lanes"][:_MOST_LANES]]


def block_curve(report: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return a figure of each block by its place in the model; nothing where the report has none."""
    key = {"base": "own_effect", "run": "ratio"}.get(str(report.get("what")))
    found = []
    for block in report.get("blocks") or []:
        place, value = str(block["name"]).rpartition(".")[2], block.get(key)
        if key and place.isdigit() and value is not None:
            found.append((float(place), float(value)))
    return _columns(sorted(found))


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [float(x) for x, _ in points], [float(y) for _, y in points]
