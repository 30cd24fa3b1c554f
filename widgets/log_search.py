"""A log with a line to search it: newest match first, then up or down."""

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Input, Static

from widgets.log_view import LogView


class LogSearch(Vertical):
    """Shows a log; `open` shows the search line below it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "open", "Search", show=False),
        Binding("n", "next(-1)", "Match before", show=False),
        Binding("N", "next(1)", "Match after", show=False),
        Binding("escape", "close", "End search"),
    ]

    DEFAULT_CSS = """
    LogSearch {
        width: 1fr;
        height: 1fr;
        & > LogView { height: 1fr; }
        & > Horizontal { height: 1; display: none; padding: 0 1; }
        & > Horizontal.-shown { display: block; }
        & Input { width: 1fr; height: 1; }
        & Static { width: auto; height: 1; padding: 0 0 0 1; color: $text-muted; }
    }
    """

    def __init__(self, *, keep: int = 2000, empty: str = "", id: str | None = None) -> None:  # noqa: A002  Textual's
        """Show at most the newest `keep` lines, and `empty` where there is none."""
        super().__init__(id=id)
        self.border_title = "Log"
        self._log_view = LogView(keep=keep, empty=empty)
        self._opened = False

    def compose(self) -> ComposeResult:
        """Log, search line."""
        yield self._log_view
        with Horizontal():
            yield Static("/", markup=False)
            yield Input(compact=True)
            yield Static("", id="log-search-count", markup=False)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Act on the keys of a search only while one is open."""
        return self._opened if action in ("next", "close") else True

    def focus(self, scroll_visible: bool = True) -> "LogSearch":
        """Put the cursor into the log."""
        self._log_view.focus(scroll_visible)
        return self

    def on_input_changed(self, event: Input.Changed) -> None:
        """Search for the text in the line."""
        event.stop()
        self._log_view.sought = event.value
        # With each letter the search begins at the newest match again: the match shown so far may match no longer.
        if event.value:
            self._log_view.show_match(newest=True)
        self._tell()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Move the focus to the log, where n and N go from match to match."""
        event.stop()
        self._log_view.focus()

    def say_of_empty(self, words: str) -> None:
        """Say something else while there is no line."""
        self._log_view.empty = words

    def extend(self, lines: Iterable[str]) -> None:
        """Append lines, as for `LogView`."""
        self._log_view.extend(lines)
        if self._opened:
            self._tell()

    def action_open(self) -> None:
        """Show the line and type into it."""
        self._opened = True
        self.query_one(Horizontal).set_class(True, "-shown")
        self.query_one(Input).focus()

    def action_close(self) -> None:
        """End the search and hide the line."""
        self._opened = False
        self.query_one(Horizontal).set_class(False, "-shown")
        self.query_one(Input).value = ""
        self._log_view.focus()

    def action_next(self, direction: int) -> None:
        """Go to the match after or before."""
        self._log_view.show_match(direction)
        self._tell()

    def _tell(self) -> None:
        count, lines = len(self._log_view.matches), len(self._log_view.lines)
        words = f"{count} in the last {lines} lines; n N" if self._log_view.sought else ""
        label = self.query_one("#log-search-count", Static)
        if words != label.content:
            label.update(words)
