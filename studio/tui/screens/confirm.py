"""One question, answered by a key."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from studio.core.text import plain
from studio.runs.checkpoints import NoWholeCheckpoint
from studio.tui.screens.dialog import Dialog


def start_over_question(error: NoWholeCheckpoint) -> str:
    """Return what to ask where going on would mean to start over."""
    found = plain(error.found, one_line=True)
    return f"{found[:1].upper()}{found[1:]}. Start over at step 0? What is damaged stays beside it."


class Confirm(Dialog[bool]):
    """Asks once; `y` is yes, `n` or escape is no. Enter is neither: what was typed ahead must not delete anything."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "agree", "Yes"),
        Binding("n,q", "leave", "No"),
    ]

    DEFAULT_CSS = """
    Confirm > Vertical { width: 64; border: round $warning; }
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

    def action_agree(self) -> None:
        """Close with a yes; without one it is a no."""
        self.dismiss(True)
