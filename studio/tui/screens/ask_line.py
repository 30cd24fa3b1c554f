"""Asks for a line: a file name, a note."""

from collections.abc import Callable

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.tui.screens.dialog import Dialog


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
        """Question, field, refusal, hint."""
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
