"""One step of the set-up: a question, options to choose from, a line to type in, and words on what is chosen."""

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from studio.core.text import plain


class _Options(OptionList):
    """Says in the footer what Enter does; as a priority key of the screen it would overtake the arrows before it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select", "Next")]


class _Line(Input):
    """As above."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "submit", "Next")]


class _Words(VerticalScroll):
    """Takes the keys, to be scrolled, where it holds more than it shows."""

    def watch_show_vertical_scrollbar(self, shown: bool) -> None:
        self.can_focus = shown


class SetupStep(Vertical):
    """Asks; the screen decides what follows. Options and words may change while it is shown."""

    DEFAULT_CSS = """
    SetupStep {
        height: 1fr;
        padding: 0 1;
        & > .question { text-style: bold; height: auto; padding: 0 0 1 0; }
        & > .found { height: auto; display: none; margin: 0 0 1 0; }
        & > .found.-shown { display: block; }
        & > OptionList { height: auto; max-height: 12; margin: 0 0 1 0; border: none; padding: 0; }
        & > Input { margin: 0 0 1 0; }
        & > _Words { height: 1fr; scrollbar-size-vertical: 1; }
        & > _Words:focus { background: $foreground 6%; }
        & > _Words > Static { height: auto; }
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

    def __init__(self, key: str, question: str, *, placeholder: str = "") -> None:
        """Ask a question.

        Args:
            key: Name of the step.
            question: What is asked.
            placeholder: What may be typed; empty for a step of options only.
        """
        super().__init__(id=f"step-{key}")
        self.key = key
        self._question, self._placeholder = question, placeholder
        self._options: list[tuple[str, Content]] = []
        self.lit = ""

    def compose(self) -> ComposeResult:
        """Question, what was found, options, line, words."""
        yield Static(Content(self._question), classes="question", markup=False)
        yield Static("", classes="found", markup=False)
        yield _Options(compact=True)
        if self._placeholder:
            yield _Line(placeholder=self._placeholder, compact=True)
        with _Words(can_focus=False):
            yield Static("", classes="words", markup=False)

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
        """Tell what was typed."""
        event.stop()
        if event.value.strip():
            self.post_message(self.Typed(self.key, event.value.strip()))

    def offer(self, options: Sequence[tuple[str, Content]], chosen: str) -> None:
        """Offer options, each a value and what is shown; the cursor stands on the chosen one."""
        listed, self._options = self.query_one(OptionList), list(options)
        values = [value for value, _ in options]
        listed.clear_options()
        listed.add_options([Option(shown) for _, shown in options])
        if options:
            listed.highlighted = values.index(chosen) if chosen in values else 0
            self.lit = values[listed.highlighted]

    def offer_first(self, word: str) -> None:
        """Offer what was typed before the others and put the cursor on it."""
        others = [(value, shown) for value, shown in self._options if value != word]
        self.offer([(word, Content(plain(word, one_line=True, limit=100))), *others], word)
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
        """Columns that words have, known before they are laid out: without padding and scrollbar."""
        return max(20, self.app.size.width - 3)
