"""A run as it goes: figures, plots, samples, log, and the keys that act on it. Leaving the screen ends no run."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content
from textual.reactive import reactive

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.checkpoints import NoWholeCheckpoint
from studio.runs.control import request, requested, withdraw
from studio.runs.layout import RunPaths
from studio.runs.log_parts import sample_steps
from studio.runs.status import Status
from studio.tui.asks import OpenChat, ShowData, ShowMerge
from studio.tui.copying import Copied, folder_of
from studio.tui.feed import Glance, RunFeed, waits_for
from studio.tui.panels.notes import Notes
from studio.tui.panels.outcome import TRAIN, Outcome, has_adapter, no_adapter_words, why_no_output
from studio.tui.panels.run_header import RunHeader
from studio.tui.panels.run_memory import MemoryTable, PeakGauge, planned_peak_bytes
from studio.tui.panels.run_plots import PairPlots, RunPlots
from studio.tui.panels.samples import Samples
from studio.tui.screens.dialogs import Confirm, start_over_question
from studio.tui.screens.offers import OfferingScreen, offered
from studio.tui.services import Services
from widgets.key_footer import KeyFooter
from widgets.log_search import LogSearch
from widgets.tab_row import TabRow

_VIEWS = ("plots", "samples", "log", "notes", "memory", "pairs")
_VIEWS_OF = {TRAIN: _VIEWS[:-1], "measure": ("log", "notes", "memory")}
"""Views that each kind of job fills. Kinds that are not named here fill the log and the notes, and a training that
learns from pairs of answers also the last view of all."""
_FILLED_BY_ALL = ("log", "notes")
_JOBS_OF = {
    "pause": ((TRAIN,), "Only a training can be paused."),
    "checkpoint": ((TRAIN,), "Only a training writes checkpoints."),
    "merge": ((TRAIN, "merge"), "Only a training run has an adapter to merge."),
    "show_data": ((TRAIN,), "Only a training has rows to show."),
    "try_it": ((TRAIN, "merge", "export"), "This run makes no model to chat with."),
}
"""For each action that not every kind of job has: the kinds that have it, and what is said for the others."""
_SLICE_SECONDS = 0.004
"""A long log is read for this long, then left alone for this long, and so on. The answer to a key takes several turns
of the event loop, and each turn may have to wait for one stretch of reading."""
_SLICES_PER_LOOK = 50
_WIDE, _TALL = 100, 32
"""Columns and rows from which on a view stands below the plots, as the app's breakpoints say."""


