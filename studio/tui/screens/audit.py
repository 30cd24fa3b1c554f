"""All audits, newest first, with the report of the one under the cursor; new ones are started from here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Static

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.runs.audit_request import AuditRequest
from studio.runs.layout import RunPaths
from studio.runs.status import Status
from studio.runs.store import RunInfo, list_runs
from studio.tui.asks import OpenRun
from studio.tui.panels.audit_report import AuditReport
from widgets.key_footer import KeyFooter

_COLUMNS = ("what", "status", "of")
_EMPTY = (
    "No audit yet. An audit measures, on held-out rows of your data, what 4 bits cost. b measures the base of the "
    "recipe, before any training. e trains the recipe as LoRA and as QLoRA and compares them. An adapter is audited "
    "from the list of runs, with a on a finished run."
)
_WAITING = "This audit has no report yet: enter shows how far it is."
_LONGEST = 40

Start = Callable[[AuditRequest, Path], RunPaths]
Read = Callable[[RunPaths], dict[str, Any] | None]


def _start(request: AuditRequest, runs_root: Path) -> RunPaths:
    from studio.probe.audit import start_audit  # noqa: PLC0415  0.15 s, needed only when one is started

    return start_audit(request, runs_root)


def _read(paths: RunPaths) -> dict[str, Any] | None:
    from studio.probe.audit import read_report  # noqa: PLC0415  as above

    return read_report(paths)


class AuditScreen(Screen[None]):
    """`b` and `e` start an audit of the recipe, enter opens the run of one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open its run", priority=True),
        Binding("b", "audit_base", "Audit the base"),
        Binding("e", "race", "Race LoRA/QLoRA"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    AuditScreen {
        & #audit-head { height: 1; padding: 0 1; text-style: bold; }
        & Horizontal { height: 1fr; }
        & DataTable { width: 44; height: 1fr; border-right: solid $foreground 20%; }
        & AuditReport { width: 1fr; height: 1fr; }
    }
    AuditScreen.-narrow Horizontal { layout: vertical; }
    AuditScreen.-narrow DataTable { width: 1fr; height: 7; border-right: none; }
    """

    class Listed(Message):
        """The audits were read."""

        def __init__(self, infos: list[RunInfo]) -> None:
            """Carry what was found."""
            super().__init__()
            self.infos = infos

    class Loaded(Message):
        """A report was read."""

        def __init__(self, paths: RunPaths, report: dict[str, Any] | None) -> None:
            """Carry it; None where there is none."""
            super().__init__()
            self.paths, self.report = paths, report

    class Started(Message):
        """An audit was started, or refused."""

        def __init__(self, paths: RunPaths | None, reason: str = "") -> None:
            """Carry the run, or why there is none."""
            super().__init__()
            self.paths, self.reason = paths, reason

    def __init__(
        self,
        recipe: Recipe,
        runs_root: Path,
        *,
        poll_seconds: float,
        run: RunPaths | None = None,
        start: Start = _start,
        read: Read = _read,
    ) -> None:
        """List the audits in a folder of runs, looking again every four `poll_seconds`.

        Args:
            recipe: What `b` and `e` audit.
            runs_root: Where runs live.
            poll_seconds: Pace of the studio.
            run: A training run whose adapter is audited at once.
            start: Starts an audit; raises StudioError.
            read: Reads a report.
        """
        super().__init__()
        self._recipe, self._runs_root, self._start_audit, self._read_report = recipe, runs_root, start, read
        self._every_seconds, self._run = 4 * poll_seconds, run
        self._infos: dict[str, RunInfo] = {}

    def compose(self) -> ComposeResult:
        """Head, list, report, keys."""
        yield Static("Audits", id="audit-head", markup=False)
        with Horizontal():
            yield DataTable[Text](cursor_type="row", zebra_stripes=True)
            yield AuditReport()
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to look."""
        table = self._table
        for column in _COLUMNS:
            table.add_column(column, key=column)
        table.focus()
        self.query_one(AuditReport).show(None, _EMPTY)
        self.look()
        self.set_interval(self._every_seconds, self.look)
        if (run := self._run) is not None:
            self._begin(lambda: _run_request(run))

    def on_audit_screen_listed(self, message: Listed) -> None:
        """Show what was found; the report is read again where the audit under the cursor has moved on."""
        before, chosen = self._infos, self._chosen
        self._infos = {info.name: info for info in message.infos}
        if list(before) != list(self._infos):
            self._table.clear()
            for name, info in self._infos.items():
                self._table.add_row(*_cells(info), key=name)
            place = list(self._infos).index(chosen.name) if chosen and chosen.name in self._infos else 0
            self._table.move_cursor(row=place)
        else:
            for name, info in self._infos.items():
                self._table.update_cell(name, "status", Text(info.status.name))
        now = self._chosen
        if now is not None and (now.name not in before or before[now.name].status is not now.status):
            self._load(now.paths)

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Show the report of the audit under the cursor."""
        info = self._infos.get(str(event.row_key.value))
        if info is not None:
            self._load(info.paths)

    def on_audit_screen_loaded(self, message: Loaded) -> None:
        """Show a report, unless the cursor is elsewhere by now."""
        chosen = self._chosen
        if chosen is not None and chosen.paths == message.paths:
            self.query_one(AuditReport).show(message.report, _without(chosen))

    def on_audit_screen_started(self, message: Started) -> None:
        """Watch the audit that was started, or say why there is none."""
        self.query_one("#audit-head", Static).update("Audits")
        if message.paths is None:
            self.notify(message.reason, severity="error", timeout=10, markup=False)
            return
        self.post_message(OpenRun(message.paths))

    def action_open(self) -> None:
        """Watch the run of the audit under the cursor."""
        if (chosen := self._chosen) is not None:
            self.post_message(OpenRun(chosen.paths))

    def action_audit_base(self) -> None:
        """Measure the base of the recipe."""
        self._begin(lambda: _base_request(self._recipe))

    def action_race(self) -> None:
        """Train the recipe as LoRA and as QLoRA."""
        self._begin(lambda: _race_request(self._recipe))

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss()

    @work(thread=True, exclusive=True, group="audit-list")
    def look(self) -> None:
        """Read the list."""
        self.post_message(self.Listed([info for info in list_runs(self._runs_root) if info.job == "audit"]))

    @property
    def _table(self) -> "DataTable[Text]":
        return cast("DataTable[Text]", self.query_one(DataTable))

    @property
    def _chosen(self) -> RunInfo | None:
        names, row = list(self._infos), self._table.cursor_row
        return self._infos[names[row]] if 0 <= row < len(names) else None

    @work(thread=True, exclusive=True, group="audit-report")
    def _load(self, paths: RunPaths) -> None:
        self.post_message(self.Loaded(paths, self._read_report(paths)))

    def _begin(self, make: Callable[[], AuditRequest]) -> None:
        self.query_one("#audit-head", Static).update("Audits: checking and starting ...")
        self._begin_in_thread(make)

    @work(thread=True, exclusive=True, group="audit-start")
    def _begin_in_thread(self, make: Callable[[], AuditRequest]) -> None:
        try:
            paths = self._start_audit(make(), self._runs_root)
        except StudioError as error:
            self.post_message(self.Started(None, plain(str(error))))
        else:
            self.post_message(self.Started(paths))


def _run_request(paths: RunPaths) -> AuditRequest:
    from studio.probe.audit import audit_of_run  # noqa: PLC0415  as below

    return audit_of_run(paths)


def _base_request(recipe: Recipe) -> AuditRequest:
    from studio.probe.audit import data_path  # noqa: PLC0415  0.15 s, needed only when an audit is started

    return AuditRequest(
        "base",
        model=recipe.model.base,
        revision=recipe.model.revision,
        data=data_path(recipe.data.path),
        format=recipe.data.format,
        seed=str(recipe.train.seed),
        seq_len=str(recipe.train.seq_len),
    )


def _race_request(recipe: Recipe) -> AuditRequest:
    from studio.runs.recipe_file import dump_recipe  # noqa: PLC0415  tomlkit

    return AuditRequest("race", model=recipe.model.base, recipe=dump_recipe(recipe))


def _cells(info: RunInfo) -> tuple[Text, Text, Text]:
    about = plain(info.model or info.name, one_line=True)
    shown = about if len(about) <= _LONGEST else f"...{about[3 - _LONGEST :]}"
    return Text(plain(info.method or "?", one_line=True, limit=8)), Text(info.status.name), Text(shown)


def _without(info: RunInfo) -> str:
    """Return why there is no report."""
    if info.status in (Status.failed, Status.crashed):
        return f"This audit {info.status.name}: enter shows why."
    if info.status is Status.stopped:
        return "This audit was stopped: in the list of runs, R goes on after its last whole block."
    return _WAITING
