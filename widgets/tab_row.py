"""Names of views in one row, one of them current. It shows no view itself, but posts which one is wanted."""

from collections.abc import Sequence
from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget


class TabRow(Widget):
    """A row of names; a click asks for a view with `Wanted`."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"tab-row--current", "tab-row--other"}

    DEFAULT_CSS = """
    TabRow {
        width: 1fr;
        height: 1;
        & > .tab-row--current { text-style: bold reverse; }
        & > .tab-row--other { color: $text-muted; }
    }
    """

    current: reactive[str] = reactive("")
    """Key of the current view."""
    names: reactive[tuple[tuple[str, str], ...]] = reactive[tuple[tuple[str, str], ...]](())
    """Each view's key and what is shown for it, in order."""

    class Wanted(Message):
        """The user asks for another view."""

        def __init__(self, row: "TabRow", key: str) -> None:
            """Carry the key of the view."""
            super().__init__()
            self.row = row
            self.key = key

        @property
        def control(self) -> "TabRow":
            """The row that was clicked."""
            return self.row

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        current: str,
        *,
        id: str | None = None,  # noqa: A002  Textual's own name
        classes: str | None = None,
    ) -> None:
        """Show `names`, each a key and a name."""
        super().__init__(id=id, classes=classes)
        self.set_reactive(TabRow.names, tuple(names))
        self.set_reactive(TabRow.current, current)

    def render_line(self, y: int) -> Strip:
        """Return the one row."""
        segments = []
        for key, name in self.names if y == 0 else ():
            look = "current" if key == self.current else "other"
            segments.append(Segment(f" {name} ", self.get_component_rich_style(f"tab-row--{look}")))
            segments.append(Segment(" ", self.rich_style))
        return Strip(segments).adjust_cell_length(self.size.width, self.rich_style)

    def on_click(self, event: events.Click) -> None:
        """Ask for the view under the mouse."""
        position = event.x
        for key, name in self.names:
            if 0 <= position < len(name) + 2:
                self.post_message(self.Wanted(self, key))
                return
            position -= len(name) + 3
