"""A number in one row: label, track, value. Turned by keys, mouse and typing."""

import math
from collections.abc import Callable
from typing import ClassVar

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from widgets.scale import Scale

_CHARACTERS = (
    *((digit, digit) for digit in "0123456789"),
    ("full_stop", "."),
    ("e", "e"),
    ("E", "E"),
    ("plus", "+"),
    ("minus", "-"),
    ("underscore", "_"),
)
"""Keys with which a number is typed, by Textual's names. All are bindings: where a slow line delivers several keys
together, a key that a handler takes comes before the bindings of the keys typed before it."""
_BEGINS = frozenset("0123456789.")
_WHILE_EDITED = ("take_typed", "forget_typed", "untype")
_LEAST_TRACK = 5
_LEFT_BUTTON = 1


class Slider(Widget, can_focus=True):
    """A value on a scale. `Changed` is posted for the user's turns only, never for a value set by the program.

    The arrows turn it at once. Enter begins to edit: a value can be typed, and arrows and wheel turn; enter accepts
    that, and escape brings the value of before back. A digit begins to edit, too.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "turn(-1)", "Less", show=False),
        Binding("right", "turn(1)", "More", show=False),
        Binding("shift+left,pagedown", "turn_coarse(-1)", "Much less", show=False),
        Binding("shift+right,pageup", "turn_coarse(1)", "Much more", show=False),
        Binding("home", "turn_to_end(-1)", "Least", show=False),
        Binding("end", "turn_to_end(1)", "Most", show=False),
        Binding("enter", "take_typed", "Accept"),
        Binding("enter", "edit", "Edit"),
        Binding("escape", "forget_typed", "Cancel"),
        Binding("backspace", "untype", "Undo the last character", show=False),
        *(Binding(key, f"type('{character}')", character, show=False) for key, character in _CHARACTERS),
    ]

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "slider--label",
        "slider--filled",
        "slider--thumb",
        "slider--empty",
        "slider--value",
        "slider--note",
        "slider--refused",
    }

    DEFAULT_CSS = """
    Slider {
        width: 1fr;
        height: 1;
        & > .slider--filled { color: $primary; }
        & > .slider--thumb { color: $primary; text-style: bold; }
        & > .slider--empty { color: $foreground 25%; }
        & > .slider--value { text-style: bold; }
        & > .slider--note { color: $text-muted; }
        & > .slider--refused { color: $text-error; text-style: bold; }
        &:focus {
            background: $foreground 10%;
            & > .slider--label { text-style: bold; }
            & > .slider--thumb { color: $accent; }
            & > .slider--filled { color: $accent; }
        }
    }
    """

    value: reactive[float] = reactive(0.0)
    """Where the slider stands."""
    note: reactive[str] = reactive("")
    """A few words after the value."""
    typed: reactive[str | None] = reactive[str | None](None)
    """What the user has typed so far, empty when an edit has just begun, or None while it is not edited."""

    class Changed(Message):
        """The user turned the slider."""

        def __init__(self, slider: "Slider", value: float, *, step: bool) -> None:
            """Carry the new value, and whether it was turned to by a step or a drag rather than typed."""
            super().__init__()
            self.slider = slider
            self.value = value
            self.step = step

        @property
        def control(self) -> "Slider":
            """The slider that was turned."""
            return self.slider

    def __init__(
        self,
        label: str,
        scale: Scale,
        value: float,
        *,
        whole: bool = False,
        show: Callable[[float], str] = "{:g}".format,
        label_width: int = 16,
        value_width: int = 9,
        id: str | None = None,  # noqa: A002  Textual's own name
        classes: str | None = None,
    ) -> None:
        """Stand at `value`.

        Args:
            label: Name before the track.
            scale: Stops and the ends for typing.
            value: First value; may lie between two stops.
            whole: Refuse a typed value with a fraction.
            show: Turns a value into its text.
            label_width: Cells for the label, so that sliders below each other line up.
            value_width: Cells for the value.
            id: Widget id.
            classes: CSS classes.
        """
        super().__init__(id=id, classes=classes)
        self.scale = scale
        self._label, self._whole, self._show = label, whole, show
        self._label_width, self._value_width = label_width, value_width
        self._refused = self._dragged = False
        self._before = value
        self.set_reactive(Slider.value, value)  # calls no watcher and paints nothing: there is no screen yet

    def render_line(self, y: int) -> Strip:
        """Return the one row."""
        if y:
            return Strip.blank(self.size.width, self.rich_style)
        style = self.get_component_rich_style
        begin, length = self._track()
        thumb = round(self.scale.fraction(self.value) * (length - 1)) if length else 0
        segments = [Segment(self._label[:begin].ljust(begin), style("slider--label"))]
        if length:
            segments += [
                Segment("━" * thumb, style("slider--filled")),
                Segment("●", style("slider--thumb")),
                Segment("─" * (length - thumb - 1), style("slider--empty")),
                Segment(" ", self.rich_style),
            ]
        if self.typed is None:
            value, name, note = self._show(self.value), "value", self.note
        else:
            value, name = f"{self.typed or self._show(self.value)}▏", "refused" if self._refused else "value"
            note = f"{self._show(self.scale.low)} to {self._show(self.scale.high)}"
        segments.append(Segment(value.ljust(self._value_width), style(f"slider--{name}")))
        segments.append(Segment(note, style("slider--note")))
        return Strip(segments).adjust_cell_length(self.size.width, self.rich_style)

    def _track(self) -> tuple[int, int]:
        """Return where the track begins and how many cells it has; 0 cells where the row is too narrow for one."""
        note_width = max(0, min(24, self.size.width // 4))
        length = self.size.width - self._label_width - self._value_width - note_width - 1
        return self._label_width, length if length >= _LEAST_TRACK else 0

    def on_blur(self) -> None:
        """Drop a half-typed value."""
        self.typed = None

    def watch_typed(self, before: str | None, typed: str | None) -> None:
        """Show other keys in the footer while it is edited."""
        if (before is None) != (typed is None):
            self.refresh_bindings()

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Jump to the mouse on the track and follow it; a click beside the track does nothing."""
        begin, length = self._track()
        if event.button == _LEFT_BUTTON and begin <= event.x < begin + length:
            self._dragged, self.typed = True, None
            self.capture_mouse()  # so that the drag is followed beyond the widget too
            self._turn_to_cell(event.x)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Follow a drag, also beyond the ends of the track."""
        if self._dragged:
            self._turn_to_cell(event.x)

    def on_mouse_up(self) -> None:
        """End a drag."""
        if self._dragged:
            self._dragged = False
            self.release_mouse()

    def on_mouse_release(self) -> None:
        """Something else took the mouse: the drag is over."""
        self._dragged = False

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Turn up while edited; otherwise the wheel scrolls the container of the slider."""
        if self.typed is not None:
            event.stop()
            self.action_turn(1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Turn down while edited."""
        if self.typed is not None:
            event.stop()
            self.action_turn(-1)

    def check_consume_key(self, key: str, character: str | None) -> bool:
        """Keep letters from starting anything while it is edited."""
        return self.typed is not None and character is not None and character.isprintable()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Act on the keys of editing only while edited."""
        if self.typed is None:
            return action not in _WHILE_EDITED and (action != "type" or parameters[0] in _BEGINS)
        return action != "edit"

    def action_turn(self, stops: int) -> None:
        """Turn by stops; not once a value is being typed."""
        if not self.typed:
            self._turn(self.scale.turned(self.value, stops))

    def action_turn_coarse(self, direction: int) -> None:
        """Turn by a fifth of all stops."""
        self.action_turn(direction * self.scale.coarse)

    def action_turn_to_end(self, direction: int) -> None:
        """Turn to the first or the last stop; not once a value is being typed."""
        if not self.typed:
            self._turn(self.scale.stops[-1 if direction > 0 else 0])

    def action_edit(self) -> None:
        """Begin to edit."""
        self._before, self.typed, self._refused = self.value, "", False

    def action_type(self, character: str) -> None:
        """Type a character; the first one begins to edit."""
        if self.typed is None:
            self.action_edit()
        self.typed, self._refused = (self.typed or "") + character, False

    def action_untype(self) -> None:
        """Take the last character back."""
        self.typed, self._refused = (self.typed or "")[:-1], False

    def action_forget_typed(self) -> None:
        """Go back to the value from before the editing."""
        self.typed = None
        self._turn(self._before)

    def action_take_typed(self) -> None:
        """Turn to the typed value; one outside the limits stays on show, marked as refused, beside the limits."""
        text = (self.typed or "").replace("_", "")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        sound = self.scale.low <= value <= self.scale.high and not (self._whole and value != int(value))
        if not text:
            self.typed = None
        elif sound:
            self.typed = None
            self._turn(value, step=False)
        else:
            self._refused = True
            self.refresh()
            self.app.bell()

    def _turn_to_cell(self, x: int) -> None:
        begin, length = self._track()
        if length > 1:
            self._turn(self.scale.nearest((x - begin) / (length - 1)))

    def _turn(self, value: float, *, step: bool = True) -> None:
        if value != self.value:
            self.value = value
            self.post_message(self.Changed(self, value, step=step))
