"""A head in one row that shows or hides what stands below it. It hides nothing itself, but posts what is wanted."""

from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget


class Fold(Widget, can_focus=True):
    """A name, an arrow and a few words. `Turned` is posted when the user opens or closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,space", "turn(True)", "Open"),
        Binding("enter,space", "turn(False)", "Close"),
        Binding("right", "turn(True)", "Open", show=False),
        Binding("left", "turn(False)", "Close", show=False),
    ]

    COMPONENT_CLASSES: ClassVar[set[str]] = {"fold--name", "fold--words"}

    DEFAULT_CSS = """
    Fold {
        width: 1fr;
        height: 1;
        & > .fold--name { color: $text-primary; text-style: bold; }
        & > .fold--words { color: $text-muted; }
        &:focus {
            background: $foreground 10%;
            & > .fold--name { color: $accent; text-style: bold; }
        }
    }
    """

    open: reactive[bool] = reactive(False)
    """Whether what stands below is shown."""
    name_shown: reactive[str] = reactive("")
    """What stands below."""
    words: reactive[str] = reactive("")
    """A few words on it."""

    class Turned(Message):
        """The user opened or closed it."""

        def __init__(self, fold: "Fold", wanted: bool) -> None:
            """Carry whether it is to be open."""
            super().__init__()
            self.fold, self.wanted = fold, wanted

        @property
        def control(self) -> "Fold":
            """The head that was turned."""
            return self.fold

    def render_line(self, y: int) -> Strip:
        """Return the one row; what does not fit ends in a dot too many."""
        if y:
            return Strip.blank(self.size.width, self.rich_style)
        name = f"{'▾' if self.open else '▸'} {self.name_shown}"
        room = max(0, self.size.width - len(name) - 2)
        words = self.words if len(self.words) <= room else f"{self.words[: max(0, room - 1)]}…"
        style = self.get_component_rich_style
        segments = [Segment(name, style("fold--name")), Segment(f"  {words}", style("fold--words"))]
        return Strip(segments).adjust_cell_length(self.size.width, self.rich_style)

    def watch_open(self) -> None:
        """Show another key in the footer."""
        self.refresh_bindings()

    def on_click(self, event: events.Click) -> None:
        """Turn it."""
        event.stop()
        self.action_turn(not self.open)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Open only what is closed, and close only what is open."""
        return parameters[0] != self.open if action == "turn" else True

    def action_turn(self, wanted: bool) -> None:
        """Ask for it to be open or closed."""
        self.post_message(self.Turned(self, wanted))
