"""A merge and what is made of it, one after another: progress, then the verification and the paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.control import request
from studio.runs.job import ExportRequest
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.watch import RunWatch
from studio.tui.merging import MERGED, MergeWork
from studio.tui.panels.merge_text import progress_line, read_report, result_text
from studio.tui.screens.confirm import Confirm
from widgets.key_footer import KeyFooter


class MergeProgressScreen(Screen[None]):
    """Watches a merge. Its exports are started one by one while this screen is open."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x", "stop", "Stop"),
        Binding("t", "try_it", "Try it"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    MergeProgressScreen {
        & #progress-head { height: 1; padding: 0 1; text-style: bold; background: $panel; }
        & #progress-lines { height: auto; padding: 0 1; }
        & #progress-warnings { height: auto; padding: 0 1; color: $text-warning; }
        & #progress-result { height: auto; padding: 1 1 0 1; }
    }
    """

    class Launched(Message):
        """The next export runs, or could not be started."""

        def __init__(self, form: str, paths: RunPaths | None, why: str = "") -> None:
            """Carry its run, or why there is none."""
            super().__init__()
            self.form, self.paths, self.why = form, paths, why

    def __init__(
        self,
        merge: RunPaths,
        exports: Sequence[ExportRequest] = (),
        *,
        runs_root: Path,
        work: MergeWork | None = None,
        poll_seconds: float = 0.5,
    ) -> None:
        """Watch a merge.

        Args:
            merge: Its run.
            exports: What is made of the merged model then, in order.
            runs_root: Where the runs of exports are made.
            work: What starts them.
            poll_seconds: Pace.
        """
        super().__init__()
        self._watches: dict[str, RunWatch] = {MERGED: RunWatch(merge)}
        self._waiting = list(exports)
        self._refused: dict[str, str] = {}
        self._root, self._work, self._poll_seconds = runs_root, work or MergeWork(), poll_seconds
        self._launching = False
        self._merge = merge

    def compose(self) -> ComposeResult:
        """Head, a line for each output, warnings, result, keys."""
        yield Static(f"Merge  {plain(self._merge.name, one_line=True)}", id="progress-head", markup=False)
        with VerticalScroll():
            yield Static("", id="progress-lines", markup=False)
            yield Static("", id="progress-warnings", markup=False)
            yield Static("", id="progress-result", markup=False)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to look."""
        self._look()
        self.set_interval(self._poll_seconds, self._look)
        self.query_one(VerticalScroll).focus()

    def _look(self) -> None:
        statuses = {}
        for form, watch in self._watches.items():
            watch.poll()
            statuses[form] = run_status(watch.paths)
        self._show(statuses)
        merged = statuses[MERGED] is Status.finished
        busy = any(status.live for status in statuses.values())
        if merged and not busy and self._waiting and not self._launching:
            self._launching = True
            self._launch(self._waiting.pop(0))

    def _show(self, statuses: dict[str, Status]) -> None:
        lines = [
            progress_line(form, watch.paths, watch.history, statuses[form]) for form, watch in self._watches.items()
        ]
        lines += [Content(f"{form:<8}{plain(why)}") for form, why in self._refused.items()]
        given_up = statuses[MERGED] in (Status.failed, Status.crashed, Status.stopped)
        word = "is not made: there is no merged model" if given_up else "waits"
        lines += [Content(f"{one.format:<8}{word}") for one in self._waiting]
        self.query_one("#progress-lines", Static).update(Content("\n").join(lines))
        said = [event.message for watch in self._watches.values() for event in watch.history.warnings]
        self.query_one("#progress-warnings", Static).update(Content("\n".join(plain(text) for text in said)))
        if not statuses[MERGED].live:
            self.query_one("#progress-result", Static).update(result_text(read_report(self._merge)))

    def on_merge_progress_screen_launched(self, message: Launched) -> None:
        """Watch it too."""
        self._launching = False
        if message.paths is None:
            self._refused[message.form] = message.why
        else:
            self._watches[message.form] = RunWatch(message.paths)
        self._look()

    def action_stop(self) -> None:
        """Ask once, then ask what runs to stop; what waits is not started."""
        live = [watch.paths for watch in self._watches.values() if run_status(watch.paths).live]
        if not live:
            self.app.notify("Nothing runs here any more.", markup=False)
            return

        def decide(answer: bool | None) -> None:
            if answer:
                self._waiting.clear()
                for paths in live:
                    request(paths, "stop")

        question = Content("Stop? What is not finished leaves nothing behind; finished outputs stay.")
        self.app.push_screen(Confirm(question, "stop it"), decide)

    def action_try_it(self) -> None:
        """Chat with the merged model."""
        from studio.tui.screens.chat import ChatScreen  # noqa: PLC0415  needed only then

        if run_status(self._merge) is Status.finished:
            self.app.push_screen(ChatScreen(self._merge, work=self._work))
        else:
            self.app.notify("The merged model is not whole yet.", markup=False)

    def action_leave(self) -> None:
        """Go back; what runs goes on."""
        if any(run_status(watch.paths).live for watch in self._watches.values()):
            more = " What waits is not started then." if self._waiting else ""
            self.app.notify(f"The run goes on. Open it again from the list of runs (o).{more}", markup=False)
        self.dismiss()

    @work(thread=True)
    def _launch(self, export: ExportRequest) -> None:
        try:
            self.post_message(self.Launched(export.format, self._work.start(export, self._root)))
        except StudioError as error:
            self.post_message(self.Launched(export.format, None, str(error)))
