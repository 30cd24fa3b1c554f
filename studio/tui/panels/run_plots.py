"""Loss and memory of a run over its steps, and the figures of pairs of answers."""

import math
from collections.abc import Sequence

from textual import events
from textual.app import ComposeResult
from textual.containers import Container

from studio.runs.history import History
from studio.runs.status import Status
from studio.tui.feed import Cursor
from studio.tui.readable import gib, to_gib
from widgets.line_plot import Curve, LinePlot, Reference
from widgets.smooth import Smoother

_LOSS = (
    Curve("train", "each step", "faint"),
    Curve("sample", "at a glance", "faint", 3),
    Curve("mean", "smoothed"),
    Curve("held_out", "held-out", "dots", 2),
)
_MEMORY = (
    Curve("allocated_bytes", "allocated", hue=3),
    Curve("reserved_bytes", "reserved"),
    Curve("device_bytes", "whole card", "faint", 2),
    Curve("resident_bytes", "resident"),
    Curve("resident_peak_bytes", "peak", "faint", 3),
)
_REWARDS = (
    Curve("margin", "margin"),
    Curve("accuracy", "accuracy", hue=3),
    Curve("held_out_margin", "held-out", "dots"),
    Curve("held_out_accuracy", "held-out", "dots", 3),
)
_ANSWERS = (
    Curve("chosen_logp", "chosen", hue=3),
    Curve("rejected_logp", "rejected", hue=4),
    Curve("held_out_chosen_logp", "held-out", "dots", 3),
    Curve("held_out_rejected_logp", "held-out", "dots", 4),
)
"""Figures of pairs by their names in a history, those of evaluations after `held_out_`."""
_ROOM_FOR_BOTH = 98
"""Columns from which on the plots stand beside each other."""


