"""A line plot that is fed point by point and repaints only the cells that changed."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from widgets.line_picture import REFERENCE_LOOK, Curve, LinePicture, Look, Reference
from widgets.plot_canvas import FRAME, CellRow

__all__ = ["Curve", "LinePlot", "Reference"]

_SIGNS: dict[Look, str] = {"line": "━━", "faint": "──", "dots": "●"}
_LEAST_FOR_LEGEND = 5


class LinePlot(Widget):
    """Several curves over one x range; the names of those that have points stand in a row above."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "line-plot--title",
        "line-plot--frame",
        "line-plot--reference",
        *(f"line-plot--{look}-{hue}" for look in ("hue", "faint") for hue in range(1, 5)),
    }

    DEFAULT_CSS = """
    LinePlot {
        width: 1fr;
        height: 1fr;
        & > .line-plot--title { text-style: bold; }
        & > .line-plot--frame { color: $text-muted; }
        & > .line-plot--reference { color: $text-warning; }
        & > .line-plot--hue-1 { color: $text-primary; }
        & > .line-plot--hue-2 { color: $text-accent; }
        & > .line-plot--hue-3 { color: $text-success; }
        & > .line-plot--hue-4 { color: $text-error; }
        & > .line-plot--faint-1 { color: $text-primary 45%; }
        & > .line-plot--faint-2 { color: $text-accent 45%; }
        & > .line-plot--faint-3 { color: $text-success 45%; }
        & > .line-plot--faint-4 { color: $text-error 45%; }
    }
    """

    x_total: reactive[float] = reactive(0.0, repaint=False)
    """Last x of the axis; 0 lets the axis grow with the data."""
    log_y: reactive[bool] = reactive(False, repaint=False)
    """Whether the y axis is logarithmic."""
    reference: reactive[Reference | None] = reactive[Reference | None](None, repaint=False)
    """A dashed horizontal line, or none."""
    empty: reactive[str] = reactive("Nothing yet.", repaint=False)
    """What is said in place of axes while no curve has a point; only characters that take one cell."""

    def __init__(
        self,
        curves: Sequence[Curve],
        *,
        title: str = "",
        x_label: str = "",
        from_zero: bool = False,
        id: str | None = None,  # noqa: A002  Textual's own name
        classes: str | None = None,
    ) -> None:
        """Prepare an empty plot.

        Args:
            curves: What can be drawn; their keys are what `extend` and `replace` take.
            title: The quantity and its unit: on the border where there is one, else first in the row of names.
            x_label: What x counts, written after the last tick.
            from_zero: Keep zero on the y axis.
            id: Widget id.
            classes: CSS classes.
        """
        super().__init__(id=id, classes=classes)
        self._curves = tuple(curves)
        self._title, self.border_title = title, title[:1].upper() + title[1:]
        self._picture = LinePicture(curves, x_label=x_label, from_zero=from_zero)
        self._looks: dict[int, Style] = {}
        self._rows: list[CellRow] = []
        self._strips: list[Strip] = []
        self._due = False
        self._held = False
        self._changes = 0
        self._drawn: tuple[int, int, int] | None = None

    def watch_x_total(self, total: float) -> None:
        """Draw the new range."""
        self._picture.x_total = total
        self._changed()

    def watch_log_y(self, log_y: bool) -> None:
        """Draw on the new scale, and name it: where values lie close together the curve looks the same on both."""
        self._picture.log_y = log_y
        self.border_title = self._told[:1].upper() + self._told[1:]
        self._changed()

    def watch_reference(self, reference: Reference | None) -> None:
        """Show or hide the dashed line."""
        self._picture.reference = reference
        self._changed()

    def watch_empty(self) -> None:
        """Say it, where there is nothing to draw."""
        self._changed()

    def render_line(self, y: int) -> Strip:
        """Return a row as it was last drawn."""
        if y < len(self._strips):
            return self._strips[y]
        return Strip.blank(self.size.width, self.rich_style)

    def notify_style_update(self) -> None:
        """Take the colours of a new theme."""
        super().notify_style_update()
        self._forget_drawing()
        self._draw_soon()

    def on_resize(self) -> None:
        """Draw for the new size at once, since the old strips do not fit it."""
        self._forget_drawing()
        self._redraw()

    def on_show(self) -> None:
        """Draw the points that came while the plot was out of sight."""
        self._draw_soon()

    def extend(self, key: str, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Append points to a curve.

        Raises:
            KeyError: No curve has this key.
            ValueError: `xs` and `ys` differ in length.
        """
        self._picture.extend(key, xs, ys)
        self._changed()

    def replace(self, key: str, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Give a curve new points instead of its old ones.

        Raises:
            KeyError: No curve has this key.
            ValueError: `xs` and `ys` differ in length.
        """
        self._picture.clear(key)
        self.extend(key, xs, ys)

    def hold(self, held: bool) -> None:
        """Draw nothing while held, as long as more points are known to come; draw them all on release."""
        if held != self._held:
            self._held = held
            self._draw_soon()

    def _forget_drawing(self) -> None:
        self._rows, self._strips, self._looks, self._drawn = [], [], {}, None

    def _changed(self) -> None:
        self._changes += 1
        self._draw_soon()

    def _draw_soon(self) -> None:
        """Draw once after all messages that are waiting, however many points they bring."""
        if not self._due and not self._held and self.is_mounted:
            self._due = True
            self.call_later(self._redraw)

    def _redraw(self) -> None:
        """Draw, and repaint only the spans that differ from the last drawing; draw nothing while out of sight."""
        self._due = False
        width, height = self.size
        if width < 1 or height < 1 or not self.is_attached or not self.region:
            return
        if self._drawn == (width, height, self._changes):  # at the start several events ask for the same drawing
            return
        self._drawn = (width, height, self._changes)
        legend = [self._legend(width)] if height >= _LEAST_FOR_LEGEND else []
        before, rows = self._rows, height - len(legend)
        self._rows = self._picture.rows(width, rows) if self._has_points else _words(self.empty, width, rows)
        # Another number of rows, as at the first drawing, leaves nothing to compare with.
        if len(before) != len(self._rows):
            self._strips = [*legend, *map(self._strip, self._rows)]
            self.refresh()
            return
        changed = [Region(0, 0, width, 1)] if legend and legend[0] != self._strips[0] else []
        self._strips[: len(legend)] = legend
        for y, (old, new) in enumerate(zip(before, self._rows, strict=True), start=len(legend)):
            span = new.changed_span(old)
            if span is not None:
                self._strips[y] = self._strip(new)
                changed.append(Region(span[0], y, span[1] - span[0], 1))
        if changed:
            self.refresh(*changed)

    @property
    def _told(self) -> str:
        """The title, with the kind of axis where it is not the usual one."""
        return ", ".join(filter(None, (self._title, "log axis" if self.log_y else "")))

    @property
    def _has_points(self) -> bool:
        return any(self._picture.has_points(curve.key) for curve in self._curves)

    def _strip(self, row: CellRow) -> Strip:
        return Strip([Segment(text, self._style(look)) for text, look in row.runs()], len(row.text))

    def _legend(self, width: int) -> Strip:
        segments = [Segment("" if self.gutter.top else self._told, self.get_component_rich_style("line-plot--title"))]
        for curve in self._curves:
            if self._picture.has_points(curve.key):
                sign = Segment(f"  {_SIGNS[curve.look]} ", self._style(curve.cell_look))
                segments += [sign, self._named(curve.label)]
        if self.reference is not None:
            segments += [Segment("  ╌╌ ", self._style(REFERENCE_LOOK)), self._named(self.reference.label)]
        length = sum(cell_len(segment.text) for segment in segments)
        return Strip(segments, length).adjust_cell_length(width, self.rich_style)

    def _named(self, label: str) -> Segment:
        return Segment(label, self.rich_style)

    def _style(self, look: int) -> Style:
        """Return the style of a look, never None: Textual's monochrome filter fails on a segment without a style."""
        if look not in self._looks:
            names = {FRAME: "frame", REFERENCE_LOOK: "reference"}
            name = names.get(look) or (f"hue-{look}" if look <= 4 else f"faint-{look - 4}")
            self._looks[look] = self.get_component_rich_style(f"line-plot--{name}")
        return self._looks[look]


def _words(text: str, width: int, height: int) -> list[CellRow]:
    """Return words in the middle of `height` rows: axes without a point would look like a curve that lies at an end."""
    lines = textwrap.wrap(text, max(1, width - 2))[:height]
    top = (height - len(lines)) // 2
    texts = [""] * top + [line.center(width) for line in lines] + [""] * (height - top - len(lines))
    return [CellRow(text.ljust(width), bytes([FRAME]) * width) for text in texts]
