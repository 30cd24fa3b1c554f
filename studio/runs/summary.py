"""A run in a few plain values, the same for the command line's `--json`, comparisons and the end of a run."""

import math
from pathlib import Path
from typing import Any

from studio.runs.aside import left_by
from studio.runs.history import History
from studio.runs.last_words import CRASHED, crash_of
from studio.runs.layout import RunPaths
from studio.runs.status import Status

_RESUME = "runs resume RUN"
"""How jobs, who need not know their run's name, advise to go on."""
_UNSAID = "the worker's process ended without saying why; the last lines it printed are in output.log"


def summary_of(paths: RunPaths, history: History, status: Status) -> dict[str, Any]:
    """Return what a run came to, ready for JSON: a number that is unknown or not finite is null."""
    started, finished = history.started, history.finished
    return {
        "run": paths.name,
        "path": str(paths.root),
        "job": started.job if started else None,
        "status": str(status),
        "paused_for": history.paused_for if status is Status.paused and history.paused_for else None,
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
        "tokens": sum(history.train.tokens),
        "tokens_per_second": _number(history.tokens_per_second),
        "seconds": _number(history.seconds),
        "peak_bytes": peak_bytes(history),
        "warnings": [event.message for event in history.warnings],
        "failure": _failure(paths, history, status),
        "result": finished.result if finished else {},
    }


def _merged(history: History) -> str | None:
    """Where a merge or an export left its model."""
    return next((event.path for event in history.saved if event.what in ("merged", "exported")), None)


def peak_bytes(history: History) -> int | None:
    """Return the highest memory reading: the allocator's peak on CUDA, the resident peak on a CPU."""
    for series in (history.memory.peak_bytes, history.memory.resident_peak_bytes):
        known = [value for value in series if not math.isnan(value)]
        if known:
            return int(max(known))
    return None


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files; what vanishes or cannot be read counts nothing."""
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
    """Held-out losses with their steps: a run that was stopped early may know only the one from before training."""
    steps = [event.step for event in history.evals]
    first, last = (steps[0], steps[-1]) if steps else (None, None)
    return {**_ends([event.loss for event in history.evals]), "first_step": first, "last_step": last}


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
        kind, message = known.kind if known else CRASHED, str(known) if known else _UNSAID
        advice = known.advice if known else f"lora-studio runs resume {run}"
        if aside := left_by(paths):
            left = sum(map(folder_bytes, aside.folders)) / 1e9
            advice += f"; or runs rm {run}, which deletes also what lies half-made beside its output ({left:.2f} GB)"
        return {"kind": kind, "message": message, "advice": advice, "step": history.last_step}
    return None
