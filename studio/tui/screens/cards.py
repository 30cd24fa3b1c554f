"""Chooses the card to plan for: this machine's, or one of the catalogue."""

from collections.abc import Iterable

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input

from studio.core.gpu_catalogue import CATALOGUE, GIB
from studio.tui.screens.dialogs import Offers, Picker

THIS_MACHINE = ""
"""The answer that plans for this machine's own card."""
_THIS = "this machine, as it is"


class CardScreen(Picker[str]):
    """Closes with the card's name, empty for this machine, None for no change."""

    DEFAULT_CSS = """
    CardScreen > Vertical { width: 60; }
    """

    def __init__(self, planned: str) -> None:
        """Offer every card; `planned` is the one in use."""
        super().__init__()
        self._planned = planned

    def compose(self) -> ComposeResult:
        """Make the parts: filter, list."""
        with Vertical() as box:
            box.border_title = "Plan for which card?"
            box.border_subtitle = "⏎ take it  esc back"
            yield Input(placeholder="type to narrow: 4090, a100, laptop", compact=True, id="filter")
            yield Offers()

    def on_mount(self) -> None:
        """Show all."""
        self.show_offers()
        self.move_to(self._planned)
        self.query_one(Input).focus()

    def offers(self, text: str) -> Iterable[tuple[str, Content]]:
        """Return the cards in whose name or kind every word is found."""
        words = text.lower().split()
        if all(word in _THIS for word in words):
            yield THIS_MACHINE, Content(_THIS)
        for card in CATALOGUE.values():
            if all(word in f"{card.name} {card.kind}".lower() for word in words):
                yield card.name, Content(f"{card.name:26} {card.total_bytes / GIB:6.1f} GiB  {card.kind}")
