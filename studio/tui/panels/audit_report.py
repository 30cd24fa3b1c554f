"""An audit's report on a screen: what it advises, its tables, and a plot of what it measured along the way."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from textual.app import ComposeResult
from textual.containers import ScrollableContainer, Vertical
from textual.content import Content
from textual.widgets import Static

from studio.core.audit_tables import Table
from studio.core.audit_text import DAMAGED, advice_lines, note_lines, shown_answers, tables_of, title_of
from studio.core.text import plain
from studio.tui.readable import number
from widgets.line_picture import Hue
from widgets.line_plot import Curve, LinePlot

_MOST_LANES = 4
_PARTS = ("advice", "tables", "notes")
_UNREADABLE = (
    "This report is damaged, or of another version of this program: its page is report.md in the run's folder."
)


class AuditReport(Vertical):
    """Words and tables above, a plot below. Everything in a report came from files, so nothing is read as markup.

    Words are wrapped. Tables keep their width, and the arrows scroll to the rest of them.
    """

    DEFAULT_CSS = """
    AuditReport {
        & #audit-words { height: 2fr; padding: 0 1; }
        & #audit-words Static { width: 1fr; height: auto; }
        & #audit-words #audit-tables { width: auto; }
        & #audit-plot { height: 1fr; padding: 0 1; display: none; }
        & #audit-plot.-shown { display: block; }
    }
    """

    def compose(self) -> ComposeResult:
        """Make the parts: advice, tables, notes and answers to scroll through; below them the place of a plot."""
        with ScrollableContainer(id="audit-words"):
            for part in _PARTS:
                yield Static("", markup=False, id=f"audit-{part}")
        yield Vertical(id="audit-plot")

    @property
    def longer(self) -> bool:
        """Whether the words are longer than their place."""
        return self.query_one("#audit-words", ScrollableContainer).max_scroll_y > 0

    def turn(self, pages: int) -> None:
        """Scroll a page down, or up where it is negative."""
        words = self.query_one("#audit-words", ScrollableContainer)
        words.scroll_relative(y=pages * words.scrollable_content_region.height, animate=False)

    def show(self, report: Mapping[str, Any] | None, otherwise: str = "") -> None:
        """Show a report, or a few words where there is none."""
        parts = {"advice": Content(plain(otherwise))}
        plot = None
        if report:
            try:
                parts, plot = report_content(report), report_plot(report)
            except DAMAGED:
                parts = {"advice": Content(_UNREADABLE)}
        for part in _PARTS:
            self.query_one(f"#audit-{part}", Static).update(parts.get(part, ""))
        self.query_one("#audit-words").scroll_home(animate=False)
        holder = self.query_one("#audit-plot")
        holder.remove_children()
        holder.set_class(plot is not None, "-shown")
        if plot is not None:
            holder.mount(plot)


def report_content(report: Mapping[str, Any]) -> dict[str, Content]:
    """Return title and advice, tables, and notes with answers, of a report."""
    advice: list[Content | tuple[str, str] | str] = [(f"{title_of(report)}\n\n", "bold")]
    advice += [f"{plain(line)}\n" for line in advice_lines(report)]
    tables: list[Content | tuple[str, str] | str] = []
    for heading, table in tables_of(report):
        tables += [(f"{plain(heading, one_line=True)}\n", "bold"), f"{aligned(table)}\n\n"]
    notes: list[Content | tuple[str, str] | str] = [f"{line}\n" for line in note_lines(report)]
    for place, one in enumerate(shown_answers(report), start=1):
        notes += [(f"\nPrompt {place}  ", "bold"), f"{one.prompt}\n"]
        for who, text, marks in one.said:
            notes += [(plain(who, one_line=True), "bold"), (f"  {marks}\n" if marks else "\n", "dim"), f"{text}\n"]
    seconds = (report.get("cost") or {}).get("seconds")
    notes.append(f"\nmeasured in {number(seconds)} s" if isinstance(seconds, int | float) else "")
    parts = {"advice": advice, "tables": tables, "notes": notes}
    return {name: Content.assemble(*part) for name, part in parts.items()}


def report_plot(report: Mapping[str, Any]) -> LinePlot | None:
    """Return a plot of a report: the training losses of a race, else one figure for each block; None without either."""
    if lanes := lane_curves(report):
        names = [plain(str(lane["name"]), one_line=True, limit=30) for lane in report["lanes"]]
        curves = [Curve(str(place), names[place], hue=cast(Hue, place + 1)) for place in range(len(lanes))]
        plot = LinePlot(curves, title="training loss", x_label="step")
        for place, points in enumerate(lanes):
            plot.extend(str(place), *points)
        plot.x_total = max((steps[-1] for steps, _ in lanes if steps), default=0.0)
        return plot
    places, values = block_curve(report)
    if not places:
        return None
    asked = plain(str(report.get("asked", "")), one_line=True, limit=30)
    title = f"effect of {asked} alone on the hidden state" if report["what"] == "base" else "rounding error / adapter"
    plot = LinePlot([Curve("blocks", "block by block", hue=1)], title=title, x_label="block", from_zero=True)
    plot.extend("blocks", places, values)
    plot.x_total = places[-1]
    return plot


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
