"""A run in a few plain values: the same for `--json`, for comparisons and for what is said at its end."""

import math
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from studio.core.advice import Learnt, Try, next_tries
from studio.core.errors import BadInput
from studio.core.events import PAIR_FIGURES, Evaluated, StepDone
from studio.core.evidence import LEAST_TOKENS, gain_in_words
from studio.core.intervals import Interval
from studio.core.recipe import FIELDS, Recipe
from studio.runs.atomic import read_object
from studio.runs.beside import troubles
from studio.runs.checkpoints import checkpoints_kept
from studio.runs.control import requested
from studio.runs.history import History
from studio.runs.job import read_job
from studio.runs.last_words import CRASHED, crash_of, printed_since_launch
from studio.runs.layout import RunPaths
from studio.runs.restarts import read_guard
from studio.runs.scratch import left_by
from studio.runs.silence import silent_seconds
from studio.runs.status import Status

_RESUME = "runs resume RUN"
"""How a job, which does not know its run's name, advises to resume it."""
_LAST_STEPS = 3
"""Steps over which the last training loss is taken: the rows of one step may be easy ones."""
_UNSAID = "the worker's process ended without saying why"


def summary_of(paths: RunPaths, history: History, status: Status, now: float | None = None) -> dict[str, Any]:
    """Return the outcome of a run, ready for JSON. A number that is unknown or not finite is null.

    Args:
        paths: The run.
        history: What it told.
        status: How it stands.
        now: Unix seconds, by which a live run may have been silent for long; None asks the clock.
    """
    started, finished, gain = history.started, history.finished, gain_of(history)
    return {
        "run": paths.name,
        "path": str(paths.root),
        "job": started.job if started else None,
        "status": str(status),
        "paused_for": history.paused_for if status is Status.paused and history.paused_for else None,
        "guard": asdict(guard) if (guard := read_guard(paths)) else None,
        "queued": history.phase.detail if status is Status.queued and history.phase else None,
        "silent_seconds": _number(silent_seconds(history, status, time.time() if now is None else now)),
        "method": started.method if started else None,
        "model": started.model if started else None,
        "device": history.planned.device if history.planned else None,
        "card": (history.planned.card or None) if history.planned else None,
        "adapter": str(paths.adapter) if paths.adapter.is_dir() else None,
        "out": _merged(history),
        "steps": history.last_step,
        "total_steps": history.total_steps,
        "train_loss": _ends(list(history.train.losses[:1]) + list(history.train.losses[-1:])),
        "eval_loss": _eval_ends(history),
        "gain": gain,
        "next": []
        if status.live or gain is None
        else [one.told() for one in tries_of(paths, history, gain["improved"])],
        "objective": history.objective if started and started.job == "train" else None,
        "pairs": pairs_of(history),
        "tokens": history.train.all_tokens,
        "tokens_per_second": _number(history.tokens_per_second),
        "left_out": history.planned.left_out if history.planned else {},
        "seconds": _number(history.seconds),
        "peak_bytes": peak_bytes(history),
        "checkpoints": checkpoints_kept(paths.checkpoints),
        "shrunk": [{"step": event.step, "stage": event.stage, "words": event.words} for event in history.shrunk],
        "warnings": list(dict.fromkeys([*(event.message for event in history.warnings), *troubles(paths)])),
        "failure": _failure(paths, history, status),
        "result": finished.result if finished else {},
    }


def _merged(history: History) -> str | None:
    """Return where a merge or an export put its model; None for other jobs, and before it is there."""
    return next((event.path for event in history.saved if event.what in ("merged", "exported")), None)


def differing_fields(recipes: Sequence[Recipe | None]) -> dict[str, list[Any]]:
    """Return the fields in which recipes differ, each with its values in order; the name is no difference.

    Where a recipe is missing (another kind of job, or an unreadable file) its values are None and make no difference.
    """
    values = {path: [None if recipe is None else recipe.get(path) for recipe in recipes] for path in FIELDS}
    known = [place for place, recipe in enumerate(recipes) if recipe is not None]
    return {
        path: found
        for path, found in values.items()
        if path != "name" and any(found[place] != found[known[0]] for place in known)
    }


def peak_bytes(history: History) -> int | None:
    """Return the highest memory reading: the allocator's peak on CUDA, the resident peak on a CPU."""
    for series in (history.memory.peak_bytes, history.memory.resident_peak_bytes):
        known = [value for value in series if not math.isnan(value)]
        if known:
            return int(max(known))
    return None


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files. A file that vanishes meanwhile or cannot be read counts as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _ends(values: list[float]) -> dict[str, float | None]:
    first, last = (values[0], values[-1]) if values else (None, None)
    return {"first": _number(first), "last": _number(last)}


def _eval_ends(history: History) -> dict[str, Any]:
    """Return the first and last held-out loss with their steps; of a run that was stopped early they may be one."""
    steps = [event.step for event in history.evals]
    first, last = (steps[0], steps[-1]) if steps else (None, None)
    return {**_ends([event.loss for event in history.evals]), "first_step": first, "last_step": last}


