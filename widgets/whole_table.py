"""A table that is drawn again when its columns, or the table, have become wider."""

from rich.text import Text
from textual import events
from textual.geometry import Size
from textual.widgets import DataTable


class WholeTable(DataTable[Text]):
    """Textual's table measures new cells when it is idle, but keeps the cells that it drew cut off before that."""

    def watch_virtual_size(self, before: Size, now: Size) -> None:
        """Drop what was drawn for other widths."""
        if before.width != now.width:
            self.notify_style_update()

    def on_resize(self, event: events.Resize) -> None:
        """Drop rows that were filled up for the width that the table had before."""
        self.notify_style_update()
