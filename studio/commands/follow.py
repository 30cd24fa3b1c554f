"""Following a run to its end from the command line, and saying what came of it."""

import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from studio.commands.loss_plot import loss_plot
from studio.commands.terminal import (
    BAD_INPUT,
    DONE,
    NO,
    Interrupts,
    complain,
    duration,
    is_rich,
    number,
    say,
    size,
    width_of_terminal,
    write_json,
)
from studio.core.errors import StudioError
from studio.core.events import Changed, Evaluated, Paused, Phase, Planned, RunEvent, Saved, Started, StepDone, Warned
from studio.core.left_out import left_out_in_words
from studio.core.notice import desktop_notice
from studio.core.preferences import preferred_in_words
from studio.core.text import plain
from studio.runs.control import request
from studio.runs.failure import BAD_INPUT as FOUND_BAD_INPUT
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.summary import command_of, figures_of, summary_of
from studio.runs.supervise import how_it_ended
from studio.runs.watch import RunWatch, last_output

_POLL_SECONDS = 0.2
_GONE = "its folder was deleted while it was followed"
_LINE_CHARACTERS = 300
_SECONDS_BETWEEN = 1.0
_LONG_SECONDS = 60.0
"""Who waits for a run as long as this has turned to something else: its end rings the bell."""


@dataclass(frozen=True, slots=True)
class End:
    """How following ended: the run's status, and whether the user left while it lived."""

    status: Status
    left: bool