class RunPlots(Container):
    """The two plots, beside each other where there is room, else below each other."""

    DEFAULT_CSS = """
    RunPlots {
        layout: vertical;
        height: 1fr;
        & #loss-plot { height: 3fr; }
        & #memory-plot { height: 2fr; }
        & LinePlot { padding: 0 1; }
        &.-beside {
            layout: horizontal;
            & #loss-plot, & #memory-plot { height: 1fr; }
            & #loss-plot { width: 3fr; }
            & #memory-plot { width: 2fr; }
        }
    }
    """

    def __init__(self, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        super().__init__(id=id)
        self._loss = LinePlot(_LOSS, title="loss", x_label="step", id="loss-plot")
        self._memory = LinePlot(_MEMORY, title="memory GiB", x_label="step", from_zero=True, id="memory-plot")
        self._train_cursor, self._held_out_cursor, self._memory_cursor = Cursor(), Cursor(), Cursor()
        self._smoother = Smoother()

    def compose(self) -> ComposeResult:
        """Make the parts: loss, memory."""
        yield self._loss
        yield self._memory

    def on_mount(self) -> None:
        """Begin with the layout for the screen's width: to change it later would draw everything twice."""
        self.set_class(self.app.size.width >= _ROOM_FOR_BOTH, "-beside")

    def on_resize(self, event: events.Resize) -> None:
        """Put the plots beside each other where there is room."""
        self.set_class(event.size.width >= _ROOM_FOR_BOTH, "-beside")

    def show(self, history: History) -> None:
        """Draw what is new in the history. After a resume everything is drawn anew: steps may have been done again."""
        total = float(history.total_steps or 0)
        self._loss.x_total = self._memory.x_total = total
        self._show_losses(history)
        readings = history.memory
        begin = self._memory_cursor.start(readings.steps, history.started)
        for curve in _MEMORY:
            values = [to_gib(value) for value in getattr(readings, curve.key)[begin:]]
            _hand_on(self._memory, curve.key, begin, readings.steps[begin:], values)

    def say_why_empty(self, status: Status, steps: int) -> None:
        """Let a plot without a point say why it has none, after so many steps."""
        if steps:
            why = "Steps were done, but none told its {}."
        elif status.live:
            why = "No step is done yet. The {} is drawn from the first one on."
        else:
            why = "The run ended before its first step, so there is no {} to draw."
        for plot, what in ((self._loss, "loss"), (self._memory, "memory")):
            plot.empty = why.format(what)

    def show_sample(self, steps: Sequence[int], losses: Sequence[float], total: int | None) -> None:
        """Draw a few steps of a long log at once, until the log is read."""
        self._loss.x_total = float(total or (steps[-1] if steps else 0))
        self._loss.replace("sample", steps, losses)

    def forget_sample(self) -> None:
        """Remove the sample: the log is read, and its own curves are there."""
        self._loss.replace("sample", (), ())

    def hold(self, held: bool) -> None:
        """Let the plots draw nothing while a slice of the log is read, or let them draw again."""
        for plot in (self._loss, self._memory):
            plot.hold(held)

    def show_predicted(self, peak_bytes: int | None) -> None:
        """Draw the peak that was estimated at launch, where there is one."""
        if peak_bytes is not None:
            self._memory.reference = Reference(to_gib(peak_bytes), f"predicted peak {gib(peak_bytes)}")

    def toggle_log(self) -> None:
        """Switch the loss between a linear and a logarithmic axis."""
        self._loss.log_y = not self._loss.log_y

    def _show_losses(self, history: History) -> None:
        train = history.train
        begin = self._train_cursor.start(train.steps, history.started)
        if begin == 0:
            self._smoother = Smoother(_kept_share(history.total_steps))
        losses = train.losses[begin:]
        _hand_on(self._loss, "train", begin, train.steps[begin:], losses)
        _hand_on(self._loss, "mean", begin, train.steps[begin:], self._smoother.feed(train.levels(begin)))
        steps = [event.step for event in history.evals]
        begin = self._held_out_cursor.start(steps, history.started)
        _hand_on(self._loss, "held_out", begin, steps[begin:], [event.loss for event in history.evals[begin:]])


class PairPlots(Container):
    """What a run that learns from pairs of answers tells besides its loss: margin and accuracy, and both answers."""

    DEFAULT_CSS = """
    PairPlots {
        layout: vertical;
        height: 1fr;
        & LinePlot { height: 1fr; padding: 0 1; }
        &.-beside { layout: horizontal; & LinePlot { width: 1fr; } }
    }
    """

    def __init__(self, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        super().__init__(id=id)
        self._plots = {
            LinePlot(_REWARDS, title="rewards", x_label="step", id="rewards-plot"): _REWARDS,
            LinePlot(_ANSWERS, title="log-probability", x_label="step", id="answers-plot"): _ANSWERS,
        }
        self._train_cursor, self._held_out_cursor = Cursor(), Cursor()
        self._smoothers: dict[str, Smoother] = {}

    def compose(self) -> ComposeResult:
        """Make the parts: margin and accuracy, then the log-probabilities."""
        yield from self._plots

    def on_resize(self, event: events.Resize) -> None:
        """Put the plots beside each other where there is room."""
        self.set_class(event.size.width >= _ROOM_FOR_BOTH, "-beside")

    def show(self, history: History) -> None:
        """Draw what is new in the history, steps smoothed as the loss is."""
        train, evals = history.train, history.evals
        if not train.pairs:
            return
        begin = self._train_cursor.start(train.steps, history.started)
        if begin == 0:
            self._smoothers = {name: Smoother(_kept_share(history.total_steps)) for name in train.pairs}
        measured = [event.step for event in evals]
        first = self._held_out_cursor.start(measured, history.started)
        for plot, curves in self._plots.items():
            plot.x_total = float(history.total_steps or 0)
            for key in (curve.key for curve in curves):
                name = key.removeprefix("held_out_")
                if name == key:
                    values = self._smoothers[name].feed(train.pairs[name][begin:])
                    _hand_on(plot, key, begin, train.steps[begin:], values)
                else:
                    seen = [getattr(event, name) for event in evals[first:]]
                    _hand_on(plot, key, first, measured[first:], [math.nan if v is None else v for v in seen])


def _hand_on(plot: LinePlot, key: str, begin: int, steps: Sequence[int], values: Sequence[float]) -> None:
    if begin == 0:
        plot.replace(key, steps, values)
    elif steps:
        plot.extend(key, steps, values)


def _kept_share(total_steps: int | None) -> float:
    """Return the share of its past that the smoothed loss keeps: it looks back a 25th of the run, 3 to 100 steps."""
    return 1 - 1 / min(100, max(3, (total_steps or 250) / 25))
