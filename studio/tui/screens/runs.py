"""The runs of each kind, newest first, kept up to date, beside what is worth knowing of the one under the cursor."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.checkpoints import NoWholeCheckpoint
from studio.runs.extension import HINT, Wish, wish_in
from studio.runs.log_parts import sample_steps
from studio.runs.note import check_note, write_note
from studio.runs.status import Status
from studio.runs.store import RunInfo, contents_of, list_runs, remove_run
from studio.tui.asks import OpenRun, ShowAudits, ShowMerge
from studio.tui.copying import Copied, folder_of
from studio.tui.panels.outcome import TRAIN, why_no_adapter
from studio.tui.panels.run_preview import FIRST_RUN, Closer, RunPreview, look_closer
from studio.tui.panels.runs_list import GROUPS, LONGEST, RunsList, group_name, group_of, matches
from studio.tui.readable import spark
from studio.tui.screens.compare import MOST, CompareScreen
from studio.tui.screens.dialogs import AskLine, Confirm, ask, if_agreed, start_over_question
from studio.tui.screens.offers import OfferingScreen, offered
from studio.tui.services import Services
from widgets.key_footer import KeyFooter
from widgets.tab_row import TabRow

_SPARK_STEPS = 32
_OF_A_RUN = ("resume", "extend", "mark", "compare", "audit", "merge", "note", "remove")
"""Actions that need a run under the cursor."""


class RunsScreen(OfferingScreen[None]):
    """The list of runs, one group at a time. Enter opens one."""

    HELP = "The runs of each kind, the newest first. What is made of a run (merge, audit, another round) starts here."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "next_group(1)", "Group", priority=True),
        Binding("shift+tab", "next_group(-1)", "Group before", show=False, priority=True),
        Binding("slash", "filter", "Filter"),
        *offered("R", "resume", "Resume"),
        *offered("e", "extend", "Extend"),
        *offered("space", "mark", "Mark"),
        *offered("c", "compare", "Compare"),
        *offered("a", "audit", "Audit"),
        *offered("m", "merge", "Merge"),
        *offered("n", "note", "Note"),
        *offered("d", "remove", "Delete"),
        Binding("down", "to_list", "To the list", show=False),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    RunsScreen {
        & TabRow { padding: 0 1; }
        & #runs-filter { display: none; margin: 0 1; }
        & #runs-filter.-shown { display: block; }
        & #runs-panels { height: 1fr; }
        & #runs-panels > * {
            border-top: round $foreground 40%;
            border-title-style: bold;
            border-title-color: $text-primary;
            border-subtitle-color: $text-muted;
        }
        & #runs-of { height: 1fr; padding: 0 1; }
        & RunPreview { height: auto; max-height: 10; }
    }
    RunsScreen.-wide #runs-panels {
        layout: horizontal;
        & > * { border: round $foreground 40%; height: 1fr; max-height: 100%; }
        & #runs-of { width: 3fr; }
        & RunPreview { width: 2fr; }
    }
    RunsScreen.-wide.-tall RunPreview.-has-curve > LinePlot { display: block; }
    """

    class Listed(Message):
        """The runs were read."""

        def __init__(self, infos: list[RunInfo], sparks: dict[str, str]) -> None:
            """Carry what was found, and by name the curves of losses."""
            super().__init__()
            self.infos, self.sparks = infos, sparks

    class LookedCloser(Message):
        """The run under the cursor was read."""

        def __init__(self, closer: Closer) -> None:
            """Carry what was found."""
            super().__init__()
            self.closer = closer

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
        self._sparks: dict[str, str] = {}
        self._group = self._told = ""
        self._marked: set[str] = set()
        self._looked_at: tuple[RunInfo, RunInfo | None] | None = None

    def compose(self) -> ComposeResult:
        """Make the parts: groups, filter, list, what is known of the chosen run, keys."""
        yield TabRow((), "")
        yield Input(placeholder="a part of status, name, method, model or note", compact=True, id="runs-filter")
        with Container(id="runs-panels"):
            with Vertical(id="runs-of"):
                yield RunsList()
            yield RunPreview()
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to look."""
        self._list.focus()
        self._read()
        self.set_interval(4 * self._poll_seconds, self._read)

    def on_runs_screen_listed(self, message: Listed) -> None:
        """Show what was read."""
        self._infos, self._sparks = {info.name: info for info in message.infos}, message.sparks
        self._marked &= set(self._infos)
        self._show_rows()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Narrow the list."""
        event.stop()
        self._show_rows()

    def on_runs_screen_looked_closer(self, message: LookedCloser) -> None:
        """Show what was found, unless the cursor is elsewhere by now."""
        if self._chosen is not None and self._chosen.paths == message.closer.info.paths:
            self.query_one(RunPreview).show(message.closer)

    def on_tab_row_wanted(self, message: TabRow.Wanted) -> None:
        """Show the group whose name was clicked."""
        self._group = message.key
        self._show_rows()

    def action_next_group(self, direction: int) -> None:
        """Show the next group or the one before."""
        groups = list(self._groups)
        if self._group in groups:
            self._group = groups[(groups.index(self._group) + direction) % len(groups)]
            self._show_rows()

    @property
    def _groups(self) -> dict[str, list[RunInfo]]:
        """The runs of each kind of which there are some."""
        kinds = {key: [info for info in self._infos.values() if group_of(info) == key] for key in GROUPS}
        return {key: infos for key, infos in kinds.items() if infos}

    def _show_rows(self) -> None:
        """Show the runs of the group that the filter lets through."""
        words, groups = self._filter.value.lower().split(), self._groups
        found = {key: [info for info in infos if matches(info, words)] for key, infos in groups.items()}
        if self._group not in groups:
            self._group = next(iter(groups), "")
        if words and not found.get(self._group):  # what is sought is in another group
            self._group = next((key for key, infos in found.items() if infos), self._group)
        self.query_one(TabRow).names = tuple((key, group_name(key, found[key], groups[key])) for key in groups)
        self.query_one(TabRow).current = self._group
        self._list.show(found.get(self._group, ()), marked=self._marked, sparks=self._sparks)
        self._tell(self._head(sum(map(len, found.values()))))
        self.refresh_bindings()
        self._look_closer()

    def _tell(self, head: str) -> None:
        """Say what is listed, as the panel's title; a title repaints even where it is the same."""
        if head != self._told:
            self._told = head
            self.query_one("#runs-of").border_title = Content(head)

    def _head(self, shown: int) -> str:
        root, count = plain(str(self._runs_root), one_line=True), len(self._infos)
        if not count:
            return f"No runs yet in {root}. Escape goes back, r starts one."
        fewer = f"{shown} of " if shown != count else ""
        return f"{fewer}{count} run{'s' * (count != 1)} in {root}"

    def why_not(self, action: str) -> str:
        """Return why a key does nothing now: there is no run under the cursor, or the key is not for such a run."""
        if action not in _OF_A_RUN:
            return "There is no other group." if action == "next_group" and len(self._groups) < 2 else ""
        info = self._chosen if self.is_mounted else None
        if info is None:
            return "There is no run to do that with."
        if action == "resume" and (info.status.live or info.status is Status.finished):
            return f"The run is {'alive' if info.status.live else 'finished'}: there is nothing to resume."
        if action == "extend" and (info.status.live or info.job not in (None, TRAIN)):
            return "The run is alive: stop it first." if info.status.live else "Only a training run trains longer."
        shows_result = action == "merge" and info.job == "merge"
        return why_no_adapter(info, action) if action in ("audit", "merge") and not shows_result else ""

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show the run under the cursor, and offer the keys that are for it."""
        event.stop()
        self.refresh_bindings()
        self._look_closer()

    def _look_closer(self) -> None:
        info = self._chosen
        if info is None:
            self._looked_at = None
            self.query_one(RunPreview).show(None, "" if self._infos or not self._told else FIRST_RUN)
            return
        older = [one for one in self._groups.get("train", []) if (one.started_at or 0.0) < (info.started_at or 0.0)]
        wanted = (info, older[0] if older and group_of(info) == TRAIN else None)
        if wanted != self._looked_at:
            self._looked_at = wanted
            self._read_closer(*wanted)

    def action_resume(self) -> None:
        """Continue the chosen run and watch it."""
        if self._chosen is not None:
            self._resume(self._chosen)

    def action_extend(self) -> None:
        """Ask how much longer the chosen run shall train, say what that does, and start it."""
        info = self._chosen
        if info is None:
            return
        dialog = AskLine(
            f"Train {plain(info.name, one_line=True, limit=LONGEST)} longer", "100 steps", hint=HINT, check=wish_in
        )
        ask(self.app, dialog, lambda text: self._extend(info, wish_in(text)))

    def action_filter(self) -> None:
        """Type what the list is narrowed to."""
        self._filter.set_class(True, "-shown")
        self._filter.focus()

    def action_to_list(self) -> None:
        """Go from the filter to the list."""
        self._list.focus()

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

        delete = partial(self._change, partial(remove_run, info.paths))
        self.app.push_screen(Confirm(question, "delete it"), if_agreed(delete))

    def action_note(self) -> None:
        """Write a few words on the chosen run."""
        info = self._chosen
        if info is None:
            return
        dialog = AskLine(f"A note on {plain(info.name, one_line=True, limit=LONGEST)}", info.note, check=check_note)
        ask(self.app, dialog, lambda text: self._change(lambda: write_note(info.paths, text)))

    def to_copy(self) -> Copied | None:
        """Return the place of the chosen run."""
        return folder_of(self._chosen.paths) if self._chosen is not None else None

    def action_leave(self) -> None:
        """Close the filter; where none is open, go back."""
        if self._filter.has_class("-shown"):
            self._filter.value = ""
            self._filter.set_class(False, "-shown")
            self._list.focus()
        else:
            self.dismiss()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go from the filter to the list, after Enter."""
        event.stop()
        self._list.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
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

    @work(thread=True, exclusive=True, group="resume")
    def _extend(self, info: RunInfo, wish: Wish, *, agreed: bool = False) -> None:
        go_on = partial(self._extend, info, wish, agreed=True)
        try:
            if not agreed:
                words = Content(plain(self._services.extension(info.paths, wish)))
                asked = Confirm(words, "train on")
                self.app.call_from_thread(self.app.push_screen, asked, if_agreed(go_on))
                return
            self._services.extend(info.paths, wish)
        except StudioError as error:
            self.app.call_from_thread(self.app.notify, plain(str(error)), severity="error", markup=False)
            return
        self.post_message(OpenRun(info.paths))

    def _ask_to_start_over(self, info: RunInfo, question: str) -> None:
        begin = partial(self._resume, info, over=True)
        self.app.push_screen(Confirm(Content(question), "start over"), if_agreed(begin))

    @work(thread=True, group="change")
    def _change(self, change: Callable[[], None]) -> None:
        """Change a run, or say why it cannot be done, and look again."""
        try:
            change()
        except StudioError as error:
            self.app.call_from_thread(self.app.notify, plain(str(error)), severity="error", markup=False)
        self.app.call_from_thread(self._read)

    @work(thread=True, exclusive=True, group="list")
    def _read(self) -> None:
        infos, sparks = self._lister(self._runs_root), {}
        for info in (one for one in infos if group_of(one) == TRAIN):
            sparks[info.name] = self._sparks.get(info.name, "")
            if info != self._infos.get(info.name):
                sparks[info.name] = spark([event.loss for event in sample_steps(info.paths.events, _SPARK_STEPS)])
        self.post_message(self.Listed(infos, sparks))

    @work(thread=True, exclusive=True, group="closer")
    def _read_closer(self, info: RunInfo, before: RunInfo | None) -> None:
        self.post_message(self.LookedCloser(look_closer(info, before)))

    @property
    def _list(self) -> RunsList:
        return self.query_one(RunsList)

    @property
    def _filter(self) -> Input:
        return self.query_one("#runs-filter", Input)

    @property
    def _chosen(self) -> RunInfo | None:
        return self._list.chosen