def follow(
    watch: RunWatch,
    *,
    to: TextIO,
    stops_on_interrupt: bool,
    told: Collection[str] = (),
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> End:
    """Tell a run's progress until it ends or the user leaves it.

    Args:
        watch: The run. Events that it has read already are not told again.
        to: Where lines go.
        stops_on_interrupt: The first Ctrl-C asks the run to stop and the second leaves it; else the first one leaves.
        told: Warnings that were said before the start and are not said again.
        sleep: Waits between two looks.
        clock: Seconds, for the pace of lines.

    Raises:
        StudioError: The run's folder was deleted meanwhile.
    """
    lines = EventLines(lambda line: say(line, to=to), clock=clock, told=told)
    asked, patience = False, 1 if stops_on_interrupt else 0  # how many Ctrl-C are taken before one leaves the run
    with Interrupts() as interrupts:
        while True:
            events = watch.poll()
            lines.tell(events, watch.history)
            status = run_status(watch.paths)
            if not events and not status.live:
                if status is Status.crashed:
                    sleep(_POLL_SECONDS)  # a folder that is being deleted looks like a crash until it is gone
                _drain(watch, lines)
                if not watch.paths.root.is_dir():
                    raise StudioError(f"the run {plain(watch.paths.name, one_line=True)} is gone: {_GONE}.")
                return End(run_status(watch.paths), left=False)
            if interrupts.count and stops_on_interrupt and not asked:
                asked = True
                request(watch.paths, "stop")
                started = watch.history.started
                # Only training has steps to save; other jobs stop between two pieces of their work.
                how = "stopping after this step and saving" if started and started.job == "train" else "asked to stop"
                say(f"{how}; Ctrl-C again returns at once, and the run stops by itself", to=to)
            if interrupts.count > patience:
                lines.flush()
                return End(run_status(watch.paths), left=True)
            if not events:
                sleep(_POLL_SECONDS)


class EventLines:
    """Turns events into lines.

    Of steps and of the progress of a phase, about one line a second is told. The newest line is held back until then,
    and is told before a line of another kind.
    """

    def __init__(
        self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic, told: Collection[str] = ()
    ) -> None:
        """Start with nothing told but the warnings in `told`, which are not said again."""
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
        """Tell the line that was held back, if any."""
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
    figures = figures_of(event)
    pairs = f"  margin {figures['margin'] or 0:+.3f}  preferred {figures['accuracy'] or 0:.0%}" if figures else ""
    return (
        f"step {event.step}{of}  loss {event.loss:.4f}{pairs}  lr {event.learning_rate:.2e}  "
        f"grad {event.grad_norm:.3g}{speed}{left}"
    )


def event_line(event: RunEvent) -> str:
    """Return a line for an event that comes seldom; empty for kinds that are not told in lines."""
    told = _LINES.get(event.kind)
    return told(event) if told else ""


def _started(event: Started) -> str:
    known = " ".join(plain(part, one_line=True, limit=120) for part in (event.job, event.method, event.model) if part)
    after = f", continues after step {event.resumed_from}" if event.resumed_from else ""
    return f"started: {known}{after}"


def _changed(event: Changed) -> str:
    # A log may hold anything: what is not as declared is shown as it is.
    fields = [f"{path}: {_pair(values)}" for path, values in event.recipe.items()]
    more = [_added(one) if isinstance(one, dict) else str(one) for one in event.extensions]
    return plain(f"unlike at its first start: {', '.join([*fields, *more])}", one_line=True, limit=400)


def _pair(values: object) -> str:
    return " -> ".join(map(str, values)) if isinstance(values, list) else str(values)


def _added(extension: Mapping[str, Any]) -> str:
    return f"{extension.get('steps')} steps added after step {extension.get('after')} ({extension.get('tail')})"


def _planned(event: Planned) -> str:
    words = [plain(word, one_line=True, limit=80) for word in (event.device, event.dtype, event.loss_path)]
    left_out = f"{told}, " if (told := plain(left_out_in_words(event.left_out), one_line=True, limit=400)) else ""
    return (
        f"planned: {event.total_steps} steps over {event.rows} rows ({event.held_out_rows} held out), {left_out}"
        f"{event.trainable_parameters:,} trainable parameters, {words[0]} in {words[1]}, {words[2]} loss{_held(event)}"
    )


def _held(event: Planned) -> str:
    if not event.four_bit_share or event.kept_16bit_bytes is None:
        return ""
    return (
        f"; {event.four_bit_share:.1%} of the layers' weights in 4 bits, {size(event.kept_16bit_bytes)} not quantised"
    )


def _evaluated(event: Evaluated) -> str:
    pairs = f"; {said}" if (said := preferred_in_words(figures_of(event))) else ""
    return f"held-out loss {event.loss:.4f} at step {event.step} ({event.rows} rows, {duration(event.seconds)}){pairs}"


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
    "Changed": _changed,
    "Planned": _planned,
    "Evaluated": _evaluated,
    "Saved": _saved,
    "Warned": _warned,
    "Paused": _paused,
}


def conclude(watch: RunWatch, end: End, *, as_json: bool) -> int:
    """Say what came of a run, with the loss plot, or write the JSON summary; return the exit code."""
    summary = summary_of(watch.paths, watch.history, end.status)
    code = exit_code(summary, end)
    to = sys.stderr if as_json else sys.stdout
    if end.left:
        say(f"the run lives on; look again with: lora-studio runs attach {watch.paths.name}", to=to)
    elif end.status in (Status.failed, Status.crashed):
        tell_failure(watch.paths, summary)
    else:
        tell_success(watch, summary, to)
    if as_json:
        write_json(summary)
    if not end.left and sys.stderr.isatty() and (summary["seconds"] or 0.0) >= _LONG_SECONDS:
        notice = desktop_notice(f"{summary['run']}: {summary['status']}", os.environ)
        print(f"\a{notice}", end="", file=sys.stderr, flush=True)  # not through `say`, which would make it visible
    return code


def exit_code(summary: dict[str, Any], end: End) -> int:
    """Return the exit code of a run that was followed.

    It is 0 for a finished run, for a stopped one that has an adapter and for one that the user left alive. It is 2
    where the worker found that it could not use what it was given, and 1 for everything else.
    """
    if end.left:
        return DONE
    if _given_bad_input(summary):
        return BAD_INPUT
    if end.status is Status.stopped:
        return DONE if summary["adapter"] else NO
    return DONE if end.status is Status.finished else NO


