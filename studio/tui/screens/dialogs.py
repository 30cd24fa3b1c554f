"""What every dialog shares, and what many screens ask with: for a yes, for a line of text, for one of a list."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from studio.core.errors import StudioError
from studio.core.text import plain

if TYPE_CHECKING:  # the readers of runs are not needed for the first frame
    from studio.runs.checkpoints import NoWholeCheckpoint

Answer = TypeVar("Answer")


class Dialog(ModalScreen[Answer]):
    """Closes with an answer, or with None after escape. Its one child is the box."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Back"),
        Binding("question_mark,f1", "app.help", show=False),
    ]

    DEFAULT_CSS = """
    Dialog {
        align: center middle;
        & > Vertical, & > VerticalScroll {
            width: 72;
            max-width: 95%;
            height: auto;
            max-height: 100%;
            padding: 1 2;
            border: round $primary;
            background: $surface;
        }
        & Static { height: auto; }
    }
    """

    def action_leave(self) -> None:
        """Close without an answer."""
        self.dismiss(None)


def ask(app: App[Any], dialog: Dialog[Answer], take: Callable[[Answer], object]) -> None:
    """Show a dialog and hand its answer on; escape hands nothing on."""

    def closed(answer: Answer | None) -> None:
        if answer is not None:
            take(answer)

    app.push_screen(dialog, closed)


def start_over_question(error: "NoWholeCheckpoint") -> str:
    """Return the question for a run that can only be resumed from its start."""
    found = plain(error.found, one_line=True)
    return f"{found[:1].upper()}{found[1:]}. Start over at step 0? What is damaged stays beside it."


def if_agreed(act: Callable[[], object]) -> Callable[[bool | None], None]:
    """Return what to do with the answer to a question: to act after a yes."""

    def take(answer: bool | None) -> None:
        if answer:
            act()

    return take


class Confirm(Dialog[bool]):
    """Asks once; `y` is yes, `n` or escape is no. Enter is neither: what was typed ahead must not delete anything."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "agree", "Yes"),
        Binding("n,q", "leave", "No"),
    ]

    DEFAULT_CSS = """
    Confirm > Vertical { width: 64; border: round $warning; }
    """

    def __init__(self, question: Content, yes: str) -> None:
        """Ask a question; `yes` says what yes does."""
        super().__init__()
        self._question, self._yes = question, yes

    def compose(self) -> ComposeResult:
        """Make the parts: question, keys."""
        with Vertical():
            yield Static(self._question, markup=False)
            yield Static(Content.assemble(_button("\n", "y", self._yes, "agree"), _button("   ", "n", "no", "leave")))

    def action_agree(self) -> None:
        """Close with a yes."""
        self.dismiss(True)


class AskTurn(Dialog[bool]):
    """Asks what to do about a card on which other runs are at work: true is to wait for it, false to start at once."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("w", "answer(True)", "Wait"),
        Binding("s", "answer(False)", "Start anyway"),
        Binding("c,n,q", "leave", "Cancel"),
    ]

    DEFAULT_CSS = """
    AskTurn > Vertical { width: 64; border: round $warning; }
    """

    def __init__(self, at_work: list[str]) -> None:
        """Name the runs that are at work."""
        super().__init__()
        self._at_work = ", ".join(plain(name, one_line=True, limit=60) for name in at_work)

    def compose(self) -> ComposeResult:
        """Make the parts: who is at work, what each answer does, keys."""
        question = Content.assemble(
            ("This card is busy.\n", "$text-warning bold"),
            f"At work on it: {self._at_work}.\n",
            "Two trainings share its memory, and both may end for want of it. A run that waits starts by itself when "
            "the card is free, also when the studio is closed.",
        )
        with Vertical():
            yield Static(question, markup=False)
            keys = (("\n", "w", "wait in the queue", "answer(True)"), ("   ", "s", "start anyway", "answer(False)"))
            yield Static(
                Content.assemble(*(_button(*key) for key in keys), _button("   ", "c", "cancel", "leave")),
            )

    def action_answer(self, queue: bool) -> None:
        """Close with an answer."""
        self.dismiss(queue)


def _button(before: str, key: str, words: str, action: str) -> Content:
    """Return a key with what it does, both of which do it when they are clicked."""
    return Content(before) + Content.from_markup(
        f"[@click=screen.{action}][reverse] {key} [/reverse] $words[/]", words=words
    )


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
        """Make the parts: question, field, refusal, hint."""
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


class Offers(OptionList, can_focus=False):
    """The list of a picker. It never has the cursor, so that whatever is typed narrows it and enter takes."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__(compact=True, id="offers")


class Picker(Dialog[Answer]):
    """A list that typing narrows: the cursor stays in the filter while the arrows move in the list.

    A subclass says in `offers` what is in the list and composes a box of `#filter` and `#offers`.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "move('cursor_down')", "Next", show=False, priority=True),
        Binding("up", "move('cursor_up')", "Before", show=False, priority=True),
        Binding("pagedown", "move('page_down')", "Further", show=False, priority=True),
        Binding("pageup", "move('page_up')", "Back by as much", show=False, priority=True),
    ]

    DEFAULT_CSS = """
    Picker {
        & > Vertical { height: 80%; padding: 0; }
        & OptionList { height: 1fr; }
    }
    """

    def __init__(self) -> None:
        """Start with an empty filter."""
        super().__init__()
        self._offered: list[Answer | None] = []

    def offers(self, text: str) -> Iterable[tuple[Answer | None, Content]]:
        """Return what a filter lets through, each with its line; None stands for a heading, which cannot be chosen."""
        raise NotImplementedError

    @property
    def chosen(self) -> Answer | None:
        """What is under the cursor."""
        row = self.query_one("#offers", OptionList).highlighted
        return None if row is None else self._offered[row]

    def show_offers(self) -> None:
        """Show what the filter lets through, with the cursor on the first."""
        options, found = (
            self.query_one("#offers", OptionList),
            list(self.offers(self.query_one("#filter", Input).value)),
        )
        self._offered = [answer for answer, _ in found]
        options.set_options([Option(line, disabled=answer is None) for answer, line in found])
        options.highlighted = next((row for row, answer in enumerate(self._offered) if answer is not None), None)

    def move_to(self, answer: Answer) -> None:
        """Put the cursor on an answer, where it is offered."""
        if answer in self._offered:
            self.query_one("#offers", OptionList).highlighted = self._offered.index(answer)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Narrow the list."""
        event.stop()
        self.show_offers()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take what is under the cursor."""
        event.stop()
        if self.chosen is not None:
            self.take(self.chosen)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take what was clicked, or do with it what the subclass does."""
        event.stop()
        answer = self._offered[event.option_index]
        if answer is not None:
            self.click(answer)

    def click(self, answer: Answer) -> None:
        """Take what was clicked."""
        self.take(answer)

    def take(self, answer: Answer) -> None:
        """Close with an answer."""
        self.dismiss(answer)

    def action_move(self, how: str) -> None:
        """Move in the list while the cursor stays in the filter."""
        options = self.query_one("#offers", OptionList)
        getattr(options, f"action_{how}")()
        if options.highlighted is None:  # a page up that ended on a heading
            options.action_first()
