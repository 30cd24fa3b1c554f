"""The progress of a merge and of the exports that follow it, one after another; then the merge's verification."""

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.atomic import read_object
from studio.runs.chain import next_run
from studio.runs.control import request
from studio.runs.history import History
from studio.runs.job import read_job
from studio.runs.last_words import crash_of
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from studio.runs.status import Status, run_status
from studio.runs.supervise import how_it_ended
from studio.runs.watch import RunWatch
from studio.tui.asks import OpenChat
from studio.tui.merging import MERGED
from studio.tui.panels.merge_text import progress_line, result_rows, said_text, waits_line
from studio.tui.screens.dialogs import Confirm
from studio.tui.screens.offers import OfferingScreen, offered
from studio.tui.services import Services
from widgets.key_footer import KeyFooter
from widgets.labelled_text import LabelledText

_FORM, _NAME = 8, 16
"""Cells of a name beside an output, and beside a row of the result."""


class MergeProgressScreen(OfferingScreen[None]):
    """Watches a merge and the exports that follow it. All of them go on without this screen."""

    HELP = "A merge and its exports: how far they are, and what was compared and written."
    BINDINGS: ClassVar[list[BindingType]] = [
        *offered("x", "stop", "Stop"),
        *offered("R", "resume", "Resume"),
        *offered("t", "try_it", "Try it"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    MergeProgressScreen {
        & #progress-head { height: 1; padding: 0 1; text-style: bold; background: $panel; }
        & LabelledText { padding: 0 1; }
        & .heading { height: auto; padding: 1 1 0 1; text-style: bold; }
    }
    """

    def __init__(
        self,
        merge: RunPaths,
        *,
        services: Services,
        poll_seconds: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Watch a merge and the exports that it names.

        Args:
            merge: Its run.
            services: What starts a chat, and resumes what has ended early.
            poll_seconds: Seconds between two looks.
            now: Unix seconds.
        """
        super().__init__()
        self._merge = merge
        self._watches: dict[str, RunWatch] = {MERGED: RunWatch(merge)}
        self._waiting = _then(merge)
        self._services, self._poll_seconds, self._now = services, poll_seconds, now
        self._seen: dict[str, float] = {}
        self._statuses: dict[str, Status] = {}
        self._has_result = self._resuming = False

    def compose(self) -> ComposeResult:
        """Make the parts: head, a row for each output, later the result, keys."""
        yield Static(f"Merge  {plain(self._merge.name, one_line=True)}", id="progress-head", markup=False)
        with VerticalScroll():
            for form in (MERGED, *self._waiting):
                yield LabelledText(Content.styled(form, "bold"), label_width=_FORM, id=f"output-{form}")
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to look."""
        self._look()
        self.set_interval(self._poll_seconds, self._look)
        self.query_one(VerticalScroll).focus()

    @property
    def watched(self) -> list[RunPaths]:
        """The merge and those of its exports that were started."""
        return [watch.paths for watch in self._watches.values()]

    def _look(self) -> None:
        # Each run names the one that follows it, once that was started.
        while self._waiting and (run := next_run(self._last)):
            self._watches[self._waiting.pop(0)] = RunWatch(run)
        statuses = {}
        for form, watch in self._watches.items():
            watch.poll()
            statuses[form] = run_status(watch.paths)
        self._show(statuses)

    @property
    def _last(self) -> RunPaths:
        return [*self._watches.values()][-1].paths

    def _show(self, statuses: dict[str, Status]) -> None:
        for form, watch in self._watches.items():
            status = statuses[form]
            ended = self._why_crashed(watch) if status is Status.crashed else ""
            line = progress_line(watch.history, status, self._seconds(form, watch.history, status), ended)
            self._row(form).update(Content.assemble(line, said_text(form, watch.history)))
        for form in self._waiting:
            self._row(form).update(waits_line(statuses))
        before, self._statuses = self._statuses, statuses
        if before != statuses:
            self.refresh_bindings()
        if statuses[MERGED] is Status.finished and not self._has_result:
            self._has_result = True
            self.query_one(VerticalScroll).mount_all(_result_widgets(read_object(self._merge.report)))

    @staticmethod
    def _why_crashed(watch: RunWatch) -> str:
        known = crash_of(watch.paths, watch.history)
        return f"{known}. {known.advice}" if known else how_it_ended(watch.paths)

    def _row(self, form: str) -> LabelledText:
        return self.query_one(f"#output-{form}", LabelledText)

    def _seconds(self, form: str, history: History, status: Status) -> float:
        """Return for how many seconds an output has been made, or how many it took.

        Until its worker has told when it began, they count from when this screen saw it first.
        """
        now = self._now()
        began = (history.started.at if history.started else 0.0) or self._seen.setdefault(form, now)
        return (now if status.live else history.last_at or now) - began

    def why_not(self, action: str) -> str:
        """Return why there is nothing to stop, to resume or to try."""
        live = any(status.live for status in self._statuses.values())
        if action == "stop":
            return "" if live or not self._statuses else "Nothing is running."
        if action == "resume":
            if live:
                return "It is alive: there is nothing to resume."
            return "" if self._ended_early is not None else "Everything is finished."
        merged = self._statuses.get(MERGED) is Status.finished
        return "" if merged or action != "try_it" else "The merged model is not whole yet."

    @property
    def _ended_early(self) -> RunPaths | None:
        """The first output that is neither finished nor being made; those after it wait for it."""
        early = (form for form, status in self._statuses.items() if status is not Status.finished and not status.live)
        form = next(early, None)
        return None if form is None else self._watches[form].paths

    def action_resume(self) -> None:
        """Go on with what has ended early."""
        if self._ended_early is not None and not self._resuming:
            self._resuming = True
            self._resume(self._ended_early)

    @work(thread=True)
    def _resume(self, paths: RunPaths) -> None:
        try:
            self._services.resume(paths)
        except StudioError as error:
            self.app.call_from_thread(self.app.notify, plain(str(error)), severity="error", markup=False)
        finally:
            self._resuming = False

    def action_stop(self) -> None:
        """Ask once, then ask what runs to stop; what waits is not started."""
        live = [watch.paths for watch in self._watches.values() if run_status(watch.paths).live]

        def decide(answer: bool | None) -> None:
            if answer:
                for paths in live:
                    request(paths, "stop")

        question = Content(
            "Stop? What is not finished leaves nothing behind and what waits is not started; finished outputs stay."
        )
        self.app.push_screen(Confirm(question, "stop it"), decide)

    def action_try_it(self) -> None:
        """Chat with the merged model."""
        self.post_message(OpenChat(self._merge))

    def action_leave(self) -> None:
        """Go back; what runs goes on."""
        if any(run_status(watch.paths).live for watch in self._watches.values()):
            more = ", and what waits is started in its turn" if self._waiting else ""
            self.app.notify(f"The run goes on{more}. Open it again from the list of runs (o).", markup=False)
        self.dismiss()


def _result_widgets(report: dict[str, Any]) -> Iterator[Widget]:
    for name, value in result_rows(report):
        if value:
            yield LabelledText(Content.styled(name, "dim"), value, label_width=_NAME)
        else:
            yield Static(Content(name), classes="heading", markup=False)


def _then(merge: RunPaths) -> list[str]:
    try:
        request = read_job(merge, MergeRequest)
    except StudioError:
        return []
    return list(request.then) if request else []
