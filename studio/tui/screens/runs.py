"""All runs, newest first, with how they stand now."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.status import Status
from studio.runs.store import RunInfo, list_runs
from studio.tui.asks import OpenRun
from studio.tui.engine import Engine
from studio.tui.readable import UNKNOWN, number

_COLUMNS = ("status", "name", "step", "loss", "held-out", "started", "method", "model")
_STYLES = {Status.failed: "red", Status.crashed: "red", Status.running: "green", Status.starting: "green"}
_LONGEST = 48


class RunsScreen(Screen[None]):
    """The list of runs. Enter opens one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open", priority=True),
        Binding("R", "resume", "Resume"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    RunsScreen {
        & #runs-head { height: 1; padding: 0 1; text-style: bold; }
        & DataTable { height: 1fr; }
    }
    """

    class Listed(Message):
        """The runs were read."""

        def __init__(self, infos: list[RunInfo]) -> None:
            """Carry what was found."""
            super().__init__()
            self.infos = infos

    def __init__(
        self,
        runs_root: Path,
        *,
        engine: Engine,
        poll_seconds: float,
        lister: Callable[[Path], list[RunInfo]] = list_runs,
    ) -> None:
        """List the runs in a folder, looking again every four `poll_seconds`."""
        super().__init__()
        self._runs_root, self._engine, self._lister = runs_root, engine, lister
        self._every_seconds = 4 * poll_seconds
        self._infos: dict[str, RunInfo] = {}

    def compose(self) -> ComposeResult:
        """Head, table, keys."""
        yield Static("Runs", id="runs-head", markup=False)
        yield DataTable[Text](cursor_type="row", zebra_stripes=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to look."""
        table = self._table
        for column in _COLUMNS:
            table.add_column(column, key=column)
        self._read()
        self.set_interval(self._every_seconds, self._read)

    def on_runs_screen_listed(self, message: Listed) -> None:
        """Show what was read; only cells that changed are repainted."""
        infos = {info.name: info for info in message.infos}
        table = self._table
        if list(infos) != list(self._infos):
            chosen = self._chosen
            table.clear()
            for info in message.infos:
                table.add_row(*_cells(info), key=info.name)
            if chosen is not None and chosen.name in infos:
                table.move_cursor(row=table.get_row_index(chosen.name))
        else:
            for name, info in infos.items():
                for column, cell, old in zip(_COLUMNS, _cells(info), _cells(self._infos[name]), strict=True):
                    if cell.plain != old.plain:
                        table.update_cell(name, column, cell)
        self._infos = infos
        root = plain(str(self._runs_root), one_line=True)
        head = (
            f"{len(infos)} run{'s' * (len(infos) != 1)} in {root}"
            if infos
            else f"No runs yet in {root}. Escape goes back, r starts one."
        )
        self.query_one("#runs-head", Static).update(head)

    def action_open(self) -> None:
        """Watch the chosen run."""
        if self._chosen is not None:
            self.post_message(OpenRun(self._chosen.paths))

    def action_resume(self) -> None:
        """Continue the chosen run and watch it."""
        info = self._chosen
        if info is None:
            return
        if info.status.live or info.status is Status.finished:
            self.app.notify(f"The run is {info.status}: there is nothing to resume.", markup=False)
            return
        self._resume(info)

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """A click on the chosen row opens it."""
        event.stop()
        self.action_open()

    @work(thread=True, exclusive=True, group="resume")
    def _resume(self, info: RunInfo) -> None:
        try:
            self._engine.resume(info.paths)
        except StudioError as error:
            self.app.call_from_thread(self.app.notify, plain(str(error)), severity="error", markup=False)
            return
        self.post_message(OpenRun(info.paths))

    @work(thread=True, exclusive=True, group="list")
    def _read(self) -> None:
        self.post_message(self.Listed(self._lister(self._runs_root)))

    @property
    def _table(self) -> "DataTable[Text]":
        return self.query_one(DataTable)

    @property
    def _chosen(self) -> RunInfo | None:
        names, row = list(self._infos), self._table.cursor_row
        return self._infos[names[row]] if 0 <= row < len(names) else None


def _cells(info: RunInfo) -> list[Text]:
    """Return a row. Text objects, because a table reads strings as markup."""
    step = (
        UNKNOWN if info.last_step is None else f"{info.last_step}/{info.total}" if info.total else str(info.last_step)
    )
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.started_at)) if info.started_at else UNKNOWN
    words = [plain(word or UNKNOWN, one_line=True, limit=_LONGEST) for word in (info.name, info.method, info.model)]
    numbers = [_loss(info.last_loss), _loss(info.eval_loss)]
    status = Text(str(info.status), style=_STYLES.get(info.status, ""))
    return [status, *(Text(text) for text in (words[0], step, *numbers, began, *words[1:]))]


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else number(value) if math.isfinite(value) else str(value)
