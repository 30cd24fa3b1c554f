"""One figure in one row: label, value, unit."""

from typing import ClassVar

from rich.segment import Segment
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget


class Stat(Widget):
    """A label, a value and its unit. Repaints only when the value changes."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"stat--label", "stat--value", "stat--unit"}

    DEFAULT_CSS = """
    Stat {
        width: 1fr;
        height: 1;
        & > .stat--label { color: $text-muted; }
        & > .stat--value { text-style: bold; }
        & > .stat--unit { color: $text-muted; }
    }
    """

    value: reactive[str] = reactive("-")
    """The figure as it is shown; words are fine."""

    def __init__(self, label: str, unit: str = "", *, id: str | None = None, classes: str | None = None) -> None:  # noqa: A002
        """Show `label`, then the value, then `unit`."""
        super().__init__(id=id, classes=classes)
        self._label, self._unit = label, unit

    def render_line(self, y: int) -> Strip:
        """Return the one row."""
        parts = [(self._label, "label"), (self.value, "value"), (self._unit, "unit")]
        segments: list[Segment] = []
        for text, name in parts if y == 0 else []:
            if text:
                style = self.get_component_rich_style(f"stat--{name}")
                segments += [Segment(" ", self.rich_style)] if segments else []
                segments.append(Segment(text, style))
        return Strip(segments).adjust_cell_length(self.size.width, self.rich_style)

    def get_content_width(self, container: object, viewport: object) -> int:
        """Return the cells that label, value and unit take."""
        return len(" ".join(part for part in (self._label, self.value, self._unit) if part))
