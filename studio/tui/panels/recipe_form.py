"""All fields of a recipe, each in one row: sliders, choices, texts."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from studio.core.preferences import advised_rate, rate_note, takes_pairs
from studio.core.recipe import FIELDS, SECTIONS, Recipe, choices_of
from studio.core.text import plain
from studio.core.value_kinds import Number, Switch
from studio.tui.readable import setting
from widgets.choice import Choice
from widgets.scale import stops_scale
from widgets.slider import Slider
from widgets.text_field import TextField, TextLine

SHOWN = {"lora": "LoRA 16-bit", "qlora": "QLoRA 4-bit"}
"""What is shown for a choice whose word says too little."""

_BETWEEN = "--"
"""Stands for the dots of a field's path in the id of its widget, which may hold no dot."""
_LABEL_WIDTH = 18
_FIRST_SECTIONS = 2
"""Sections that the first frame shows."""


class RecipeForm(VerticalScroll):
    """Shows a recipe and tells which field the user gave which value; keeps no recipe itself."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "app.focus_next", "Next field", show=False),
        Binding("up", "app.focus_previous", "Field before", show=False),
    ]

    DEFAULT_CSS = """
    RecipeForm {
        padding: 0 1;
        scrollbar-size-vertical: 1;
        & > .heading { height: 1; color: $text-muted; text-style: italic; }
    }
    """

    class Turned(Message):
        """The user gave a field another value. A typed text that is no such value is passed on as text."""

        def __init__(self, path: str, value: Any, *, step: bool) -> None:
            """Carry the field's path and its new value, and whether it is a step that others may follow."""
            super().__init__()
            self.path = path
            self.value = value
            self.step = step

    class Reached(Message):
        """The user came to a field."""

        def __init__(self, path: str) -> None:
            """Carry the field's path."""
            super().__init__()
            self.path = path

    def __init__(self, recipe: Recipe) -> None:
        """Show `recipe` first."""
        super().__init__(can_focus=False)
        self._fields = {path: _field(path, recipe) for _, paths in SECTIONS for path in paths}

    def compose(self) -> ComposeResult:
        """Make the headings and fields of the first sections; the others come once these are drawn."""
        yield from self._rows(SECTIONS[:_FIRST_SECTIONS])

    def on_mount(self) -> None:
        """Bring the other sections after the first frame, because styling all 40 fields would delay it."""
        self.call_after_refresh(lambda: self.mount_all(self._rows(SECTIONS[_FIRST_SECTIONS:])))

    def _rows(self, sections: Iterable[tuple[str, tuple[str, ...]]]) -> Iterator[Widget]:
        for heading, paths in sections:
            if heading != SECTIONS[0][0]:  # the first fields stand below the title of the screen
                yield Static(heading, classes="heading", markup=False)
            for path in paths:
                yield self._fields[path]

    def show(self, recipe: Recipe) -> None:
        """Show a recipe: its values, and what follows from them."""
        for path, field in self._fields.items():
            _set(field, path, recipe.get(path))
        self.show_what_follows(recipe)

    def show_what_follows(self, recipe: Recipe) -> None:
        """Show the notes, and only the fields that matter for the method, but set no value.

        The recipe may lag behind the fields: setting a value would undo what the user turned in the meantime.
        """
        for path, note in notes_of(recipe).items():
            field = self._fields[path]
            if isinstance(field, (Slider, Choice)):
                field.note = note
        for path, field in self._fields.items():
            if FIELDS[path].four_bit:
                field.display = recipe.method == "qlora"
            elif FIELDS[path].pairs:
                field.display = takes_pairs(recipe.train.objective)

    @property
    def editing(self) -> bool:
        """Whether a field is being edited."""
        focused = self.screen.focused
        return self.typing or (isinstance(focused, Choice) and focused.editing)

    @property
    def typing(self) -> bool:
        """Whether letters and digits go into a field, so that as keys they do nothing else."""
        focused = self.screen.focused
        if isinstance(focused, Slider):
            return focused.typed is not None
        return isinstance(focused, TextLine) and focused.editing

    def after_turns(self, then: Callable[[], None]) -> None:
        """Call `then` once everything has been told that the user has turned so far.

        Several keys may come in one read, as a slow line delivers them, and a turn is told by messages. What follows
        it goes the same way, from widget to widget. Each widget is passed twice, because some answer a message with
        one of their own.
        """
        start: Widget = self.screen.focused or self
        call: Callable[[], object] = then
        for node in reversed([node for node in start.ancestors_with_self if isinstance(node, Widget)]):
            call = partial(node.call_later, partial(node.call_later, call))
        call()

    def turn_method(self) -> None:
        """Turn the method as if the user had done it in its row."""
        method = self._fields["method"]
        if isinstance(method, Choice):
            method.action_turn(1)

    def focus_field(self, path: str) -> None:
        """Put the cursor on a field."""
        field = self._fields[path]
        (field.line if isinstance(field, TextField) else field).focus()

    def on_slider_changed(self, message: Slider.Changed) -> None:
        """Tell that a slider was turned."""
        message.stop()
        path = _path_of(message.slider)
        self.post_message(self.Turned(path, FIELDS[path].kind.shaped(float(message.value)), step=message.step))

    def on_choice_changed(self, message: Choice.Changed) -> None:
        """Tell that a choice was turned."""
        message.stop()
        path = _path_of(message.choice)
        self.post_message(self.Turned(path, FIELDS[path].kind.read(message.value), step=message.step))

    def on_text_field_changed(self, message: TextField.Changed) -> None:
        """Tell that a text was finished."""
        message.stop()
        path = _path_of(message.field)
        self.post_message(self.Turned(path, FIELDS[path].kind.read(message.value.strip()), step=False))

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Tell which field the user came to."""
        field = next((node for node in event.widget.ancestors_with_self if node in self._fields.values()), None)
        if isinstance(field, Widget):
            self.post_message(self.Reached(_path_of(field)))


def options_of(path: str) -> tuple[tuple[str, str], ...]:
    """Return the values and words that a field is chosen from; empty where it is no choice."""
    if isinstance(FIELDS[path].kind, Switch):
        return ("off", "off"), ("on", "on")
    return tuple((value, SHOWN.get(value, value)) for value in choices_of(path))


def notes_of(recipe: Recipe) -> dict[str, str]:
    """Return notes by field: what follows from its value together with those of other fields."""
    by_steps, rank = recipe.train.steps > 0, recipe.adapter.rank
    return {
        "adapter.alpha": f"{setting(round(recipe.adapter.alpha / rank, 4))} x rank" if rank else "",
        "train.learning_rate": f"{recipe.train.objective}: {advised_rate(recipe):g}" if rate_note(recipe) else "",
        "train.accumulation": f"{recipe.rows_per_step} per step",
        "train.steps": "" if by_steps else "by epochs",
        "train.epochs": "by steps" if by_steps else "",
        "device.budget_gib": "" if recipe.device.budget_gib else "whole card",
    }


def _field(path: str, recipe: Recipe) -> Slider | Choice | TextField:
    label, kind, key = FIELDS[path].label, FIELDS[path].kind, path.replace(".", _BETWEEN)
    if isinstance(kind, Number) and kind.stops:
        scale, value = stops_scale(kind.stops, kind.low, kind.high), float(recipe.get(path))
        return Slider(label, scale, value, whole=kind.of is int, show=setting, label_width=_LABEL_WIDTH, id=key)
    if options := options_of(path):
        return Choice(label, options, _text(path, recipe.get(path)), label_width=_LABEL_WIDTH, id=key)
    return TextField(label, _text(path, recipe.get(path)), label_width=_LABEL_WIDTH, id=key)


def _set(field: Slider | Choice | TextField, path: str, value: Any) -> None:
    """Show a value. A text in place of a number, as a user may type it, is shown by text fields only."""
    if isinstance(field, Choice):
        field.editing = False  # escape must not bring back what was before another recipe came
    if not isinstance(field, Slider):
        field.value = _text(path, value)
    elif isinstance(value, (int, float)):
        field.value = float(value)


def _text(path: str, value: Any) -> str:
    return plain(FIELDS[path].kind.written(value), one_line=True)


def _path_of(field: Widget) -> str:
    return (field.id or "").replace(_BETWEEN, ".")
