"""The lines in which a run is told as it goes: at most about one per second, warnings and evaluations all."""

import math
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

from studio.commands.terminal import duration, size
from studio.core.events import Evaluated, Paused, Phase, Planned, RunEvent, Saved, Started, StepDone, Warned
from studio.core.text import plain
from studio.runs.history import History

_SECONDS_BETWEEN = 1.0


class EventLines:
    """Turns events into lines. Steps in between are held back; the last one before anything else is told."""

    def __init__(
        self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic, told: Collection[str] = ()
    ) -> None:
        """Have told nothing yet but these warnings, which were said before the start."""
        self._say = say
        self._clock = clock
        self._told = told
        self._next_at = 0.0
        self._held: str | None = None
        self._phase = ""

    def tell(self, events: Iterable[RunEvent], history: History) -> None:
        """Tell what happened; the history already holds these events."""
        for event in events:
            if isinstance(event, StepDone):
                self._often(step_line(event, history))
            elif isinstance(event, Phase) and event.name == self._phase:
                self._often(_phase_line(event))
            elif line := self._seldom(event):
                self.flush()
                self._say(line)

    def flush(self) -> None:
        """Tell the step that was held back."""
        if self._held is not None:
            self._say(self._held)
            self._held = None

    def _often(self, line: str) -> None:
        self._held = line
        now = self._clock()
        if now >= self._next_at:
            self._next_at = now + _SECONDS_BETWEEN
            self.flush()

    def _seldom(self, event: RunEvent) -> str:
        if isinstance(event, Phase):
            self._phase = event.name
            return _phase_line(event)
        return "" if isinstance(event, Warned) and event.message in self._told else event_line(event)


def step_line(event: StepDone, history: History) -> str:
    """Return a step: number, loss, learning rate, gradient norm, speed, time left."""
    total = history.total_steps
    of = f"/{total}" if total else ""
    rate = history.tokens_per_second
    speed = f"  {rate:,.0f} tok/s" if rate is not None and math.isfinite(rate) else ""
    left = "" if total is None or history.eta_seconds is None else f"  ETA {duration(history.eta_seconds)}"
    return (
        f"step {event.step}{of}  loss {event.loss:.4f}  lr {event.learning_rate:.2e}  "
        f"grad {event.grad_norm:.3g}{speed}{left}"
    )


def event_line(event: RunEvent) -> str:
    """Return a line for a rare event, nothing for one that is not told in lines."""
    told = _LINES.get(event.kind)
    return told(event) if told else ""


def _started(event: Started) -> str:
    known = " ".join(plain(part, one_line=True, limit=120) for part in (event.job, event.method, event.model) if part)
    after = f", continues after step {event.resumed_from}" if event.resumed_from else ""
    return f"started: {known}{after}"


def _planned(event: Planned) -> str:
    words = [plain(word, one_line=True, limit=80) for word in (event.device, event.dtype, event.loss_path)]
    return (
        f"planned: {event.total_steps} steps over {event.rows} rows ({event.held_out_rows} held out), "
        f"{event.trainable_parameters:,} trainable parameters, {words[0]} in {words[1]}, {words[2]} loss"
    )


def _evaluated(event: Evaluated) -> str:
    return f"held-out loss {event.loss:.4f} at step {event.step} ({event.rows} rows, {duration(event.seconds)})"


def _saved(event: Saved) -> str:
    length = f", {size(event.size_bytes)}" if event.size_bytes is not None else ""
    return f"saved {plain(event.what, one_line=True)}: {plain(event.path, one_line=True)}{length}"


def _warned(event: Warned) -> str:
    return f"warning: {plain(event.message, limit=2000)}"


def _paused(event: Paused) -> str:
    why = f": {plain(event.reason, one_line=True, limit=400)}" if event.reason else ""
    return f"paused after step {event.step}{why}" if event.paused else f"goes on after step {event.step}"


def _phase_line(event: Phase) -> str:
    share = "" if event.fraction is None or not math.isfinite(event.fraction) else f" {event.fraction:.0%}"
    detail = f": {plain(event.detail, one_line=True, limit=200)}" if event.detail else ""
    return f"{plain(event.name, one_line=True, limit=80)}{share}{detail}"


_LINES: dict[str, Callable[[Any], str]] = {
    "Started": _started,
    "Planned": _planned,
    "Evaluated": _evaluated,
    "Saved": _saved,
    "Warned": _warned,
    "Paused": _paused,
}
