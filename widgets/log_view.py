"""The end of a log, shown as plain text: no markup, no escape sequences, only the last state of a progress bar."""

import re
import textwrap
from collections import deque
from collections.abc import Iterable
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def visible_lines(text: str) -> list[str]:
    r"""Return the lines of a log: of texts separated by `\r` only the last, and `·` for each control character."""
    lines = []
    for line in text.split("\n"):
        last = line.rstrip("\r").rpartition("\r")[2]
        lines.append(_CONTROL.sub("·", last.expandtabs(8)))
    return lines


class LogView(ScrollView, can_focus=True):
    """The newest lines of a log. Follows the end, except after the user has scrolled up and is not back at the end."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("end,G", "scroll_end", "Newest", show=False),
        Binding("home,g", "scroll_home", "Oldest", show=False),
    ]

    COMPONENT_CLASSES: ClassVar[set[str]] = {"log-view--found", "log-view--empty"}

    DEFAULT_CSS = """
    LogView {
        width: 1fr;
        height: 1fr;
        overflow: auto scroll;
        scrollbar-size-vertical: 1;
        scrollbar-size-horizontal: 1;
        & > .log-view--found { text-style: reverse; color: $text-warning; }
        & > .log-view--empty { color: $text-muted; }
    }
    """

    wrap: reactive[bool] = reactive(True)
    """Whether long lines continue on the next row."""
    empty: reactive[str] = reactive("")
    """What is said while there is no line."""
    sought: reactive[str] = reactive("")
    """The text to mark wherever it occurs, in upper or lower case; empty marks nothing."""

    def __init__(
        self,
        *,
        keep: int = 2000,
        empty: str = "",
        id: str | None = None,  # noqa: A002  Textual's own name
        classes: str | None = None,
    ) -> None:
        """Show at most the newest `keep` lines, and `empty` where there is none."""
        super().__init__(id=id, classes=classes)
        self.set_reactive(LogView.empty, empty)
        self._lines: deque[str] = deque(maxlen=keep)
        self._rows: list[str] = []
        self._match: int | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        """The lines kept, oldest first."""
        return tuple(self._lines)

    @property
    def matches(self) -> list[int]:
        """The rows that hold what is sought, from the top."""
        wanted = self.sought.casefold()
        return [place for place, row in enumerate(self._rows) if wanted in row.casefold()] if wanted else []

    def watch_wrap(self) -> None:
        """Lay the lines out again."""
        self._lay_out()

    def render_line(self, y: int) -> Strip:
        """Return the row under the scroll position."""
        column, row = self.scroll_offset.x, self.scroll_offset.y + y
        text = self._rows[row] if row < len(self._rows) else ""
        width = self.scrollable_content_region.width
        if not self._rows:
            words = textwrap.wrap(self.empty, max(1, width))
            told = Segment(words[y] if y < len(words) else "", self.get_component_rich_style("log-view--empty"))
            return Strip([told]).crop_extend(0, width, self.rich_style)
        return Strip(self._marked(text)).crop_extend(column, column + width, self.rich_style)

    def on_resize(self) -> None:
        """Wrap for the new width."""
        self._lay_out()

    def extend(self, lines: Iterable[str]) -> None:
        """Append lines that are already free of control characters, as `visible_lines` returns them."""
        new = list(lines)
        if new:
            self._lines.extend(new)
            self._lay_out()

    def clear(self) -> None:
        """Drop all lines."""
        self._lines.clear()
        self._lay_out()

    def show_match(self, direction: int = -1, *, newest: bool = False) -> None:
        """Scroll to the match before or after the last one shown, or to the newest; after the end it begins again."""
        found = self.matches
        if not found:
            self._match = None
            return
        if newest or self._match is None:
            self._match = found[-1]
        elif direction < 0:
            self._match = max((row for row in found if row < self._match), default=found[-1])
        else:
            self._match = min((row for row in found if row > self._match), default=found[0])
        self.scroll_to(y=max(0, self._match - self.size.height // 2), animate=False)

    def _marked(self, text: str) -> list[Segment]:
        """Return a row with the sought text marked in it."""
        wanted, folded = self.sought.casefold(), text.casefold()
        if not wanted or len(folded) != len(text):  # where folding changes the length, positions would be wrong
            return [Segment(text, self.rich_style)]
        style, segments, begin = self.get_component_rich_style("log-view--found"), [], 0
        while (place := folded.find(wanted, begin)) >= 0:
            segments += [Segment(text[begin:place], self.rich_style), Segment(text[place : place + len(wanted)], style)]
            begin = place + len(wanted)
        return [*segments, Segment(text[begin:], self.rich_style)]

    def _lay_out(self) -> None:
        follows = self.is_vertical_scroll_end  # asked before the new lines move the end
        width = self.scrollable_content_region.width
        if self.wrap and width > 0:
            self._rows = [row for line in self._lines for row in _wrapped(line, width)]
            widest = width
        else:
            self._rows = list(self._lines)
            widest = max((cell_len(row) for row in self._rows), default=0)
        self.virtual_size = Size(widest, len(self._rows))
        self.refresh()
        if follows:
            self.scroll_end(animate=False, immediate=True)


def _wrapped(line: str, width: int) -> list[str]:
    """Cut a line into rows of at most `width` cells."""
    if cell_len(line) <= width:
        return [line]
    rows, row, used = [], "", 0
    for character in line:
        cells = cell_len(character)
        if used + cells > width and row:
            rows.append(row)
            row, used = "", 0
        row, used = row + character, used + cells
    return [*rows, row]
