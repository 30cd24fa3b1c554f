"""All fields of a recipe, each in one row: the essential ones first, the others below a head that folds them away."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widget import AwaitMount, Widget
from textual.widgets import Static

from studio.core.layer_count import LayerCount
from studio.core.preferences import advised_rate, rate_note, takes_pairs
from studio.core.recipe import FIELDS, SECTIONS, Recipe, choices_of
from studio.core.text import plain
from studio.core.value_kinds import Number, Switch
from studio.tui.readable import setting
from widgets.choice import Choice
from widgets.fold import Fold
from widgets.scale import stops_scale
from widgets.slider import Slider
from widgets.text_field import TextField, TextLine

SHOWN = {"lora": "LoRA 16-bit", "qlora": "QLoRA 4-bit"}
"""What is shown for a choice whose word says too little."""

_BETWEEN = "--"
"""Stands for the dots of a field's path in the id of its widget, which may hold no dot."""
_LABEL_WIDTH = 18

ESSENTIALS = (
    "name",
    "model.base",
    "data.path",
    "method",
    "adapter.rank",
    "adapter.alpha",
    "train.micro_batch",
    "train.accumulation",
    "train.seq_len",
    "train.learning_rate",
    "train.epochs",
)
"""The fields that a first recipe is made of, in the order of the form; all others are folded away at first."""
ADVANCED = tuple(
    (heading, tuple(path for path in paths if path not in ESSENTIALS))
    for heading, paths in SECTIONS
    if not set(paths) <= set(ESSENTIALS)
)
"""Headings and paths of the other fields."""
_FOLDED = tuple(path for _, paths in ADVANCED for path in paths)
FOLD_HELP = (
    "Everything else that a recipe holds. Enter shows it or folds it away; / finds a field by its name or by what it "
    "does, folded or not."
)


