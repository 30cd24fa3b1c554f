"""The first row of a screen: the name of the screen, and the card that a run will use."""

from collections.abc import Callable

from textual import work
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

from studio.core.text import plain

_EVERY_SECONDS = 5.0


class TopBar(Horizontal):
    """Shows program, place and card. A thread reads the card, because a driver may take its time."""

    DEFAULT_CSS = """
    TopBar {
        height: 1;
        padding: 0 1;
        background: $panel;
        & > Static { width: auto; height: 1; }
        & > #card { width: 1fr; text-align: right; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }
    }
    """

    def __init__(self, place: str, *, card: Callable[[], str]) -> None:
        """Name the place; `card` says what the run will run on."""
        super().__init__()
        self._place, self._card = place, card
        self._told, self._planned = "", ""

    def compose(self) -> ComposeResult:
        """Make the parts: name, card."""
        yield Static(Content.assemble(("lora-studio", "bold"), f"  {self._place}"), markup=False)
        yield Static("", id="card", markup=False)

    def on_mount(self) -> None:
        """Begin to read the card, after the first frame."""
        self.call_after_refresh(self._read)
        self.set_interval(_EVERY_SECONDS, self._read)

    @work(thread=True, exclusive=True)
    def _read(self) -> None:
        told = plain(self._card(), one_line=True)
        if told != self._told:
            self._told = told
            self.app.call_from_thread(self._show, told)

    def plan_for(self, name: str) -> None:
        """Name the card that is planned for, before the one that is here; empty where nothing else is planned for."""
        if name != self._planned:
            self._planned = name
            self._show(self._told)

    def _show(self, told: str) -> None:
        if self.is_mounted:
            words = f"planned for {self._planned}; here {told}" if self._planned else told
            self.query_one("#card", Static).update(words, layout=False)
