"""The rows of the list of runs: what stands in each, which ones the filter lets through, which one is chosen."""

import math
import time
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType

from studio.core.text import plain
from studio.runs.status import Status
from studio.runs.store import RunInfo
from studio.tui.readable import UNKNOWN, number
from widgets.whole_table import WholeTable

LONGEST = 48
_LONGEST_NOTE = 32
_COLUMNS = ("status", "name", "step", "loss", "held-out", "note", "started", "method", "model")
_STYLES = {Status.failed: "red", Status.crashed: "red", Status.running: "green", Status.starting: "green"}


class RunsTable(WholeTable):
    """A table that says in the footer what Enter does.

    A priority key of the screen could say it, too, but Enter would then overtake arrow keys that were typed before it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "Open"),
        # In Textual's own table these keys go to the first and the last column; the names of the runs are then hidden.
        Binding("home", "scroll_top", "First run", show=False),
        Binding("end", "scroll_bottom", "Last run", show=False),
    ]

    def __init__(self) -> None:
        """Start empty."""
        super().__init__(cursor_type="row", zebra_stripes=True)
        self._shown: dict[str, list[Text]] = {}
        self._infos: dict[str, RunInfo] = {}

    def on_mount(self) -> None:
        """Name the columns."""
        for column in _COLUMNS:
            self.add_column(column, key=column)

    @property
    def chosen(self) -> RunInfo | None:
        """The run under the cursor."""
        names = [name for name in self._shown if name in self._infos]
        return self._infos[names[self.cursor_row]] if 0 <= self.cursor_row < len(names) else None

    def show(self, infos: Iterable[RunInfo], *, marked: AbstractSet[str], words: Sequence[str]) -> int:
        """Show the runs in which every word is found, and return how many they are; repaint only cells that changed."""
        before, chosen = self._shown, self.chosen
        self._infos = {info.name: info for info in infos}
        self._shown = {
            name: _cells(info, name in marked)
            for name, info in self._infos.items()
            if all(word in _searched(info) for word in words)
        }
        # A table that is cleared loses its cursor, so its rows are made anew only where runs came or went.
        if list(self._shown) != list(before):
            self.clear()
            for name, cells in self._shown.items():
                self.add_row(*cells, key=name)
            if chosen is not None and chosen.name in self._shown:
                self.move_cursor(row=self.get_row_index(chosen.name))
            return len(self._shown)
        for name, cells in self._shown.items():
            for column, cell, old in zip(_COLUMNS, cells, before[name], strict=True):
                if cell.plain != old.plain:
                    self.update_cell(name, column, cell, update_width=len(cell) != len(old))
        return len(self._shown)


def _searched(info: RunInfo) -> str:
    return " ".join(
        str(word) for word in (info.status, info.name, info.job, info.method, info.model, info.note)
    ).lower()


def _cells(info: RunInfo, marked: bool) -> list[Text]:
    """Return a row. Text objects, because a table reads strings as markup."""
    step = (
        UNKNOWN if info.last_step is None else f"{info.last_step}/{info.total}" if info.total else str(info.last_step)
    )
    began = _when(info.started_at) if info.started_at else UNKNOWN
    method = info.method or info.job  # a merge has no method: its kind is shown instead
    words = [plain(word or UNKNOWN, one_line=True, limit=LONGEST) for word in (info.name, method, info.model)]
    numbers = [_loss(info.last_loss), _loss(info.eval_loss)]
    status = Text(str(info.status), style=_STYLES.get(info.status, ""))
    name = f"{'* ' if marked else ''}{words[0]}"
    note = plain(info.note, one_line=True, limit=_LONGEST_NOTE)
    return [status, *(Text(text) for text in (name, step, *numbers, note, began, *words[1:]))]


def _when(at: float) -> str:
    """Return the time of day for today, else the day. It is short, so that the column is visible at 80 columns."""
    then = time.localtime(at)
    return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "%Y-%m-%d", then)


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else number(value) if math.isfinite(value) else str(value)