def gain_of(history: History) -> dict[str, Any] | None:
    """Return what training did to the held-out loss, ready for JSON; None before a step of training is done.

    `improved` is true or false where the run's held-out rows can tell, else null; `words` says so, with the reason.
    `value` is the loss per token at the last evaluation minus that before the first step, from `low` to `high`.
    """
    if history.started is None or history.started.job != "train" or not history.last_step:
        return None
    told: dict[str, Any] = {"improved": None, "value": None, "low": None, "high": None}
    if not history.evals:
        return told | {"words": "no held-out loss was measured: what it learnt beyond its own rows is not known"}
    last = history.evals[-1]
    if not last.step:
        return told | {"words": "the held-out loss was measured before training only: whether it improved is not known"}
    more = _interval(last.gain)
    if more is None:
        why = "the losses of its rows before training are not known"
        return told | {"words": f"whether the held-out loss improved beyond noise is not known: {why}"}
    # Of pairs `loss_tokens` counts the pairs; a pair's loss rests on all tokens of its answers.
    tokens = last.loss_tokens if last.margin is None else max(last.loss_tokens, LEAST_TOKENS)
    improved, words = gain_in_words(more, last.rows, tokens)
    return {"improved": improved, "value": more.value, "low": more.low, "high": more.high, "words": words}


def tries_of(paths: RunPaths, history: History, improved: bool | None) -> tuple[Try, ...]:
    """Return what to try after a training that has ended, the most promising first; nothing where it beat its base.

    Args:
        paths: The run.
        history: What it told.
        improved: Whether it beat its base on rows that it did not learn from; None where that cannot be told.
    """
    try:
        recipe = read_job(paths, Recipe)
    except BadInput:
        return ()
    planned = history.planned
    if recipe is None or planned is None:
        return ()
    losses = [loss for loss in history.train.losses if math.isfinite(loss)]
    last = history.evals[-1] if history.evals else None
    learnt = Learnt(
        steps=history.last_step,
        planned=planned.total_steps,
        rows=planned.rows,
        held_out_rows=planned.held_out_rows,
        gain=_interval(last.gain) if last else None,
        held_out=[(event.step, event.loss) for event in history.evals],
        training=(losses[0], statistics.fmean(losses[-_LAST_STEPS:])) if losses else None,
        model=_model_of(paths),
    )
    named = (replace(one, words=one.words.replace(_RESUME, f"runs resume {paths.name}"))
             for one in next_tries(recipe, learnt, improved))  # fmt: skip
    return tuple(named)


def _model_of(paths: RunPaths) -> tuple[int, int] | None:
    """Return parameters and width of a run's base, as its plan holds them; None where it does not."""
    model = read_object(paths.plan).get("model")
    parameters, hidden = (model.get("parameters"), model.get("hidden")) if isinstance(model, dict) else (None, None)
    if type(parameters) is int and type(hidden) is int and parameters > 0 and hidden > 0:
        return parameters, hidden
    return None


def command_of(paths: RunPaths, tries: Sequence[Mapping[str, Any]]) -> str:
    """Return the command that trains again with what is to be tried; empty where no field says it."""
    settings = {path: value for tried in tries for path, value in tried["settings"].items()}
    if not settings:
        return ""
    changed = " ".join(f"--set {path}={value:g}" for path, value in settings.items())
    return f"lora-studio train {shlex.quote(str(paths.recipe))} {changed}"


def pairs_of(history: History) -> dict[str, dict[str, float | None]] | None:
    """Return the figures of pairs of answers (`PAIR_FIGURES`), ready for JSON; None for other runs.

    They are those of the last step, of the first evaluation and of the last one; unknown ones are null.
    """
    if not history.train.pairs and not any(event.margin is not None for event in history.evals):
        return None
    first, last = (figures_of(history.evals[place]) if history.evals else {} for place in (0, -1))
    steps = {name: _number(values[-1]) if values else None for name, values in history.train.pairs.items()}
    return {"last_step": steps, "first_evaluation": first, "last_evaluation": last}


def figures_of(event: StepDone | Evaluated) -> dict[str, float | None]:
    """Return what an event tells of pairs of answers; nothing where it learns from or measures none."""
    if event.margin is None:
        return {}
    return {name: _number(getattr(event, name)) for name in PAIR_FIGURES}


def _interval(table: object) -> Interval | None:
    """Return the interval in an event's table; None where the table is not one, since a log may hold anything."""
    if not isinstance(table, dict):
        return None
    value, low, high = (table.get(key) for key in ("value", "low", "high"))
    known = [end for end in (value, low, high) if end is not None]
    if value is None or not all(isinstance(end, int | float) and math.isfinite(end) for end in known):
        return None
    return Interval(value, low, high)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _failure(paths: RunPaths, history: History, status: Status) -> dict[str, Any] | None:
    run = paths.name
    if history.failed is not None:
        failed = history.failed
        advice = failed.advice.replace(_RESUME, f"runs resume {run}")
        return {"kind": failed.failure, "message": failed.message, "advice": advice, "step": failed.step}
    if status is Status.crashed:
        known = crash_of(paths, history)
        said = "the last lines it printed are in output.log" if printed_since_launch(paths) else "it printed nothing"
        kind, message = known.kind if known else CRASHED, str(known) if known else f"{_UNSAID}; {said}"
        advice = known.advice if known else f"lora-studio runs resume {run}"
        if requested(paths, "queued"):
            advice = f"lora-studio runs queue resume, by which it keeps its place; or {advice}, which starts it at once"
        if scratch := left_by(paths):
            left = sum(map(folder_bytes, scratch.folders)) / 1e9
            advice += f"; or runs rm {run}, which deletes also what lies half-made beside its output ({left:.2f} GB)"
        return {"kind": kind, "message": message, "advice": advice, "step": history.last_step}
    return None
