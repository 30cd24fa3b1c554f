"""One of a few words in one row: label, then the options, or the chosen one between arrows where space is short."""

from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

_BEFORE, _AFTER = "◂ ", " ▸"
_OF_EDITING = ("accept", "edit", "restore")


class Choice(Widget, can_focus=True):
    """A choice between options. `Changed` is posted for the user's turns only.

    The arrows turn it at once. Enter begins to edit: the arrows turn, enter accepts that, and escape brings the option
    of before back.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "turn(-1)", "Before", show=False),
        Binding("right,space", "turn(1)", "Next", show=False),
        Binding("home", "turn_to(0)", "First", show=False),
        Binding("end", "turn_to(-1)", "Last", show=False),
        Binding("enter", "accept", "Accept"),
        Binding("enter", "edit", "Edit"),
        Binding("escape", "restore", "Cancel"),
    ]

    COMPONENT_CLASSES: ClassVar[set[str]] = {"choice--label", "choice--chosen", "choice--other", "choice--note"}

    DEFAULT_CSS = """
    Choice {
        width: 1fr;
        height: 1;
        & > .choice--chosen { text-style: bold; }
        & > .choice--other { color: $text-muted; }
        & > .choice--note { color: $text-muted; }
        &:focus {
            background: $foreground 10%;
            & > .choice--label { text-style: bold; }
            & > .choice--chosen { color: $accent; text-style: bold; }
        }
        &.-editing, &.-editing:focus { background: $primary 30%; }
    }
    """

    value: reactive[str] = reactive("")
    """The chosen option's value."""
    note: reactive[str] = reactive("")
    """A few words after the options."""
    editing: reactive[bool] = reactive(False)
    """Whether escape brings the option of before back."""

    class Changed(Message):
        """The user chose another option."""

        def __init__(self, choice: "Choice", value: str, *, step: bool) -> None:
            """Carry the new value, and whether it is one of several that an edit may come to."""
            super().__init__()
            self.choice = choice
            self.value = value
            self.step = step

        @property
        def control(self) -> "Choice":
            """The choice that was turned."""
            return self.choice

    def __init__(
        self,
        label: str,
        options: Sequence[tuple[str, str]],
        value: str,
        *,
        label_width: int = 16,
        id: str | None = None,  # noqa: A002  Textual's own name
        classes: str | None = None,
    ) -> None:
        """Offer `options`, each a value and what is shown for it.

        Raises:
            ValueError: There are no options.
        """
        if not options:
            raise ValueError("found no options; wanted at least one")
        super().__init__(id=id, classes=classes)
        self._label, self._label_width = label, label_width
        self._options = tuple(options)
        self._before = value
        self.set_reactive(Choice.value, value)

    def render_line(self, y: int) -> Strip:
        """Return the one row."""
        if y:
            return Strip.blank(self.size.width, self.rich_style)
        style = self.get_component_rich_style
        width = self._label_width
        segments = [Segment(self._label[:width].ljust(width), style("choice--label"))]
        for text, value in self._pieces():
            name = "chosen" if value == self.value else "other"
            segments.append(Segment(text, style(f"choice--{name}")))
        room, note = self.size.width - sum(segment.cell_length for segment in segments), f"  {self.note}".rstrip()
        cut = len(note) > room
        segments.append(Segment(f"{note[: max(0, room - 1)]}…" if cut else note, style("choice--note")))
        return Strip(segments).adjust_cell_length(self.size.width, self.rich_style)

    def _pieces(self) -> list[tuple[str, str]]:
        """Return the texts after the label, each with the value that a click on it chooses; empty for an arrow."""
        whole = [(f"({'•' if value == self.value else ' '}) {shown}  ", value) for value, shown in self._options]
        shown = dict(self._options).get(self.value)
        if shown is not None and sum(len(text) for text, _ in whole) <= self.size.width - self._label_width:
            return whole
        # A value that is no option, as a file may hold one, is shown until it is turned.
        shown = self.value if shown is None else shown
        return [(_BEFORE, ""), (shown, self.value), (_AFTER, "")]

    def on_click(self, event: events.Click) -> None:
        """Choose the clicked option; an arrow chooses the option before or after, a click elsewhere none."""
        position = event.x - self._label_width
        for text, value in self._pieces():
            if 0 <= position < cell_len(text):
                if value:
                    self._turn(value)
                else:
                    self.action_turn(-1 if text == _BEFORE else 1)
                return
            position -= cell_len(text)

    def watch_editing(self, editing: bool) -> None:
        """Show the state, and other keys in the footer."""
        self.set_class(editing, "-editing")
        self.refresh_bindings()

    def on_blur(self) -> None:
        """Stay with the option that the edit has come to."""
        self.editing = False

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Act on the keys of editing only while edited."""
        return self.editing != (action == "edit") if action in _OF_EDITING else True

    def action_edit(self) -> None:
        """Begin to edit."""
        self._before, self.editing = self.value, True

    def action_accept(self) -> None:
        """Stay with the option that the edit has come to."""
        self.editing = False

    def action_restore(self) -> None:
        """Go back to the option from before the editing."""
        self._turn(self._before)
        self.editing = False

    def action_turn(self, direction: int) -> None:
        """Choose the next option or the one before; after the last comes the first."""
        values = [value for value, _ in self._options]
        index = values.index(self.value) + direction if self.value in values else 0
        self._turn(values[index % len(values)])

    def action_turn_to(self, index: int) -> None:
        """Choose by place."""
        self._turn(self._options[index][0])

    def _turn(self, value: str) -> None:
        if value != self.value:
            self.value = value
            self.post_message(self.Changed(self, value, step=self.editing))
