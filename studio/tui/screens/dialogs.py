"""What every dialog shares, and the two that many screens ask with: for a yes, and for a line of text."""

from collections.abc import Callable
from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.checkpoints import NoWholeCheckpoint

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


def start_over_question(error: NoWholeCheckpoint) -> str:
    """Return the question for a run that can only be resumed from its start."""
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
        """Make the parts: question, keys."""
        with Vertical():
            yield Static(self._question, markup=False)
            yield Static(Content.assemble("\n", (" y ", "reverse"), f" {self._yes}   ", (" n ", "reverse"), " no"))

    def action_agree(self) -> None:
        """Close with a yes."""
        self.dismiss(True)


class AskLine(Dialog[str]):
    """Closes with what was typed, once `check` has nothing against it, or with None after escape."""

    DEFAULT_CSS = """
    AskLine #refused { color: $text-error; }
    """

    def __init__(self, question: str, value: str, *, hint: str = "", check: Callable[[str], object]) -> None:
        """Ask; `value` is what Enter takes unless something else is typed.

        Args:
            question: What the line is for.
            value: The first text.
            hint: More words below.
            check: Raises StudioError where the text will not do.
        """
        super().__init__()
        self._question, self._value, self._hint, self._check = question, value, hint, check

    def compose(self) -> ComposeResult:
        """Make the parts: question, field, refusal, hint."""
        with Vertical() as box:
            box.border_subtitle = "⏎ take it  esc back"
            yield Static(Content(self._question), markup=False)
            yield Input(self._value, compact=True)
            yield Static("", id="refused", markup=False)
            yield Static(Content(plain(self._hint)), markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Close, or say what is wrong with it."""
        event.stop()
        try:
            self._check(event.value)
        except StudioError as error:
            self.query_one("#refused", Static).update(plain(str(error)))
        else:
            self.dismiss(event.value)
