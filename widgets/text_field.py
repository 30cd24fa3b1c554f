"""A labelled line of text in one row."""

from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widgets import Input, Static


class TextField(Horizontal):
    """A label and an input. `Changed` is posted when the user has finished: enter, or leaving the field."""

    DEFAULT_CSS = """
    TextField {
        width: 1fr;
        height: 1;
        & > Static { height: 1; }
        & > Input { width: 1fr; height: 1; padding: 0; background: $foreground 6%; }
        & > Input:focus { background: $foreground 14%; }
    }
    """

    value: reactive[str] = reactive("")
    """The text that was last finished."""

    class Changed(Message):
        """The user finished another text."""

        def __init__(self, field: "TextField", value: str) -> None:
            """Carry the new text."""
            super().__init__()
            self.field = field
            self.value = value

        @property
        def control(self) -> "TextField":
            """The field that was changed."""
            return self.field

    def __init__(
        self,
        label: str,
        value: str,
        *,
        label_width: int = 16,
        id: str | None = None,  # noqa: A002  Textual's own name
        classes: str | None = None,
    ) -> None:
        """Show `label` and an input that holds `value`."""
        super().__init__(id=id, classes=classes)
        self._label, self._label_width = label, label_width
        self.set_reactive(TextField.value, value)

    def compose(self) -> ComposeResult:
        """Label, input."""
        label = Static(Content(self._label), markup=False)
        label.styles.width = self._label_width
        yield label
        yield Input(self.value, compact=True)

    def watch_value(self, value: str) -> None:
        """Show a text that the program set."""
        if self.is_mounted and self.query_one(Input).value != value:
            self.query_one(Input).value = value

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take the text on enter."""
        event.stop()
        self._finish(event.value)

    def on_descendant_blur(self, _: events.DescendantBlur) -> None:
        """Take the text on leaving."""
        self._finish(self.query_one(Input).value)

    def _finish(self, text: str) -> None:
        if text != self.value:
            self.value = text
            self.post_message(self.Changed(self, text))
