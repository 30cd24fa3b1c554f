"""Chooses which column of a file asks and which one answers, where its columns have names that nobody knows."""

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from studio.core.columns import Pairs
from studio.core.text import plain
from studio.tui.screens.dialogs import Dialog

_LONGEST_NAME, _LONGEST_SAMPLE = 24, 60
_QUESTIONS = {
    "prompt": "Which column holds what is asked?",
    "completion": "Which column holds the answer that is to be learnt?",
    "text": "Which column holds the text?",
}
_NO_PROMPT = "none: the file is plain text to continue"


class ColumnsScreen(Dialog[Pairs]):
    """Asks for the prompt and then for the answer, or for a text. Closes with their names, with None after escape."""

    DEFAULT_CSS = """
    ColumnsScreen {
        & > Vertical { width: 100; }
        & OptionList { height: auto; max-height: 14; border: none; margin: 1 0 0 0; padding: 0; }
    }
    """

    def __init__(self, columns: Sequence[tuple[str, str]]) -> None:
        """Offer columns, each with what it holds in the first row."""
        super().__init__()
        self._columns = columns
        self._chosen: Pairs = ()
        self._first = "prompt" if len(columns) > 1 else "text"  # a single column can hold nothing but text
        self._asked = self._first
        self._offered: list[str] = []

    def compose(self) -> ComposeResult:
        """Make the parts: question, columns."""
        with Vertical() as box:
            box.border_title = "Columns"
            box.border_subtitle = "⏎ take it  esc back"
            yield Static("", id="asked", markup=False)
            yield OptionList(compact=True)

    def on_mount(self) -> None:
        """Ask for the prompt, or for the text where there is one column only."""
        self._ask(self._first)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take a column, and ask for the next or close."""
        event.stop()
        column = self._offered[event.option_index]
        if not column:
            self._ask("text")
            return
        self._chosen = (*self._chosen, (self._asked, column))
        if self._asked == "prompt":
            self._ask("completion")
        else:
            self.dismiss(self._chosen)

    def action_leave(self) -> None:
        """Go back to the question before, from the first without an answer."""
        if self._asked == self._first:
            self.dismiss(None)
        else:
            self._chosen = ()
            self._ask("prompt")

    def _ask(self, ours: str) -> None:
        taken = {column for _, column in self._chosen}
        rest = [(column, sample) for column, sample in self._columns if column not in taken]
        self._asked, self._offered = ours, [column for column, _ in rest]
        lines = [
            Content.assemble(
                (f"{plain(column, one_line=True, limit=_LONGEST_NAME):{_LONGEST_NAME}}  ", "bold"),
                (plain(sample, one_line=True, limit=_LONGEST_SAMPLE), "dim"),
            )
            for column, sample in rest
        ]
        if ours == "prompt":
            self._offered.append("")
            lines.append(Content(_NO_PROMPT))
        self.query_one("#asked", Static).update(Content(_QUESTIONS[ours]))
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options([Option(line) for line in lines])
        options.highlighted = 0
        options.focus()
