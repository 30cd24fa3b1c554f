"""How a run ended, why, and what to do next."""

from textual.content import Content
from textual.widgets import Static

from studio.core.events import Failed, Finished
from studio.core.text import plain
from studio.runs.history import History
from studio.runs.last_words import crash_of
from studio.runs.layout import ADAPTER_CONFIG, RunPaths
from studio.runs.status import Status
from studio.runs.store import RunInfo
from studio.runs.summary import gain_of, tries_of
from studio.runs.supervise import how_it_ended
from studio.runs.watch import last_output
from studio.tui.feed import harmless
from studio.tui.readable import duration, number

TRAIN = "train"
"""The kind of job that ends with an adapter. Of others, such as merges, the box says what they saved."""

_LAST_LINES = 4
_INDENT = " " * len("Try next: ")


class Outcome(Static):
    """A box that appears when the run has ended. Its text comes from runs, so it is never read as markup."""

    DEFAULT_CSS = """
    Outcome {
        height: auto;
        max-height: 12;
        padding: 0 1;
        display: none;
        border-left: thick $success;
        &.-bad { border-left: thick $error; }
        &.-early { border-left: thick $warning; }
        &.-shown { display: block; }
    }
    """

    def __init__(self) -> None:
        """Start hidden."""
        super().__init__(markup=False)
        self._told: tuple[Status, object] | None = None

    def show(self, paths: RunPaths, history: History, status: Status) -> None:
        """Show the end of a run, or hide while it lives. Repaints only when the end changed."""
        told = (status, history.finished or history.failed or history.started)
        if told == self._told:
            return
        self._told = told
        self.set_class(not status.live, "-shown")
        self.set_class(status in (Status.failed, Status.crashed), "-bad")
        self.set_class(status is Status.stopped, "-early")
        if not status.live:
            self.update(outcome_text(paths, history, status))


def has_adapter(paths: RunPaths) -> bool:
    """Return whether a training run has an adapter that can be merged, audited or chatted with."""
    return (paths.adapter / ADAPTER_CONFIG).is_file()


def why_no_output(status: Status) -> str:
    """Return why a run's process has printed nothing: what a job tells is in its log of events, not printed."""
    told = "What it does is said in the first row, warnings and results under 4 Notes."
    return f"The process {'has printed nothing so far' if status.live else 'printed nothing'}. {told}"


def no_adapter_words(status: Status) -> str:
    """Return why a training run has no adapter."""
    if status.live:
        return "This run has no adapter yet: it is saved when the training ends or is stopped."
    again = "" if status is Status.finished else " R resumes it."
    return f"This run has ended without an adapter.{again}"


def outcome_text(paths: RunPaths, history: History, status: Status) -> Content:
    """Return what there is to say about a run that has ended."""
    if status is Status.crashed:
        return _crashed(paths, history)
    if history.failed is not None:
        return _failed(history.failed, paths)
    if history.started is not None and history.started.job != TRAIN:
        return _other_job_ended(history)
    return _ended(paths, history, history.finished)


def _crashed(paths: RunPaths, history: History) -> Content:
    if known := crash_of(paths, history):
        return _with_advice(f"crashed: {plain(known.kind, one_line=True)}", str(known), known.advice, paths)
    head = (f"crashed: {how_it_ended(paths) or 'the process ended without saying why'}. ", "bold")
    lines = [line for raw in last_output(paths, _LAST_LINES) for line in harmless(raw)]
    said = "Its last lines:\n" + "\n".join(f"  {line}" for line in lines) if lines else "It printed nothing."
    return Content.assemble(head, "R resumes from the last checkpoint. ", said)


def _failed(failed: Failed, paths: RunPaths) -> Content:
    at = f" at step {failed.step}" if failed.step else ""
    return _with_advice(f"failed{at}: {plain(failed.failure, one_line=True)}", failed.message, failed.advice, paths)


def _with_advice(head: str, message: str, advice: str, paths: RunPaths) -> Content:
    # The advice is written for any run: name this one in it.
    named = plain(advice).replace("runs resume RUN", f"runs resume {plain(paths.name, one_line=True)}")
    return Content.assemble((head, "bold"), f"\n{plain(message)}", f"\nWhat to do: {named}" if named else "")


def _other_job_ended(history: History) -> Content:
    saved = [f"\n{plain(item.what, one_line=True)}: {plain(item.path, one_line=True)}" for item in history.saved]
    early = history.finished is not None and history.finished.outcome == "stopped"
    warned = [(f"\n{plain(event.message)}", "$text-warning") for event in history.warnings]
    return Content.assemble(("stopped" if early else "done", "bold"), *saved, *warned)


def _ended(paths: RunPaths, history: History, finished: Finished | None) -> Content:
    early = finished is not None and finished.outcome == "stopped"
    took = f" in {duration(history.seconds)}" if finished else ""
    gain = gain_of(history)
    held_out = _held_out(history, told=gain is not None)
    if paths.adapter.is_dir():
        where = f"\nThe adapter lies in {plain(str(paths.adapter), one_line=True)}"
    else:
        where = "\nNo adapter was saved." if early else ""
    again = "\nR continues where it stopped." if early else ""
    tries = () if early or gain is None else tries_of(paths, history, gain["improved"])
    next_words = [f"\n{'Try next: ' if not place else _INDENT}{plain(one.words)}" for place, one in enumerate(tries)]
    steps = f"{history.last_step} step{'' if history.last_step == 1 else 's'}"
    head = f"{'stopped' if early else 'done'} after {steps}{took}"
    learnt = f"\n{gain['words'][:1].upper()}{gain['words'][1:]}." if gain else ""
    count = len(history.warnings)
    warned = (f"\n{count} warning{'s' * (count != 1)} of this run: 4 Notes", "$text-warning") if count else ""
    return Content.assemble((head, "bold"), held_out, learnt, *next_words, where, again, warned)


def _held_out(history: History, *, told: bool) -> str:
    """Return the first and the last held-out loss; of a single loss, the step at which it was measured.

    Args:
        history: What the run told.
        told: Whether a sentence on the gain follows, which says by itself that a loss is from before the training.
    """
    if not history.evals:
        return ""
    first, last = history.evals[0], history.evals[-1]
    if first.step == last.step:
        since = "" if told and not first.step else ", not measured since"
        return f"  held-out loss {number(first.loss)} at step {first.step}{since}"
    return f"  held-out loss {number(first.loss)} -> {number(last.loss)}"


def why_no_adapter(info: RunInfo, action: str) -> str:
    """Return why a run has nothing to audit or to merge; empty where it has."""
    if info.job not in (None, TRAIN):
        return f"Only a training run has an adapter to {action}."
    if action == "audit" and info.status.live:
        return "A run is audited when it has ended."
    return "" if has_adapter(info.paths) else no_adapter_words(info.status)
