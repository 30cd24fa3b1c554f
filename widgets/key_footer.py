"""The row of keys at the foot of a screen: rebuilt only when it would look different, and never cut off."""

from rich.cells import cell_len
from textual import events
from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Footer
from textual.widgets._footer import FooterKey

_ALWAYS = 2
_BLANKS = 3


class KeyFooter(Footer):
    """Textual's footer, but rebuilt only for other keys: it builds a widget per key whenever the focus moves.

    That takes longer than the move itself. Where there is no room for all keys, the last two (help and the way back)
    stay, and of the others those to the right are left out.
    """

    DEFAULT_CSS = """
    KeyFooter FooterKey .footer-key--key { color: $text-accent; }
    """

    def __init__(self) -> None:
        """Show the keys of the screen; that of the command palette is shown like any other."""
        super().__init__(show_command_palette=False)
        self._shown: list[tuple[str, str, str, bool]] = []
        self._cells_wanted = 0
        self._cells_had = 0

    def compose(self) -> ComposeResult:
        """The keys for which there is room."""
        keys = [key for key in super().compose() if isinstance(key, FooterKey)]
        widths = [cell_len(key.key_display) + cell_len(key.description) + _BLANKS for key in keys]
        self._cells_wanted, self._cells_had = sum(widths), self.app.size.width
        room = self._cells_had - sum(widths[-_ALWAYS:])
        for place, key in enumerate(keys):
            if place >= len(keys) - _ALWAYS or sum(widths[: place + 1]) <= room:
                yield key

    async def on_resize(self, event: events.Resize) -> None:
        """Show as many keys as the new width has room for."""
        if self._cells_wanted > min(self._cells_had, self.app.size.width) and self._cells_had != self.app.size.width:
            await self.recompose()

    def bindings_changed(self, screen: Screen[object]) -> None:
        """Rebuild the row if a key, its name, or whether it does something has changed."""
        active = screen.active_bindings.values()
        shown = [(key.key, key.key_display or "", key.description, on) for _, key, on, _ in active if key.show]
        if shown != self._shown and screen.app.app_focus:
            self._shown = shown
            super().bindings_changed(screen)
