"""Chooses the card to plan for: this machine's, or one of the catalogue."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from studio.core.gpu_catalogue import CATALOGUE, GIB
from studio.tui.screens.dialogs import Dialog

THIS_MACHINE = ""
"""The answer that plans for this machine's own card."""
_THIS = "this machine, as it is"


class CardScreen(Dialog[str]):
    """A list that typing narrows. Closes with the card's name, empty for this machine, None for no change."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "move(1)", "Next", show=False, priority=True),
        Binding("up", "move(-1)", "Before", show=False, priority=True),
        Binding("pagedown", "leap(1)", "Further", show=False, priority=True),
        Binding("pageup", "leap(-1)", "Back by as much", show=False, priority=True),
    ]

    DEFAULT_CSS = """
    CardScreen {
        & > Vertical { width: 60; height: 80%; padding: 0; }
        & OptionList { height: 1fr; }
    }
    """

    def __init__(self, planned: str) -> None:
        """Offer every card; `planned` is the one in use."""
        super().__init__()
        self._planned = planned
        self._offered: list[str] = []

    def compose(self) -> ComposeResult:
        """Make the parts: filter, list."""
        with Vertical() as box:
            box.border_title = "Plan for which card?"
            box.border_subtitle = "⏎ take it  esc back"
            yield Input(placeholder="type to narrow: 4090, a100, laptop", compact=True)
            yield OptionList(compact=True)

    def on_mount(self) -> None:
        """Show all."""
        self._narrow("")
        if self._planned in self._offered:
            self.query_one(OptionList).highlighted = self._offered.index(self._planned)
        self.query_one(Input).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Narrow the list."""
        event.stop()
        self._narrow(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take what is under the cursor."""
        event.stop()
        chosen = self.query_one(OptionList).highlighted
        if chosen is not None:
            self.dismiss(self._offered[chosen])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take what was clicked."""
        event.stop()
        self.dismiss(self._offered[event.option_index])

    def action_move(self, rows: int) -> None:
        """Move in the list while the cursor stays in the filter."""
        options = self.query_one(OptionList)
        if self._offered:
            options.highlighted = ((options.highlighted or 0) + rows) % len(self._offered)

    def action_leap(self, direction: int) -> None:
        """Move by a page, at most to the first or the last card."""
        options = self.query_one(OptionList)
        if self._offered:
            row = (options.highlighted or 0) + direction * max(1, options.size.height - 1)
            options.highlighted = min(max(row, 0), len(self._offered) - 1)

    def _narrow(self, text: str) -> None:
        words = text.lower().split()
        cards = [card for card in CATALOGUE.values() if all(w in f"{card.name} {card.kind}".lower() for w in words)]
        named = [(card.name, f"{card.name:26} {card.total_bytes / GIB:6.1f} GiB  {card.kind}") for card in cards]
        if all(word in _THIS for word in words):
            named.insert(0, (THIS_MACHINE, _THIS))
        options = self.query_one(OptionList)
        self._offered = [name for name, _ in named]
        options.clear_options()
        options.add_options([Option(Content(line)) for _, line in named])
        options.highlighted = 0 if named else None
