"""A merge and what is made of it, one after another: progress, then the verification and the paths."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Static

from studio.core.errors import StudioError
from studio.core.export_text import export_checks
from studio.core.text import plain
from studio.runs.chain import next_run
from studio.runs.control import request
from studio.runs.job import MergeRequest, read_job
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.watch import RunWatch
from studio.tui.merging import MERGED, MergeWork
from studio.tui.panels.merge_text import progress_line, read_report, result_text, waits_line
from studio.tui.screens.confirm import Confirm
from widgets.key_footer import KeyFooter


class MergeProgressScreen(Screen[None]):
    """Watches a merge and what it makes of its result; all of it goes on without this screen."""

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

    def __init__(self, merge: RunPaths, *, work: MergeWork | None = None, poll_seconds: float = 0.5) -> None:
        """Watch a merge and the exports that it names.

        Args:
            merge: Its run.
            work: What starts a chat.
            poll_seconds: Pace.
        """
        super().__init__()
        self._merge = merge
        self._watches: dict[str, RunWatch] = {MERGED: RunWatch(merge)}
        self._waiting = _then(merge)
        self._work, self._poll_seconds = work or MergeWork(), poll_seconds

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
        lines, said = [], []
        for form, watch in self._watches.items():
            lines.append(progress_line(form, watch.paths, watch.history, statuses[form]))
            if form != MERGED and (end := watch.history.finished):
                lines += [Content(f"        {plain(line, one_line=True)}") for line in export_checks(end.result)]
            said += [f"{form:<8}{plain(event.message)}" for event in watch.history.warnings]
        lines += [Content(f"{form:<8}{waits_line(statuses)}") for form in self._waiting]
        self.query_one("#progress-lines", Static).update(Content("\n").join(lines))
        self.query_one("#progress-warnings", Static).update(Content("\n".join(said)))
        if not statuses[MERGED].live:
            self.query_one("#progress-result", Static).update(result_text(read_report(self._merge)))

    def action_stop(self) -> None:
        """Ask once, then ask what runs to stop; what waits is not started."""
        live = [watch.paths for watch in self._watches.values() if run_status(watch.paths).live]
        if not live:
            self.app.notify("Nothing runs here any more.", markup=False)
            return

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
        from studio.tui.screens.chat import ChatScreen  # noqa: PLC0415  needed only then

        if run_status(self._merge) is Status.finished:
            self.app.push_screen(ChatScreen(self._merge, work=self._work))
        else:
            self.app.notify("The merged model is not whole yet.", markup=False)

    def action_leave(self) -> None:
        """Go back; what runs goes on."""
        if any(run_status(watch.paths).live for watch in self._watches.values()):
            more = ", and what waits is started in its turn" if self._waiting else ""
            self.app.notify(f"The run goes on{more}. Open it again from the list of runs (o).", markup=False)
        self.dismiss()


def _then(merge: RunPaths) -> list[str]:
    try:
        job = read_job(merge)
    except StudioError:
        return []
    return list(job.then) if isinstance(job, MergeRequest) else []