def tell_success(watch: RunWatch, summary: dict[str, Any], to: TextIO) -> None:
    """Say how a run went that finished or was stopped on request."""
    plot = loss_plot(watch.history, width=width_of_terminal(), rich=is_rich(to))
    if plot:
        # Not through `say`, which would make the escapes of its colours visible. Nothing in a plot is foreign text.
        print(plot, file=to, flush=True)
    steps = f" after {summary['steps']} steps" if summary["job"] not in ("merge", "export") else ""
    for one in summary["shrunk"]:
        say(f"made smaller after step {one['step']}: {plain(one['words'], one_line=True, limit=200)}", to=to)
    say(f"{summary['status']}{steps} in {duration(summary['seconds'])}{_losses(summary)}", to=to)
    if summary["gain"]:
        say(summary["gain"]["words"], to=to)
    for line in next_lines(watch.paths, summary):
        say(line, to=to)
    if told := left_out_in_words(summary["left_out"]):
        say(f"rows: {plain(told, one_line=True, limit=400)}", to=to)
    if summary["out"]:
        say(
            f"{'exported' if summary['job'] == 'export' else 'merged'} model: {plain(summary['out'], one_line=True)}",
            to=to,
        )
    elif summary["adapter"]:
        say(f"adapter: {plain(summary['adapter'], one_line=True)}", to=to)
    elif summary["job"] == "train":
        say("no adapter was saved", to=to)


def next_lines(paths: RunPaths, summary: Mapping[str, Any]) -> list[str]:
    """Return what to try after a run that did not beat its base, and the command for it; nothing for others."""
    if not summary["next"]:
        return []
    lines = [f"  - {plain(tried['words'], one_line=True, limit=400)}" for tried in summary["next"]]
    command = command_of(paths, summary["next"])
    return ["what to try next:", *lines, *([f"  {plain(command, one_line=True)}"] if command else [])]


def tell_failure(paths: RunPaths, summary: dict[str, Any]) -> None:
    """Say on stderr what went wrong, what to do, and what the process printed last."""
    failure = summary["failure"] or {}
    at = f" at step {failure['step']}" if failure.get("step") else ""
    complain(f"{summary['status']}{at}: {failure.get('message', 'no reason is known')}")
    if summary["status"] == Status.crashed and (ended := how_it_ended(paths)):
        complain(ended)
    if advice := failure.get("advice"):
        complain(f"what to do: {advice}")
    # For bad input the message says everything: the output would only add our own traceback.
    lines = [] if _given_bad_input(summary) else last_output(paths)
    if lines:
        complain(f"the last lines of {plain(str(paths.output), one_line=True)}:")
        for line in lines:
            complain(f"  {plain(line, one_line=True, limit=_LINE_CHARACTERS)}")


def _given_bad_input(summary: dict[str, Any]) -> bool:
    return (summary["failure"] or {}).get("kind") == FOUND_BAD_INPUT


def loss_ends(ends: Mapping[str, Any]) -> str:
    """Return the first and the last loss; for a single measurement the loss and its step, and for none a dash."""
    first, last = number(ends["first"]), number(ends["last"])
    if ends["last"] is None and ends["first"] is None:
        return last
    step = ends.get("last_step")
    if step is not None and step == ends["first_step"]:
        return f"{last} (only at step {step})"
    return f"{first} -> {last}"


def _losses(summary: dict[str, Any]) -> str:
    words = {"train_loss": "training loss", "eval_loss": "held-out loss"}
    told = [f"{word} {loss_ends(ends)}" for key, word in words.items() if (ends := summary[key])["last"] is not None]
    return f": {', '.join(told)}" if told else ""


def _drain(watch: RunWatch, lines: EventLines) -> None:
    while events := watch.poll():
        lines.tell(events, watch.history)
    lines.flush()
