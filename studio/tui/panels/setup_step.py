"""One step of the set-up: a question, options to choose from, a line to type in, and words on what is chosen."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual.actions import SkipAction
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from studio.core.text import plain_path
from widgets.text_field import TextLine

_ROOM_FOR_BOTH = 100
"""Columns from which on the words stand beside the options, each in a panel of its own."""

Shown = Content | Callable[[int], Content]
"""What is shown for an option: words, or a function that makes them for a width in cells."""


def path_line(path: str) -> Shown:
    """Return what shows a path or another typed word; a long one is cut so that its end stays visible."""
    return lambda cells: Content(plain_path(path, cells))


class _Options(OptionList):
    """Options that say in the footer what Enter does.

    A priority key of the screen could say it, too, but Enter would then overtake arrow keys that were typed before it.
    At the first and the last option the arrows are left to the step, which moves on to its next part.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select", "Next")]

    def action_cursor_down(self) -> None:
        if self.highlighted in (None, self.option_count - 1):  # a heading is never the last
            raise SkipAction
        super().action_cursor_down()

    def action_cursor_up(self) -> None:
        if self.highlighted is None or not any(not option.disabled for option in self.options[: self.highlighted]):
            raise SkipAction
        super().action_cursor_up()


class _Line(TextLine):
    """A line that says in the footer what Enter does: it begins to type, or takes what was typed."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "submit", "Next"), Binding("enter", "edit", "Type")]


class _Words(VerticalScroll):
    """Words that can be focused and scrolled while they are longer than their place.

    At their ends the arrows are left to the step, as in the options.
    """

    class Emptied(Message):
        """The words had the focus, but can no longer be scrolled."""

    def watch_show_vertical_scrollbar(self, shown: bool) -> None:
        self.can_focus = shown
        if not shown and self.has_focus:
            self.post_message(self.Emptied())

    def action_scroll_down(self) -> None:
        if self.scroll_target_y >= self.max_scroll_y:
            raise SkipAction
        super().action_scroll_down()

    def action_scroll_up(self) -> None:
        if self.scroll_target_y <= 0:
            raise SkipAction
        super().action_scroll_up()


class SetupStep(Vertical):
    """Asks a question; the screen decides what follows. Options and words may change while the step is shown.

    The arrows go round: through the options, to the line, through words that are longer than their place, and back.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "go_round(1)", show=False),
        Binding("up", "go_round(-1)", show=False),
    ]

    DEFAULT_CSS = """
    SetupStep {
        height: 1fr;
        padding: 0 1;
        & .question { text-style: bold; height: auto; padding: 0 0 1 0; }
        & .found { height: auto; display: none; margin: 0 0 1 0; }
        & .found.-shown { display: block; }
        & .asked { height: auto; }
        & .hint { display: none; }
        & OptionList { height: auto; max-height: 9; margin: 0 0 1 0; border: none; padding: 0; }
        & OptionList { scrollbar-size-vertical: 1; }
        &#step-machine OptionList { max-height: 3; }
        & TextLine { margin: 0 0 1 0; }
        & _Words { height: 1fr; scrollbar-size-vertical: 1; }
        & _Words:focus { background: $foreground 6%; }
        & _Words > Static { height: auto; }
        &.-beside {
            layout: horizontal;
            padding: 0;
            & .question { display: none; }
            & .asked { width: 1fr; height: 100%; }
            & .asked, & _Words {
                border: round $foreground 40%;
                border-title-color: $text-primary;
                border-title-style: bold;
                padding: 0 1;
            }
            & OptionList { height: 1fr; margin: 0; background: transparent; }
            & OptionList, &#step-machine OptionList { max-height: 100%; }
            & .hint { display: block; height: auto; max-height: 70%; margin: 1 0 0 0; }
            & TextLine { margin: 1 0 0 0; }
            & _Words { width: 1fr; height: 100%; }
            &#step-recipe _Words { width: 2fr; }
        }
    }
    """

    class Chosen(Message):
        """The user chose an option."""

        def __init__(self, step: str, value: str) -> None:
            """Carry the step's key and the option's value."""
            super().__init__()
            self.step, self.value = step, value

    class Lit(Message):
        """The cursor came to an option."""

        def __init__(self, step: str, value: str) -> None:
            """Carry the step's key and the option's value."""
            super().__init__()
            self.step, self.value = step, value

    class Typed(Message):
        """The user typed a line."""

        def __init__(self, step: str, text: str) -> None:
            """Carry the step's key and the line."""
            super().__init__()
            self.step, self.text = step, text

    def __init__(
        self, key: str, question: str, about: str, *, placeholder: str = "", hint: Content | None = None
    ) -> None:
        """Ask a question.

        Args:
            key: Name of the step.
            question: What is asked.
            about: What the words on what is chosen are about, for the title of their panel.
            placeholder: What may be typed; empty for a step of options only.
            hint: What to know of all options, where there is room for it below them.
        """
        super().__init__(id=f"step-{key}")
        self.key = key
        self._question, self._about, self._placeholder, self._hint = question, about, placeholder, hint
        self._options: list[tuple[str, Shown]] = []
        self.lit = ""

    def compose(self) -> ComposeResult:
        """Make the parts: question, what was found, options, line, words."""
        with Vertical(classes="asked") as asked:
            asked.border_title = self._question
            yield Static(Content(self._question), classes="question", markup=False)
            yield Static("", classes="found", markup=False)
            yield _Options(compact=True)
            if self._hint:
                yield Static(self._hint, classes="hint", markup=False)
            if self._placeholder:
                yield _Line(placeholder=self._placeholder)
        with _Words(can_focus=False) as words:
            words.border_title = self._about
            yield Static("", classes="words", markup=False)

    def on_mount(self) -> None:
        """Begin with the layout for the screen's width."""
        self.set_class(self._beside, "-beside")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Tell what was chosen."""
        event.stop()
        self.lit = self._options[event.option_index][0]
        self.post_message(self.Chosen(self.key, self.lit))

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Tell where the cursor is."""
        event.stop()
        if event.option_index < len(self._options):
            self.lit = self._options[event.option_index][0]
            self.post_message(self.Lit(self.key, self.lit))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Tell what was typed; with nothing typed go back to the options."""
        event.stop()
        if event.value.strip():
            self.post_message(self.Typed(self.key, event.value.strip()))
        else:
            self.focus_options()

    def on__words_emptied(self) -> None:
        """Give the focus to the options, because the words can no longer have it."""
        self.focus_options()

    def action_go_round(self, direction: int) -> None:
        """Go on to the part below, or to the one above. The options are entered at their nearer end."""
        parts = [part for part in self.query("_Options, _Line, _Words") if part.can_focus]
        place = next((place for place, part in enumerate(parts) if part.has_focus), -1)
        part = parts[(place + direction) % len(parts)]
        if isinstance(part, OptionList) and part.option_count:
            (part.action_first if direction > 0 else part.action_last)()
        self.screen.set_focus(part)  # not focus(): it waits, so that the next key of a burst would go to the old part

    def on_resize(self) -> None:
        """Show options for the room that there is now."""
        self.set_class(self._beside, "-beside")
        listed = self.query_one(OptionList)
        for place, (_, shown) in enumerate(self._options):
            if not isinstance(shown, Content):
                listed.replace_option_prompt_at_index(place, shown(self._option_room))

    def offer(self, options: Sequence[tuple[str, Shown]], chosen: str) -> None:
        """Offer options, each a value and what is shown; the cursor stands on the chosen one.

        An empty value is a heading, which cannot be chosen.
        """
        listed, self._options = self.query_one(OptionList), list(options)
        values, room = [value for value, _ in options], self._option_room
        shown = [words if isinstance(words, Content) else words(room) for _, words in options]
        listed.set_options(Option(words, disabled=not value) for words, value in zip(shown, values, strict=True))
        if first := next(filter(None, values), ""):
            listed.highlighted = values.index(chosen if chosen in values else first)
            self.lit = values[listed.highlighted]

    def offer_first(self, word: str) -> None:
        """Offer what was typed before the others and put the cursor on it."""
        others = [(value, shown) for value, shown in self._options if value != word or not value]
        self.offer([(word, path_line(word)), *others], word)
        self.focus_options()

    def tell_found(self, words: Content) -> None:
        """Show what was found, above the options."""
        found = self.query_one(".found", Static)
        found.update(words)
        found.set_class(bool(words), "-shown")

    def tell(self, words: Content) -> None:
        """Show words on what is chosen, below the options."""
        self.query_one(".words", Static).update(words)

    def focus_options(self) -> None:
        """Put the cursor into the options."""
        self.query_one(OptionList).focus()

    @property
    def room(self) -> int:
        """The columns for words, without padding, borders and scrollbar; known before the first layout."""
        wide = self.app.size.width
        return max(20, wide - self._asked_columns - 6 if self._beside else wide - 3)

    @property
    def _option_room(self) -> int:
        """The columns for an option."""
        return max(20, self._asked_columns - 6 if self._beside else self.app.size.width - 3)

    @property
    def _asked_columns(self) -> int:
        return self.app.size.width // (3 if self.key == "recipe" else 2)

    @property
    def _beside(self) -> bool:
        """Whether the words stand beside what is asked."""
        return self.app.size.width >= _ROOM_FOR_BOTH