class RecipeForm(VerticalScroll):
    """Shows a recipe and tells which field the user gave which value; keeps no recipe itself."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "app.focus_next", "Next field", show=False),
        Binding("up", "app.focus_previous", "Field before", show=False),
    ]

    DEFAULT_CSS = """
    RecipeForm {
        border-title-color: $text-primary;
        border-title-style: bold;
        padding: 0 1;
        scrollbar-size-vertical: 1;
        & > #advanced { height: auto; }
        & .heading { height: 1; color: $text-primary; text-style: bold; }
        & .-changed > .slider--label, & .-changed > .choice--label, & .-changed > Static { text-style: bold; }
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
        """The user came to a field, or with an empty path to the head of the folded ones."""

        def __init__(self, path: str) -> None:
            """Carry the field's path."""
            super().__init__()
            self.path = path

    class Folded(Message):
        """The other fields were folded away or shown."""

    def __init__(self, recipe: Recipe) -> None:
        """Show `recipe` first."""
        super().__init__(can_focus=False)
        self.border_title = "Recipe"
        self.fold_chosen = False
        """Whether the user has folded or unfolded, or gone to a folded field."""
        self._fields = {path: _field(path, recipe) for path in FIELDS}
        self._longest_tokens: int | None = None
        self._fold, self._advanced = Fold(id="fold"), Vertical(id="advanced")
        self._advanced.display = False
        self._rows = AwaitMount(self, ())

    def compose(self) -> ComposeResult:
        """Make the essential fields and the head of the others, which come once these are drawn."""
        for path in ESSENTIALS:
            yield self._fields[path]
        yield self._fold
        yield self._advanced

    def advanced_rows(self) -> Iterator[Widget]:
        """Return the headings and fields that are folded away at first."""
        for heading, paths in ADVANCED:
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
        for path, note in notes_of(recipe, self._longest_tokens).items():
            field = self._fields[path]
            if isinstance(field, (Slider, Choice)):
                field.note = note
        for path, field in self._fields.items():
            if FIELDS[path].four_bit or FIELDS[path].pairs:
                field.display = not why_hidden(path, recipe)
        shown = [path for path in _FOLDED if not why_hidden(path, recipe)]
        changed = changed_paths(recipe)
        for path in _FOLDED:
            self._fields[path].set_class(path in changed, "-changed")
        self._fold.name_shown, self._fold.words = f"Advanced ({len(shown)})", changed_words(changed)

    def know_longest(self, tokens: int | None, recipe: Recipe) -> None:
        """Show how long the longest row is beside the length; None where it is not known."""
        self._longest_tokens = tokens
        self.show_what_follows(recipe)

    @property
    def unfolded(self) -> bool:
        """Whether all fields are shown."""
        return self._fold.open

    def unfold(self, wanted: bool = True) -> None:
        """Show the other fields too, or fold them away."""
        if wanted == self.unfolded:
            return
        if wanted and not self._advanced.children:  # most visits never see these rows, which hold 4 MiB
            self._rows = self._advanced.mount_all(self.advanced_rows())
        if not wanted and self.screen.focused is not None and self._advanced in self.screen.focused.ancestors:
            self._fold.focus()
        self._fold.open = wanted
        self._advanced.display = wanted  # a class would style all fields anew
        self.post_message(self.Folded())

    async def on_fold_turned(self, message: Fold.Turned) -> None:
        """Show the other fields, or fold them away."""
        message.stop()
        self.fold_chosen = True
        self.unfold(message.wanted)
        await self._rows
        self.call_after_refresh(self.scroll_to_widget, self._fold, animate=False, top=message.wanted)

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
        """Put the cursor on a field, and unfold it where it is folded away."""
        field = self._fields[path]
        if path not in ESSENTIALS and not self.unfolded:
            self.fold_chosen = True
            self.unfold()

        async def focus() -> None:
            await self._rows
            (field.line if isinstance(field, TextField) else field).focus()

        self.call_later(focus)

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
        if event.widget is self._fold:
            self.post_message(self.Reached(""))
            return
        field = next((node for node in event.widget.ancestors_with_self if node in self._fields.values()), None)
        if isinstance(field, Widget):
            self.post_message(self.Reached(_path_of(field)))


def options_of(path: str) -> tuple[tuple[str, str], ...]:
    """Return the values and words that a field is chosen from; empty where it is no choice."""
    kind = FIELDS[path].kind
    if isinstance(kind, Switch):
        return ("off", "off"), ("on", "on"), *((word, word) for word in kind.words)
    if isinstance(kind, LayerCount):
        # Ordered by how many layers: the words that stand for a number of their own at either end.
        words = [word for word in kind.words if word != kind.none]
        return tuple((word, word) for word in (kind.none, *map(str, kind.stops), *words))
    return tuple((value, SHOWN.get(value, value)) for value in choices_of(path))


def why_hidden(path: str, recipe: Recipe) -> str:
    """Return why a field means nothing to a recipe, so that the form does not show it; empty where it shows it."""
    if FIELDS[path].four_bit and recipe.method != "qlora":
        return "only with QLoRA"
    if FIELDS[path].pairs and not takes_pairs(recipe.train.objective):
        return "only with dpo and orpo"
    return ""


def changed_paths(recipe: Recipe) -> tuple[str, ...]:
    """Return which folded fields that the form shows have another value than their default."""
    return tuple(path for path in _FOLDED if recipe.get(path) != FIELDS[path].default and not why_hidden(path, recipe))


def changed_words(changed: Sequence[str]) -> str:
    """Return how many folded fields differ from their defaults, and which."""
    if not changed:
        return "all as by default"
    count = "1 changed from its default" if len(changed) == 1 else f"{len(changed)} changed from their defaults"
    return f"{count}: {', '.join(FIELDS[path].label for path in changed)}"


def notes_of(recipe: Recipe, longest_tokens: int | None = None) -> dict[str, str]:
    """Return notes by field: what follows from its value and those of other fields, or its default.

    Args:
        recipe: Has the values.
        longest_tokens: Tokens of the longest row of its data, where it is known.
    """
    by_steps, rank = recipe.train.steps > 0, recipe.adapter.rank
    changed = changed_paths(recipe)
    return {
        **{path: f"default {shown_value(path, FIELDS[path].default)}" if path in changed else "" for path in _FOLDED},
        "adapter.alpha": f"{setting(round(recipe.adapter.alpha / rank, 4))} x rank" if rank else "",
        "train.learning_rate": f"{recipe.train.objective}: {advised_rate(recipe):g}" if rate_note(recipe) else "",
        "train.accumulation": f"{recipe.rows_per_step} per step",
        "train.seq_len": f"longest {longest_tokens}" if longest_tokens else "",
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
        return Choice(label, options, shown_value(path, recipe.get(path)), label_width=_LABEL_WIDTH, id=key)
    return TextField(label, shown_value(path, recipe.get(path)), label_width=_LABEL_WIDTH, id=key)


def _set(field: Slider | Choice | TextField, path: str, value: Any) -> None:
    """Show a value. A text in place of a number, as a user may type it, is shown by text fields only."""
    if isinstance(field, Choice):
        field.editing = False  # escape must not bring back what was before another recipe came
    if not isinstance(field, Slider):
        field.value = shown_value(path, value)
    elif isinstance(value, (int, float)):
        field.value = float(value)


def shown_value(path: str, value: Any) -> str:
    """Return a value of a field on one line, as a recipe's file has it."""
    return plain(FIELDS[path].kind.written(value), one_line=True)


def _path_of(field: Widget) -> str:
    return (field.id or "").replace(_BETWEEN, ".")
