"""A stack of parts against a capacity: in one row beside its figures, or in several with range and legend."""

from typing import ClassVar

from rich.segment import Segment
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from widgets.gauge_picture import PATTERNS, Part, Reading, Run, bar, headline, legend, whisker

__all__ = ["Gauge", "Part", "Reading"]

_LEAST_BAR = 12
_LOOKS = ("free", "line", "over", "note", "strong", "good", "doubtful", "bad")


class Gauge(Widget):
    """Shows a reading. Repaints only when the reading changes.

    A gauge of one row holds the stack and its figures. From two rows on the figures are above the stack, from three on
    the range is below it, and further rows name the parts.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        *(f"gauge--part-{number}" for number in range(1, len(PATTERNS) + 1)),
        *(f"gauge--{look}" for look in _LOOKS),
    }

    DEFAULT_CSS = """
    Gauge {
        width: 1fr;
        height: 6;
        & > .gauge--part-1 { color: $text-primary; }
        & > .gauge--part-2 { color: $text-accent; }
        & > .gauge--part-3 { color: $text-success; }
        & > .gauge--part-4 { color: $text-warning; }
        & > .gauge--part-5 { color: $text-secondary; }
        & > .gauge--part-6 { color: $text-primary; }
        & > .gauge--part-7 { color: $text-muted; }
        & > .gauge--free { color: $foreground 25%; }
        & > .gauge--line { color: $text-error; text-style: bold; }
        & > .gauge--over { color: $text-error; text-style: reverse; }
        & > .gauge--note { color: $text-muted; }
        & > .gauge--strong { text-style: bold; }
        & > .gauge--good { color: $text-success; text-style: bold; }
        & > .gauge--doubtful { color: $text-warning; text-style: bold; }
        & > .gauge--bad { color: $text-error; text-style: bold reverse; }
    }
    """

    reading: reactive[Reading] = reactive(Reading())
    """What is shown."""

    def __init__(
        self,
        *,
        unit: str = "",
        label: str = "",
        id: str | None = None,  # noqa: A002  Textual's own name
        classes: str | None = None,
    ) -> None:
        """Start empty.

        Args:
            unit: Unit of all values.
            label: Name before the stack where the gauge is one row.
            id: Widget id.
            classes: CSS classes.
        """
        super().__init__(id=id, classes=classes)
        self._unit, self._label = unit, label

    def render_line(self, y: int) -> Strip:
        """Return a row."""
        width, height = self.size
        runs = self._one_row(width) if height == 1 else self._row(y, width)
        segments = [Segment(text, self.get_component_rich_style(f"gauge--{look}")) for text, look in runs if text]
        return Strip(segments).adjust_cell_length(width, self.rich_style)

    def _one_row(self, width: int) -> list[Run]:
        """Return label, stack and figures; where space is short, the figures are shortened before the stack."""
        name = f"{self._label} " if self._label else ""
        if not self.reading.parts:
            return [(name, "strong"), *headline(self.reading, self._unit, max(0, width - len(name)))]
        figures = headline(self.reading, self._unit, max(0, width - len(name) - _LEAST_BAR - 1))
        length = width - len(name) - 1 - sum(len(text) for text, _ in figures)
        stack = bar(self.reading, length) if length > 0 else []
        return [(name, "strong"), *stack, (" ", "note"), *figures]

    def _row(self, y: int, width: int) -> list[Run]:
        if y == 0:
            return headline(self.reading, self._unit, width)
        if not self.reading.parts or width < 1:
            return []
        if y == 1:
            return bar(self.reading, width)
        if y == 2:
            return whisker(self.reading, width)
        rows = legend(self.reading, width)
        return rows[y - 3] if y - 3 < len(rows) else []
