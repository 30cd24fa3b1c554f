"""The name, the state and the figures of a run."""

import math

from textual import events
from textual.app import ComposeResult
from textual.containers import Container
from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static

from studio.core.text import plain
from studio.runs.history import History
from studio.runs.status import Status
from studio.tui.panels.outcome import TRAIN
from studio.tui.readable import UNKNOWN, count, duration, number, setting
from widgets.stat import Stat

_COLOURS = {
    Status.running: "$text-success",
    Status.finished: "$text-success",
    Status.failed: "$text-error",
    Status.crashed: "$text-error",
    Status.paused: "$text-warning",
    Status.stopping: "$text-warning",
    Status.stopped: "$text-warning",
    Status.queued: "$text-warning",
    Status.restarting: "$text-warning",
}
_ROOM_FOR_ONE_ROW = 98
_WAITING = (Status.starting, Status.queued, Status.restarting)
_QUIET_PHASES = ("training",)
"""Phases that are named only while they tell how far they are."""


class RunHeader(Container):
    """Shows one line of words above the figures."""

    DEFAULT_CSS = """
    RunHeader {
        height: auto;
        padding: 0 1;
        & > Static { height: 1; }
        & > #figures {
            layout: grid;
            height: 2;
            grid-size: 4 2;
            grid-rows: 1;
            grid-gutter: 0 1;
        }
        &.-one-row > #figures { height: 1; grid-size: 7 1; grid-columns: 13fr 15fr 12fr 11fr 14fr 11fr 10fr; }
        &.-no-steps > #figures { display: none; }
    }
    """

    words: reactive[Content] = reactive[Content](Content(""), repaint=False)
    """Name, state, phase."""

    def __init__(self, name: str) -> None:
        """Show a run by this name."""
        super().__init__()
        self._run_name = plain(name, one_line=True)
        self._figures = {
            "step": Stat("step"),
            "eta": Stat("ETA"),
            "speed": Stat("", "tok/s"),
            "loss": Stat("loss"),
            "held_out": Stat("held-out"),
            "rate": Stat("lr"),
            "norm": Stat("grad"),
        }

    def compose(self) -> ComposeResult:
        """Make the parts: words, figures."""
        yield Static(self.words, id="words", markup=False)
        yield Container(*self._figures.values(), id="figures")

    def on_resize(self, event: events.Resize) -> None:
        """Put the figures into one row where there is room."""
        self.set_class(event.size.width >= _ROOM_FOR_ONE_ROW, "-one-row")

    def watch_words(self, words: Content) -> None:
        """Repaint the line of words, only when they changed."""
        if self.is_mounted:
            self.query_one("#words", Static).update(words, layout=False)

    def show(self, history: History, status: Status, waits_for: str = "") -> None:
        """Show how the run stands.

        Args:
            history: What it told.
            status: Its status.
            waits_for: A request that the worker has not answered yet, such as "pause asked for".
        """
        self.set_class(history.started is not None and history.started.job != TRAIN, "-no-steps")
        phase = "" if not status.live else _disk(history, status) or waits_for or _phase(history, status)
        self.words = Content.assemble(
            (self._run_name, "bold"), "  ", (str(status), f"{_COLOURS.get(status, '')} bold".strip()), f"  {phase}"
        )
        for key, text in _figures(history, status).items():
            self._figures[key].value = text


def _disk(history: History, status: Status) -> str:
    """Return why a run waits without having been asked to; empty for all other runs."""
    if status is not Status.paused or not history.paused_for:
        return ""
    return f"it goes on by itself: {plain(history.paused_for, one_line=True, limit=200)}"


def _phase(history: History, status: Status) -> str:
    """Return what the worker is busy with, where that is not plain training."""
    if status is Status.starting:  # the log still holds the phase of the last worker
        return "waiting for the process"
    phase = history.phase
    if status is Status.restarting:
        return "it goes on by itself after a crash"
    if phase is not None and status is Status.queued:
        return plain(phase.detail, one_line=True, limit=120)
    if phase is None or (phase.name in _QUIET_PHASES and phase.fraction is None):
        return ""
    share = "" if phase.fraction is None or not math.isfinite(phase.fraction) else f" {phase.fraction:.0%}"
    detail = f" ({plain(phase.detail, one_line=True, limit=60)})" if phase.detail else ""
    return f"{plain(phase.name, one_line=True, limit=60)}{share}{detail}"


def _figures(history: History, status: Status) -> dict[str, str]:
    train, total = history.train, history.total_steps
    return {
        "step": f"{history.last_step}/{total}" if total else str(history.last_step),
        "eta": duration(history.eta_seconds) if status.live and status not in _WAITING else UNKNOWN,
        "speed": count(history.tokens_per_second),
        "loss": number(train.losses[-1]) if train.losses else UNKNOWN,
        "held_out": number(history.evals[-1].loss) if history.evals else UNKNOWN,
        "rate": setting(float(f"{train.lrs[-1]:.3g}")) if train.lrs and math.isfinite(train.lrs[-1]) else UNKNOWN,
        "norm": number(train.grad_norms[-1], 3) if train.grad_norms else UNKNOWN,
    }
