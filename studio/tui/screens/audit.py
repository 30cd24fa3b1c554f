"""All audits, newest first, with the report of the one under the cursor; new ones are started from here."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from studio.core.events import Phase
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.probe.audit import copy_report, read_report
from studio.runs.control import request
from studio.runs.layout import RunPaths
from studio.runs.log_parts import log_tail
from studio.runs.requests import AuditRequest
from studio.runs.status import Status
from studio.runs.store import RunInfo, list_runs
from studio.tui.asks import OpenRun
from studio.tui.panels.audit_report import AuditReport
from studio.tui.screens.ask_audit import (
    AskAudit,
    Wish,
    base_request,
    base_wishes,
    race_request,
    race_wishes,
    run_request,
    run_wishes,
)
from studio.tui.screens.dialogs import AskLine, ask
from studio.tui.services import Services
from widgets.key_footer import KeyFooter
from widgets.whole_table import WholeTable

_COLUMNS = ("what", "status", "of")
_EMPTY = "\n\n".join(
    (
        "No audit yet. An audit measures, on held-out rows of your data, what 4 bits cost.",
        "b measures the base of the recipe, before any training: 16-bit beside NF4, FP4 and int8, and what suffers.",
        "e trains the recipe as LoRA and as QLoRA, and compares them.",
        "a on a finished run, in the list of runs, measures its adapter on every form of its base and merged into it, "
        "what it forgot, and how fast each form reads and writes on this machine.",
        "Of each it tells the task loss, which is the mean loss per learnt token: where the interval of a difference "
        "contains zero, it may be noise and is called that.",
        "KL says how far a form's answers are from those of the form that was trained, token by token, and the same "
        "top token how often both would say the same next word.",
        "Forgetting is the loss on a neutral text that has nothing to do with your data.",
    )
)
_WAITING = "This audit has no report yet: enter shows how far it is."
_RUNNING = "The audit goes on if you leave this screen. Enter shows its log; x stops it and keeps what was measured."
_LONGEST = 40
_Make = Callable[[Mapping[str, str]], AuditRequest]


class AuditScreen(Screen[None]):
    """`b` and `e` start an audit of the recipe, enter opens the run of one, `x` stops it, `w` writes its report."""

    HELP = "What 4 bits cost: of a base, of an adapter on each form of its base, or of a race of methods."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open run", priority=True),
        Binding("b", "audit_base", "Audit base"),
        Binding("e", "race", "Race"),
        Binding("x", "stop", "Stop"),
        Binding("w", "write", "Write report"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
        # These keys go to the report even while the list has the focus: the list is short, and the report is long.
        Binding("pagedown", "turn_report(1)", "Report down", show=False, priority=True),
        Binding("pageup", "turn_report(-1)", "Report up", show=False, priority=True),
    ]

    DEFAULT_CSS = """
    AuditScreen {
        & #audit-head { height: 1; padding: 0 1; text-style: bold; }
        & Horizontal { height: 1fr; }
        & DataTable { width: auto; min-width: 28; max-width: 44; height: 1fr; border-right: solid $foreground 20%; }
        & AuditReport { width: 1fr; height: 1fr; }
    }
    AuditScreen.-narrow Horizontal { layout: vertical; }
    AuditScreen.-narrow DataTable { width: 1fr; height: 5; max-width: 100%; border-right: none; }
    AuditScreen.-narrow #audit-words { height: 3fr; }
    AuditScreen.-narrow #audit-plot { min-height: 5; }
    """

    class Listed(Message):
        """The audits were read."""

        def __init__(self, infos: list[RunInfo], phases: dict[str, Phase]) -> None:
            """Carry the audits, and by name what live ones are busy with."""
            super().__init__()
            self.infos, self.phases = infos, phases

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
        services: Services,
        poll_seconds: float,
        run: RunPaths | None = None,
    ) -> None:
        """List the audits in a folder of runs, looking again every four `poll_seconds`.

        Args:
            recipe: What `b` and `e` audit.
            runs_root: Where runs live.
            services: What starts audits.
            poll_seconds: Pace of the studio.
            run: A training run whose adapter is to be audited.
        """
        super().__init__()
        self._recipe, self._runs_root, self._services = recipe, runs_root, services
        self._every_seconds, self._run = 4 * poll_seconds, run
        self._infos: dict[str, RunInfo] = {}
        self._phases: dict[str, Phase] = {}
        self._said: dict[str, dict[str, str]] = {}  # the last choices by kind of audit: the next question shows them
        self._ask_again: Callable[[str], None] | None = None

    def compose(self) -> ComposeResult:
        """Make the parts: head, list, report, keys."""
        yield Static("Audits", id="audit-head", markup=False)
        with Horizontal():
            yield WholeTable(cursor_type="row", zebra_stripes=True)
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
            title = f"Audit the adapter of {plain(run.name, one_line=True)}"
            self._ask("run", title, run_wishes(), partial(run_request, run))

    def on_audit_screen_listed(self, message: Listed) -> None:
        """Show what was found; read the report again where the audit under the cursor has another status."""
        before, chosen = self._infos, self._chosen
        self._infos, self._phases = {info.name: info for info in message.infos}, message.phases
        # A table that is cleared loses its cursor, so its rows are made anew only where audits came or went.
        if list(before) != list(self._infos):
            self._table.clear()
            for name, info in self._infos.items():
                self._table.add_row(*_cells(info), key=name)
            place = list(self._infos).index(chosen.name) if chosen and chosen.name in self._infos else 0
            self._table.move_cursor(row=place)
        else:
            for name, info in self._infos.items():
                if info.status is not before[name].status:
                    self._table.update_cell(name, "status", Text(info.status.name), update_width=True)
        self.refresh_bindings()
        now = self._chosen
        if now is not None and (now.name not in before or before[now.name].status is not now.status):
            self._load(now.paths)
        elif now is not None and now.status.live:
            self.query_one(AuditReport).show(None, self._without(now))

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Show the report of the audit under the cursor."""
        info = self._infos.get(str(event.row_key.value))
        if info is not None:
            self._load(info.paths)
        self.refresh_bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer keys only where they do something to the audit under the cursor."""
        if action == "turn_report":
            return self.is_mounted and self.query_one(AuditReport).longer
        if action not in ("open", "stop", "write"):
            return True
        chosen = self._chosen if self.is_mounted else None
        if chosen is None or action == "open":
            return chosen is not None
        return chosen.status.live if action == "stop" else chosen.paths.report.is_file()

    def on_audit_screen_loaded(self, message: Loaded) -> None:
        """Show a report, unless the cursor is elsewhere by now."""
        chosen = self._chosen
        if chosen is not None and chosen.paths == message.paths:
            self.query_one(AuditReport).show(message.report, self._without(chosen))

    def on_audit_screen_started(self, message: Started) -> None:
        """Watch the audit that was started; where it was refused, say why and ask again."""
        self.query_one("#audit-head", Static).update("Audits")
        if message.paths is not None:
            self.post_message(OpenRun(message.paths))
        elif self.is_current and self._ask_again is not None:
            self._ask_again(message.reason)
        else:
            self.notify(message.reason, severity="error", markup=False)

    def action_open(self) -> None:
        """Watch the run of the audit under the cursor."""
        if (chosen := self._chosen) is not None:
            self.post_message(OpenRun(chosen.paths))

    def action_audit_base(self) -> None:
        """Measure the base of the recipe."""
        title = f"Audit the base {plain(self._recipe.model.base, one_line=True)}"
        self._ask("base", title, base_wishes(), partial(base_request, self._recipe))

    def action_race(self) -> None:
        """Train the recipe as LoRA and as QLoRA."""
        title = f"Race {plain(self._recipe.name, one_line=True)} as LoRA and as QLoRA"
        self._ask("race", title, race_wishes(self._recipe), partial(race_request, self._recipe))

    def action_stop(self) -> None:
        """Ask the audit under the cursor to stop."""
        if (chosen := self._chosen) is not None:
            request(chosen.paths, "stop")
            self.notify("The audit stops after its current part and keeps what was measured.", markup=False)

    def action_write(self) -> None:
        """Ask for a folder and write the report there: a page, its figures, its pictures."""
        if (chosen := self._chosen) is None:
            return

        def written(word: str) -> None:
            files = copy_report(chosen.paths, Path(word).expanduser())
            names = ", ".join(path.name for path in files)
            self.notify(plain(f"{names} written to {word}", one_line=True), markup=False)

        folder = f"{plain(chosen.name, one_line=True)}-report"
        hint = "Markdown, JSON and SVG pictures."
        self.app.push_screen(AskLine("Write the report to which folder?", folder, hint=hint, check=written))

    def action_turn_report(self, direction: int) -> None:
        """Scroll the report a page, wherever the cursor stands."""
        self.query_one(AuditReport).turn(direction)

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss()

    @work(thread=True, exclusive=True, group="audit-list")
    def look(self) -> None:
        """Read the list."""
        infos = [info for info in list_runs(self._runs_root) if info.job == "audit"]
        seen = {info.name: log_tail(info.paths.events).last(Phase) for info in infos if info.status.live}
        self.post_message(self.Listed(infos, {name: phase for name, phase in seen.items() if phase}))

    @property
    def _table(self) -> "DataTable[Text]":
        return cast("DataTable[Text]", self.query_one(DataTable))

    @property
    def _chosen(self) -> RunInfo | None:
        names, row = list(self._infos), self._table.cursor_row
        return self._infos[names[row]] if 0 <= row < len(names) else None

    def _without(self, info: RunInfo) -> str:
        """Return why an audit has no report, or how far it is."""
        if info.status in (Status.failed, Status.crashed):
            return f"This audit {info.status.name}: enter shows why."
        if info.status is Status.stopped:
            return "This audit was stopped: in the list of runs, R goes on after the last whole part."
        phase = self._phases.get(info.name)
        if phase is None or not info.status.live:
            return _WAITING
        done = "" if phase.fraction is None else f" {phase.fraction:.0%}"
        return f"{phase.name}{done}  {phase.detail}\n\n{_RUNNING}"

    @work(thread=True, exclusive=True, group="audit-report")
    def _load(self, paths: RunPaths) -> None:
        self.post_message(self.Loaded(paths, read_report(paths)))

    def _ask(self, what: str, title: str, wishes: Sequence[Wish], make: _Make, refused: str = "") -> None:
        """Ask what is to be measured, then begin; `refused` is what was wrong the last time."""
        self._ask_again = partial(self._ask, what, title, wishes, make)

        def take(said: dict[str, str]) -> None:
            self._said[what] = said
            self._begin(lambda: make(said))

        ask(self.app, AskAudit(title, wishes, self._said.get(what, {}), refused=refused), take)

    def _begin(self, make: Callable[[], AuditRequest]) -> None:
        self.query_one("#audit-head", Static).update("Audits: checking and starting ...")
        self._begin_in_thread(make)

    @work(thread=True, exclusive=True, group="audit-start")
    def _begin_in_thread(self, make: Callable[[], AuditRequest]) -> None:
        try:
            paths = self._services.start(make(), self._runs_root)
        except StudioError as error:
            self.post_message(self.Started(None, plain(str(error))))
        else:
            self.post_message(self.Started(paths))


def _cells(info: RunInfo) -> tuple[Text, Text, Text]:
    about = plain(info.name.removeprefix(f"audit-{info.method}-"), one_line=True)
    shown = about if len(about) <= _LONGEST else f"...{about[3 - _LONGEST :]}"
    return Text(plain(info.method or "?", one_line=True, limit=8)), Text(info.status.name), Text(shown)
