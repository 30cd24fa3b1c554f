"""A line of text that takes letters only once it is being edited, alone or with a label before it."""

from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widgets import Input, Static

_BEGINS = ("enter", "f2")


class TextLine(Input):
    """An input with two states, so that letters do not end up in a line that has the focus only in passing.

    Not edited: every key means what it means elsewhere on the screen; enter, F2, a click or a paste begins to edit.
    Edited: letters are typed; enter accepts the text and posts `Submitted`, escape brings the text from before back,
    and leaving the line keeps what was typed.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Accept"),
        Binding("enter,f2", "edit", "Edit"),
        Binding("escape", "restore", "Cancel"),
    ]

    DEFAULT_CSS = """
    TextLine {
        &:focus { background: $foreground 14%; }
        & > .input--placeholder { color: $foreground 65%; }
        &.-editing, &.-editing:focus { background: $primary 30%; }
    }
    """

    editing: reactive[bool] = reactive(False)
    """Whether letters are typed into it."""

    class Left(Message):
        """The user went elsewhere while editing."""

        def __init__(self, value: str) -> None:
            """Carry the text as it was left."""
            super().__init__()
            self.value = value

    def __init__(self, value: str = "", **input_options: Any) -> None:
        """Hold `value`; options are those of `Input`."""
        super().__init__(value, compact=True, select_on_focus=False, **input_options)
        self._before = value

    def watch_editing(self, editing: bool) -> None:
        """Show the state, and other keys in the footer."""
        self.set_class(editing, "-editing")
        self._restart_blink()
        self.refresh_bindings()

    async def _on_key(self, event: events.Key) -> None:
        """Leave keys to the screen while not edited.

        The keys that begin and end the editing are handled here as well as by bindings. Letters are handled here, and
        where a slow line delivers several keys at once, bindings would act only after all of the letters.
        """
        if not self.editing:
            event.prevent_default()
            if event.key in _BEGINS and self.has_focus:
                event.stop()
                self.edit()
        elif event.key in ("enter", "escape"):
            event.prevent_default()
            event.stop()
            await (self.action_submit() if event.key == "enter" else self.action_restore())

    async def _on_mouse_down(self, event: events.MouseDown) -> None:
        """Begin to edit on a click, with the cursor at the end."""
        if not self.editing:
            self.edit()

    def _on_paste(self, event: events.Paste) -> None:
        """Let a paste into a line that is not edited replace its text."""
        if not self.editing:
            self.edit()
            self.action_select_all()

    def _on_blur(self, event: events.Blur) -> None:
        """End the editing when the line is left, but not when the whole terminal loses the focus."""
        if self.app.app_focus and self.editing:
            self.editing = False
            self.post_message(self.Left(self.value))

    def _restart_blink(self) -> None:
        """Show a cursor only while edited."""
        if self.editing:
            super()._restart_blink()
        else:
            self._pause_blink()

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Take letters only while edited."""
        return self.editing and super().check_consume_key(key, character)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Act on the keys of editing only while edited."""
        return self.editing != (action == "edit")

    def action_edit(self) -> None:
        """Begin to edit."""
        self.edit()

    async def action_submit(self) -> None:
        """Take the text."""
        self.editing = False
        await super().action_submit()

    async def action_restore(self) -> None:
        """Bring back the text from before the editing."""
        self.value, self.editing = self._before, False

    def edit(self) -> None:
        """Take the focus and begin to edit, with the cursor at the end."""
        if not self.has_focus:
            self.focus()
        self._before, self.editing = self.value, True
        self.cursor_position = len(self.value)


class TextField(Horizontal):
    """A label and a line. `Changed` is posted when the user has finished: enter, or leaving the line."""

    DEFAULT_CSS = """
    TextField {
        width: 1fr;
        height: 1;
        & > Static { height: 1; }
        & > TextLine { width: 1fr; height: 1; padding: 0; background: $foreground 6%; }
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
        """Show `label` and a line that holds `value`."""
        super().__init__(id=id, classes=classes)
        self._label, self._label_width = label, label_width
        self.set_reactive(TextField.value, value)

    def compose(self) -> ComposeResult:
        """Label, line."""
        label = Static(Content(self._label), markup=False)
        label.styles.width = self._label_width
        yield label
        yield TextLine(self.value)

    def watch_value(self, value: str) -> None:
        """Show a text that the program set."""
        if self.is_mounted and self.line.value != value:
            self.line.value = value

    def on_click(self) -> None:
        """Move the focus to the line on a click on the label."""
        if not self.line.has_focus:
            self.line.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take the text on enter."""
        event.stop()
        self._finish(event.value)

    def on_text_line_left(self, event: TextLine.Left) -> None:
        """Take the text on leaving the line in the middle of an edit; a line that is only passed stays as it is."""
        event.stop()
        self._finish(event.value)

    @property
    def line(self) -> TextLine:
        """Where the text is edited."""
        return self.query_one(TextLine)

    def _finish(self, text: str) -> None:
        if text != self.value:
            self.value = text
            self.post_message(self.Changed(self, text))
