"""The list of all runs, newest first, kept up to date."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import DataTable, Input, Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.checkpoints import NoWholeCheckpoint
from studio.runs.note import check_note, write_note
from studio.runs.status import Status
from studio.runs.store import RunInfo, contents_of, list_runs, remove_run
from studio.tui.asks import OpenRun, ShowAudits, ShowMerge
from studio.tui.copying import Copied, folder_of
from studio.tui.panels.outcome import TRAIN, has_adapter, no_adapter_words
from studio.tui.panels.runs_table import LONGEST, RunsTable
from studio.tui.screens.compare import MOST, CompareScreen
from studio.tui.screens.dialogs import AskLine, Confirm, start_over_question
from studio.tui.screens.offers import OfferingScreen, offered
from studio.tui.services import Services
from widgets.key_footer import KeyFooter

_OF_A_RUN = ("resume", "mark", "compare", "audit", "merge", "note", "remove")
"""Actions that need a run under the cursor."""


class RunsScreen(OfferingScreen[None]):
    """The list of runs. Enter opens one."""

    HELP = "All runs, the newest first. What is made of a run (merge, audit, another round) starts here."
    BINDINGS: ClassVar[list[BindingType]] = [
        *offered("R", "resume", "Resume"),
        *offered("space", "mark", "Mark"),
        *offered("c", "compare", "Compare"),
        *offered("a", "audit", "Audit"),
        *offered("m", "merge", "Merge"),
        *offered("n", "note", "Note"),
        *offered("d", "remove", "Delete"),
        Binding("slash", "filter", "Filter"),
        Binding("down", "to_table", "To the list", show=False),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    RunsScreen {
        & #runs-head { height: 1; padding: 0 1; text-style: bold; }
        & DataTable { height: 1fr; }
        & #runs-filter { display: none; }
        & #runs-filter.-shown { display: block; }
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
        services: Services,
        poll_seconds: float,
        lister: Callable[[Path], list[RunInfo]] = list_runs,
    ) -> None:
        """List the runs in a folder, looking again every four `poll_seconds`."""
        super().__init__()
        self._runs_root, self._services, self._lister = runs_root, services, lister
        self._poll_seconds = poll_seconds
        self._infos: dict[str, RunInfo] = {}
        self._count = 0
        self._marked: set[str] = set()

    def compose(self) -> ComposeResult:
        """Make the parts: head, filter, table, keys."""
        yield Static("Runs", id="runs-head", markup=False)
        yield Input(placeholder="a part of status, name, method, model or note", compact=True, id="runs-filter")
        yield RunsTable()
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to look."""
        self._table.focus()
        self._read()
        self.set_interval(4 * self._poll_seconds, self._read)

    def on_runs_screen_listed(self, message: Listed) -> None:
        """Show what was read."""
        self._infos = {info.name: info for info in message.infos}
        self._marked &= set(self._infos)
        self._show_rows()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Narrow the list."""
        event.stop()
        self._show_rows()

    def _show_rows(self) -> None:
        """Show the runs that the filter lets through."""
        words = self._filter.value.lower().split()
        self._count = self._table.show(self._infos.values(), marked=self._marked, words=words)
        self.refresh_bindings()
        head, told = self.query_one("#runs-head", Static), self._head()
        if told != head.content:  # an update repaints even where the text is the same
            head.update(told)

    def _head(self) -> str:
        root, count = plain(str(self._runs_root), one_line=True), len(self._infos)
        if not count:
            return f"No runs yet in {root}. Escape goes back, r starts one."
        fewer = f"{self._count} of " if self._count != count else ""
        return f"{fewer}{count} run{'s' * (count != 1)} in {root}"

    def why_not(self, action: str) -> str:
        """Return why a key does nothing now: there is no run under the cursor, or the key is not for such a run."""
        if action not in _OF_A_RUN:
            return ""
        info = self._chosen if self.is_mounted else None
        if info is None:
            return "There is no run to do that with."
        if action == "resume" and (info.status.live or info.status is Status.finished):
            return f"The run is {'alive' if info.status.live else 'finished'}: there is nothing to resume."
        shows_result = action == "merge" and info.job == "merge"
        return _why_no_adapter(info, action) if action in ("audit", "merge") and not shows_result else ""

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Offer the keys that are for the run under the cursor."""
        event.stop()
        self.refresh_bindings()

    def action_resume(self) -> None:
        """Continue the chosen run and watch it."""
        if self._chosen is not None:
            self._resume(self._chosen)

    def action_filter(self) -> None:
        """Type what the list is narrowed to."""
        self._filter.set_class(True, "-shown")
        self._filter.focus()

    def action_to_table(self) -> None:
        """Go from the filter to the list."""
        self._table.focus()

    def action_mark(self) -> None:
        """Mark the chosen run for a comparison, or take the mark back."""
        info = self._chosen
        if info is None:
            return
        if info.job not in (None, TRAIN):
            self.app.notify("Only training runs have curves to compare.", markup=False)
            return
        self._marked ^= {info.name}
        self._show_rows()

    def action_compare(self) -> None:
        """Put the marked runs beside each other."""
        marked = [info.paths for name, info in self._infos.items() if name in self._marked]
        if 2 <= len(marked) <= MOST:
            self.app.push_screen(CompareScreen(marked))
        else:
            self.app.notify(f"{len(marked)} marked: mark 2 to {MOST} runs with space.", markup=False)

    def action_audit(self) -> None:
        """Audit the chosen run's adapter."""
        if self._chosen is not None:
            self.post_message(ShowAudits(self._chosen.paths))

    def action_merge(self) -> None:
        """Merge the chosen run's adapter; of a merge, show what came of it."""
        if self._chosen is not None:
            self.post_message(ShowMerge(self._chosen.paths))

    def action_remove(self) -> None:
        """Ask, then delete the chosen run with its checkpoints and adapter."""
        info = self._chosen
        if info is None:
            return
        if info.status.live:
            self.app.notify("The run is alive: stop it first.", markup=False)
            return
        name = plain(info.name, one_line=True, limit=LONGEST)
        stays = "" if info.job in (None, TRAIN) else " Models and files that it made stay."
        question = Content(f"Delete {name}: {contents_of(info.paths)}?{stays} This cannot be undone.")

        def decide(answer: bool | None) -> None:
            if answer:
                self._remove(info)

        self.app.push_screen(Confirm(question, "delete it"), decide)

    def action_note(self) -> None:
        """Write a few words on the chosen run."""
        info = self._chosen
        if info is None:
            return

        def take(text: str | None) -> None:
            if text is not None:
                self._write_note(info, text)

        name = plain(info.name, one_line=True, limit=LONGEST)
        self.app.push_screen(AskLine(f"A note on {name}", info.note, check=check_note), take)

    def to_copy(self) -> Copied | None:
        """Return the place of the chosen run."""
        return folder_of(self._chosen.paths) if self._chosen is not None else None

    def action_leave(self) -> None:
        """Close the filter; where none is open, go back."""
        if self._filter.has_class("-shown"):
            self._filter.value = ""
            self._filter.set_class(False, "-shown")
            self._table.focus()
        else:
            self.dismiss()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go from the filter to the list, after Enter."""
        event.stop()
        self._table.focus()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Watch the chosen run, after Enter or a click on it."""
        event.stop()
        if self._chosen is not None:
            self.post_message(OpenRun(self._chosen.paths))

    @work(thread=True, exclusive=True, group="resume")
    def _resume(self, info: RunInfo, *, over: bool = False) -> None:
        try:
            self._services.resume(info.paths, from_start=over)
        except NoWholeCheckpoint as error:
            self.app.call_from_thread(self._ask_to_start_over, info, start_over_question(error))
            return
        except StudioError as error:
            self.app.call_from_thread(self.app.notify, plain(str(error)), severity="error", markup=False)
            return
        self.post_message(OpenRun(info.paths))

    def _ask_to_start_over(self, info: RunInfo, question: str) -> None:
        def decide(answer: bool | None) -> None:
            if answer:
                self._resume(info, over=True)

        self.app.push_screen(Confirm(Content(question), "start over"), decide)

    @work(thread=True, group="remove")
    def _remove(self, info: RunInfo) -> None:
        try:
            remove_run(info.paths)
        except StudioError as error:
            self.app.call_from_thread(self.app.notify, plain(str(error)), severity="error", markup=False)
        self.app.call_from_thread(self._read)

    @work(thread=True, group="note")
    def _write_note(self, info: RunInfo, text: str) -> None:
        try:
            write_note(info.paths, text)
        except StudioError as error:
            self.app.call_from_thread(self.app.notify, plain(str(error)), severity="error", markup=False)
        self.app.call_from_thread(self._read)

    @work(thread=True, exclusive=True, group="list")
    def _read(self) -> None:
        self.post_message(self.Listed(self._lister(self._runs_root)))

    @property
    def _table(self) -> RunsTable:
        return self.query_one(RunsTable)

    @property
    def _filter(self) -> Input:
        return self.query_one("#runs-filter", Input)

    @property
    def _chosen(self) -> RunInfo | None:
        return self._table.chosen


def _why_no_adapter(info: RunInfo, action: str) -> str:
    """Return why a run has nothing to audit or to merge; empty where it has."""
    if info.job not in (None, TRAIN):
        return f"Only a training run has an adapter to {action}."
    if action == "audit" and info.status.live:
        return "A run is audited when it has ended."
    return "" if has_adapter(info.paths) else no_adapter_words(info.status)
