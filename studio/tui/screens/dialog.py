"""What every dialog shares: a box in the middle of the screen it stands on, and escape."""

from typing import ClassVar, TypeVar

from textual.binding import Binding, BindingType
from textual.screen import ModalScreen

Answer = TypeVar("Answer")


class Dialog(ModalScreen[Answer]):
    """Closes with an answer, or with None after escape. Its one child is the box."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Back")]

    DEFAULT_CSS = """
    Dialog {
        align: center middle;
        & > Vertical, & > VerticalScroll {
            width: 72;
            max-width: 95%;
            height: auto;
            max-height: 100%;
            padding: 1 2;
            border: round $primary;
            background: $surface;
        }
        & Static { height: auto; }
    }
    """

    def action_leave(self) -> None:
        """Close without an answer."""
        self.dismiss(None)
