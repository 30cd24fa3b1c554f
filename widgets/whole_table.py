"""A table whose cells are drawn anew when its columns have become wider."""

from rich.text import Text
from textual.geometry import Size
from textual.widgets import DataTable


class WholeTable(DataTable[Text]):
    """Textual's table measures new cells once it is idle, but keeps what it drew of them before: cut, for ever."""

    def watch_virtual_size(self, before: Size, now: Size) -> None:
        """Forget what was drawn for other widths."""
        if before.width != now.width:
            self.notify_style_update()