class RunScreen(OfferingScreen[None]):
    """Watches one run. Below 100 columns or 32 rows one view at a time, else plots above the chosen view."""

    HELP = "One run: losses, memory, samples and log while it trains, and what it made. Leaving does not end it."
    BINDINGS: ClassVar[list[BindingType]] = [
        *offered("x", "stop", "Stop"),
        Binding("p", "go_on", "Go on"),
        *offered("p", "pause", "Pause"),
        *offered("c", "checkpoint", "Checkpoint"),
        *offered("R", "resume", "Resume"),
        *offered("m", "merge", "Merge"),
        *offered("t", "try_it", "Try it"),
        *offered("d", "show_data", "Data"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
        Binding("tab", "next_view(1)", "View", priority=True),
        Binding("shift+tab", "next_view(-1)", "View before", show=False, priority=True),
        *(Binding(str(number), f"view('{key}')", key, show=False) for number, key in enumerate(_VIEWS, start=1)),
        Binding("l", "log_axis", "Log axis", show=False),
        Binding("slash", "search", "Search the log", show=False),
    ]

    DEFAULT_CSS = """
    RunScreen {
        & #views { height: 1fr; }
        & #views > * { display: none; }
        & #views > .-chosen { display: block; }
        & LogView { padding: 0 1; }
        & TabRow { padding: 0 1; }
    }
    RunScreen.-wide.-tall {
        & #plots { display: block; height: 3fr; }
        & #plots.-unfilled { display: none; }
        & #samples, & #log, & #notes, & #memory, & #pairs { height: 2fr; }
        & LinePlot, & #samples, & #log, & #notes, & #memory {
            border: round $foreground 40%;
            border-title-color: $text-primary; border-title-style: bold;
            padding: 0;
        }
    }
    """

    view: reactive[str] = reactive("plots")
    """Which view is chosen."""

    def __init__(self, paths: RunPaths, *, services: Services, poll_seconds: float) -> None:
        """Watch a run, looking at it every `poll_seconds`."""
        super().__init__()
        self.paths = paths
        self._services, self._poll_seconds = services, poll_seconds
        self._feed = RunFeed(paths)
        self._glance: Glance | None = None
        self._resuming = self._pause_asked = False
        self._slices_left: int | None = None
        """Slices of a long log that are still to be read before the next look; None while no long log is read."""

    def compose(self) -> ComposeResult:
        """Make the parts: header, outcome, views, keys; on a large screen samples stand below the plots at first."""
        if self.app.size.width >= _WIDE and self.app.size.height >= _TALL:
            self.set_reactive(RunScreen.view, "samples")
        yield RunHeader(self.paths.name)
        yield Outcome()
        yield PeakGauge(self.paths)
        yield TabRow(_names(self._views), self.view)
        with Container(id="views"):
            yield RunPlots(id="plots")
            yield Samples(id="samples")
            yield LogSearch(empty=why_no_output(Status.starting), id="log")
            yield Notes(id="notes")
            yield MemoryTable(self.paths, id="memory")
            yield PairPlots(id="pairs")
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to look, as soon as the parts are there."""
        self._choose(self.view)
        self.call_later(self._look)
        self.set_interval(self._poll_seconds, self._look)

    @property
    def watched(self) -> tuple[RunPaths, ...]:
        """The run that this screen shows."""
        return (self.paths,)

    def watch_view(self, view: str) -> None:
        """Show the chosen view."""
        if self.is_mounted:
            self._choose(view)
            self.query_one(TabRow).current = view
            self.query_one(f"#{view}").focus()

    def on_tab_row_wanted(self, message: TabRow.Wanted) -> None:
        """Choose the view whose name was clicked."""
        self.view = message.key

    def action_view(self, key: str) -> None:
        """Choose a view, or say why this run has none of that name."""
        if key in self._views:
            self.view = key
        else:
            why = "This run learns from no pairs" if self._job == TRAIN else "This run is no training"
            told = f"{why}: it fills no {key}. It has {' and '.join(self._views)}."
            self.app.notify(told, markup=False)

    def action_next_view(self, direction: int) -> None:
        """Choose the next view or the one before."""
        views = self._views
        self.view = views[(views.index(self.view) + direction) % len(views)] if self.view in views else views[0]

    def action_log_axis(self) -> None:
        """Show the loss on the other kind of axis."""
        self.view = self.view if (plots := self.query_one(RunPlots)).display else "plots"
        plots.toggle_log()

    def action_search(self) -> None:
        """Search the log."""
        self.view = "log"
        self.query_one(LogSearch).action_open()

    def action_leave(self) -> None:
        """Go back; the run goes on."""
        if self._status.live:
            self.app.notify("The run goes on. Open it again from the list of runs (o).", markup=False)
        self.dismiss()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Let `p` mean one of its two actions: to pause, or to go on where a pause was asked for."""
        if action in ("go_on", "pause") and self._status.live and self._pause_asked:
            return action == "go_on"
        return action != "go_on" and super().check_action(action, parameters)

    def why_not(self, action: str) -> str:
        """Return why a key does nothing now."""
        jobs, told = _JOBS_OF.get(action, ((self._job,), ""))
        if self._job not in jobs:
            return told
        if action in ("stop", "pause", "checkpoint"):
            return "" if self._status.live else "The run has ended."
        if action == "resume":
            return self._why_not_resumed()
        return self._why_nothing_made(action) if action in ("merge", "try_it") else ""

    def _why_not_resumed(self) -> str:
        if self._status.live:
            return "The run is alive: there is nothing to resume."
        return "The run is finished: there is nothing to resume." if self._status is Status.finished else ""

    def _why_nothing_made(self, action: str) -> str:
        """Return why there is nothing to merge or to chat with; empty where there is."""
        if self._job == TRAIN and not has_adapter(self.paths):
            return no_adapter_words(self._status)
        return self._why_no_model() if action == "try_it" and self._job != TRAIN else ""

    def _why_no_model(self) -> str:
        """Return why a merge or an export has left nothing to chat with."""
        saved = self._glance.history.saved if self._glance else []
        if any((Path(item.path) / "config.json").is_file() for item in saved):
            return ""
        if self._job == "export" and self._status is Status.finished:
            return "What was made is no model folder: a GGUF file is tried in llama.cpp, Ollama or LM Studio."
        return "There is no model to chat with: the run has left none."

    def action_stop(self) -> None:
        """Ask once, then ask the worker to stop; a worker that is stopping can be ended at once."""
        if self._status is Status.stopping:
            question = "It is stopping: it ends after the current step and saves. End the process at once instead? "
            self._confirm(question + "What came after the last checkpoint is lost.", "end it now", self._end_now)
        else:
            question = "Stop this run? It ends after the current step and saves the adapter as it is then."
            self._confirm(question, "stop it", lambda: request(self.paths, "stop"))

    def to_copy(self) -> Copied:
        """Return the place of the adapter, or of the run."""
        return folder_of(self.paths)

    def action_pause(self) -> None:
        """Ask for a pause."""
        request(self.paths, "pause")
        self._see_pause()
        self._look()

    def action_go_on(self) -> None:
        """Take the pause back: before it has begun, or to go on."""
        withdraw(self.paths, "pause")
        self._see_pause()
        self._look()

    def _see_pause(self) -> None:
        """Know whether a pause is asked for, here or by another terminal."""
        asked = requested(self.paths, "pause")
        if asked != self._pause_asked:
            self._pause_asked = asked
            self.refresh_bindings()

    def action_checkpoint(self) -> None:
        """Ask for a checkpoint now."""
        request(self.paths, "checkpoint-now")
        self._look()

    def action_resume(self) -> None:
        """Start a worker for a run that has ended early."""
        if not self._resuming:
            self._resuming = True
            self._resume()

    def action_merge(self) -> None:
        """Merge the adapter; of a merge, show what came of it."""
        self.post_message(ShowMerge(self.paths))

    def action_try_it(self) -> None:
        """Chat with what the run made."""
        self.post_message(OpenChat(self.paths))

    def action_show_data(self) -> None:
        """Show the rows of the run as its model reads them."""
        from studio.runs.recipe_file import load_recipe  # noqa: PLC0415  not needed to watch a run

        try:
            self.post_message(ShowData(load_recipe(self.paths.recipe), self.paths))
        except StudioError as error:
            self._say(str(error), bad=True)

    @work(thread=True)
    def _resume(self, *, over: bool = False) -> None:
        try:
            self._services.resume(self.paths, from_start=over)
        except NoWholeCheckpoint as error:
            question = start_over_question(error)
            self.app.call_from_thread(self._confirm, question, "start over", lambda: self._resume(over=True))
        except StudioError as error:
            self.app.call_from_thread(self._say, str(error), bad=True)
        finally:
            self._resuming = False
        self.app.call_from_thread(self._look)

    @work(thread=True)
    def _end_now(self) -> None:
        self._services.end_now(self.paths)

    @property
    def _views(self) -> tuple[str, ...]:
        """The views that this kind of job fills."""
        paired = self._glance is not None and bool(self._glance.history.train.pairs)
        return _VIEWS if paired else _VIEWS_OF.get(self._job, _FILLED_BY_ALL)

    @property
    def _job(self) -> str:
        """The kind of job; taken for a training until the worker has told it."""
        started = self._glance.history.started if self._glance else None
        return started.job if started else TRAIN

    @property
    def _status(self) -> Status:
        return self._glance.status if self._glance else Status.starting

    def _offer_views(self) -> None:
        """Offer what this kind of job fills: without steps there is nothing to plot."""
        warnings = len(self._glance.history.warnings) if self._glance else 0
        self.query_one(TabRow).names = _names(self._views, warnings)
        self.query_one(RunPlots).set_class("plots" not in self._views, "-unfilled")
        if self.view not in self._views:
            self.view = self._views[0]

    def _choose(self, view: str) -> None:
        """Mark the chosen view itself: a class on the screen would make Textual style all parts of the screen again."""
        for key in _VIEWS:
            self.query_one(f"#{key}").set_class(key == view, "-chosen")

    def _look(self) -> None:
        """Look at the run and show what is new; while a long log is read, `_read_on` does that instead."""
        if self.is_mounted and self._slices_left is None:
            self._show_glance()

    def _show_glance(self) -> None:
        glance = self._feed.look()
        job, before, self._glance = self._job, self._glance, glance
        if before is None or before.status is not glance.status or job != self._job:
            self.refresh_bindings()
        self._see_pause()
        self.query_one(RunHeader).show(glance.history, glance.status, waits_for(self.paths, glance))
        self.query_one(Outcome).show(self.paths, glance.history, glance.status)
        if glance.output:
            self.query_one(LogSearch).extend(glance.output)
        if glance.news or before is None or self._slices_left is not None:
            self.query_one(MemoryTable).show(glance.history)
            if self.query_one(PeakGauge).show(glance.history, self.query_one(MemoryTable).highest_bytes):
                self.query_one(RunPlots).show_predicted(planned_peak_bytes(self.paths))
            self.query_one(RunPlots).show(glance.history)
            self.query_one(PairPlots).show(glance.history)
            self.query_one(Samples).show(glance.history, glance.status)
            self.query_one(Notes).show(glance.history)
        self.query_one(RunPlots).say_why_empty(glance.status, len(glance.history.train.steps))
        self.query_one(LogSearch).say_of_empty(why_no_output(glance.status))
        self._offer_views()
        if glance.behind or self._slices_left is not None:
            self._catch_up(glance)

    def _catch_up(self, glance: Glance) -> None:
        """Read a long log in slices, between which keys are answered. A sample of its curve is drawn at once."""
        plots = self.query_one(RunPlots)
        plots.hold(False)
        if not glance.behind:
            self._slices_left = None
            plots.forget_sample()
            return
        if self._slices_left is None:
            sample = sample_steps(self.paths.events)
            total = glance.history.total_steps
            plots.show_sample([event.step for event in sample], [event.loss for event in sample], total)
        self._slices_left = _SLICES_PER_LOOK
        self.set_timer(_SLICE_SECONDS, self._read_on)

    def _read_on(self) -> None:
        """Read a slice; after a number of slices, and at the end of the log, show what was read."""
        if not self.is_mounted:
            return
        plots = self.query_one(RunPlots)
        plots.hold(True)
        history, behind = self._feed.read_on(_SLICE_SECONDS)
        plots.show(history)
        self._slices_left = (self._slices_left or 1) - 1
        if behind and self._slices_left:
            self.set_timer(_SLICE_SECONDS, self._read_on)
        else:
            self._show_glance()

    def _confirm(self, question: str, yes: str, then: Callable[[], object]) -> None:
        def decide(answer: bool | None) -> None:
            if answer:
                then()
                self._look()

        self.app.push_screen(Confirm(Content(question), yes), decide)

    def _say(self, text: str, *, bad: bool = False) -> None:
        self.app.notify(plain(text), severity="error" if bad else "information", markup=False)


def _names(views: tuple[str, ...], warnings: int = 0) -> tuple[tuple[str, str], ...]:
    """Return views with the names that are shown; each keeps its number, whichever there are."""
    told = {"notes": f" ({warnings})"} if warnings else {}
    numbered = [(key, number) for number, key in enumerate(_VIEWS, start=1) if key in views]
    return tuple((key, f"{number} {key.title()}{told.get(key, '')}") for key, number in numbered)
