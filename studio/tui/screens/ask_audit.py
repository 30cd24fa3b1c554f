"""Asks what an audit is to measure before it is started."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Button, Input, Static

from studio.core.text import plain
from studio.tui.audit_wishes import Wish
from studio.tui.screens.dialog import Dialog
from widgets.key_footer import KeyFooter
from widgets.text_field import TextLine


class AskAudit(Dialog[dict[str, str]]):
    """Closes with what was chosen, by field, or with None; r starts, the arrows go from line to line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "start", "Start"),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    DEFAULT_CSS = """
    AskAudit {
        & > Vertical { width: 76; }
        & .wish { height: 1; }
        & .wish Static { width: 36; }
        & .wish TextLine { width: 1fr; }
        & #audit-refused { color: $text-error; }
        & #audit-keys { height: 1; margin-top: 1; }
        & Button { margin-right: 2; }
    }
    """

    def __init__(self, title: str, wishes: Sequence[Wish], said: Mapping[str, str], *, refused: str = "") -> None:
        """Ask.

        Args:
            title: What is going to be measured.
            wishes: The choices.
            said: What was chosen the last time.
            refused: What was wrong with that.
        """
        super().__init__()
        self._title, self._wishes, self._said, self._refused = title, wishes, said, refused

    def compose(self) -> ComposeResult:
        """Title, a line for each choice, what starts it."""
        with Vertical():
            yield Static(Content(plain(self._title, one_line=True)), markup=False)
            yield Static("")
            for wish in self._wishes:
                with Horizontal(classes="wish"):
                    yield Static(wish.label, markup=False)
                    value = self._said.get(wish.key, wish.value)
                    yield TextLine(value, placeholder=wish.hint, id=f"wish-{wish.key}")
            if self._refused:
                yield Static(Content(plain(self._refused)), id="audit-refused", markup=False)
            with Horizontal(id="audit-keys"):
                yield Button("Start (r)", variant="primary", compact=True, id="audit-start")
                yield Button("Back (escape)", compact=True, id="audit-back")
            yield KeyFooter()

    def on_mount(self) -> None:
        """Stand on the start, so that enter takes all as it is; where something was refused, on the first line."""
        self.query_one("#audit-start").focus()
        if self._refused:
            self.query(TextLine).first().focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """A line is done: go on to the next, and from the last to the start."""
        event.stop()
        self.screen.focus_next()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Start, or go back."""
        event.stop()
        if event.button.id == "audit-start":
            self.action_start()
        else:
            self.action_leave()

    def action_start(self) -> None:
        """Close with the choices."""
        self.dismiss({wish.key: self.query_one(f"#wish-{wish.key}", TextLine).value.strip() for wish in self._wishes})
