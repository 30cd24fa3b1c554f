"""One question, answered by a key."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static


class Confirm(ModalScreen[bool]):
    """Asks once; `y` or enter is yes, `n` or escape is no."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "answer(True)", "Yes"),
        Binding("n,escape,q", "answer(False)", "No"),
    ]

    DEFAULT_CSS = """
    Confirm {
        align: center middle;
        & > Vertical {
            width: 64;
            max-width: 90%;
            height: auto;
            padding: 1 2;
            border: round $warning;
            background: $surface;
        }
        & Static { height: auto; }
    }
    """

    def __init__(self, question: Content, yes: str) -> None:
        """Ask a question; `yes` says what yes does."""
        super().__init__()
        self._question, self._yes = question, yes

    def compose(self) -> ComposeResult:
        """Question, keys."""
        with Vertical():
            yield Static(self._question, markup=False)
            yield Static(Content.assemble("\n", (" y ", "reverse"), f" {self._yes}   ", (" n ", "reverse"), " no"))

    def action_answer(self, answer: bool) -> None:
        """Close with the answer."""
        self.dismiss(answer)
