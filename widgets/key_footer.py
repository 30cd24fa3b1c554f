"""The row of keys at the foot of a screen, built anew only when it would look different."""

from textual.screen import Screen
from textual.widgets import Footer


class KeyFooter(Footer):
    """Textual's footer builds a widget per key whenever the focus moves, which costs more than the move itself."""

    def __init__(self) -> None:
        """Show the keys of the screen; the palette's is one of many, so it has no place of its own."""
        super().__init__(show_command_palette=False)
        self._shown: list[tuple[str, str, str, bool]] = []

    def bindings_changed(self, screen: Screen[object]) -> None:
        """Build the row anew where a key, its name or whether it does something has changed."""
        active = screen.active_bindings.values()
        shown = [(key.key, key.key_display or "", key.description, on) for _, key, on, _ in active if key.show]
        if shown != self._shown and screen.app.app_focus:
            self._shown = shown
            super().bindings_changed(screen)
