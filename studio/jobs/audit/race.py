"""LoRA against QLoRA, trained from the same recipe, seed and data, and measured on the same held-out rows."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studio.core.audit import advise_race
from studio.core.base_form import base_form, kept_modules
from studio.core.events import Phase, Warned
from studio.core.intervals import Interval
from studio.core.recipe import Recipe
from studio.jobs.audit.lanes import Lane, lane_recipe, run_lanes
from studio.probe.audit import data_path, recipe_of_race
from studio.probe.quality import data_fingerprint, model_fingerprint
from studio.runs.audit_request import AuditRequest
from studio.runs.quality import LaneResult, remember_results
from studio.runs.status import Status
from studio.runs.summary import folder_bytes, summary_of
from studio.runs.worker import Worker

_TRAINING_SHARE = 0.85
_MOST_POINTS = 200


def audit_race(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Train the lanes, measure them and return the report; the results are kept for this model and data.

    Raises:
        BadInput: Recipe, model or data cannot be used.
        JobFailed: A lane ended without an adapter, or cannot be measured.
        Cancelled: The user asked for it.
    """
    began = time.perf_counter()
    recipe = recipe_of_race(request)
    request.check_lanes()
    names = request.lanes
    for name in names:
        lane_recipe(recipe, name, names)
    lanes = run_lanes(worker, recipe, names, share=_TRAINING_SHARE)
    worker.emit(Phase, name="measuring the lanes", fraction=_TRAINING_SHARE)
    # Torch only now: while the lanes train, this process only watches them.
    from studio.jobs.audit.race_figures import measure_lanes  # noqa: PLC0415

    found, told, folder = measure_lanes(worker, request, lanes, share=(_TRAINING_SHARE, 1.0))
    plans = {lane.name: _plan(lane) for lane in lanes}
    summaries = {lane.name: summary_of(lane.paths, lane.watch.history, Status.finished) for lane in lanes}
    rows = [
        {
            "name": lane.name,
            "run": lane.paths.name,
            "form": _held_in(lane.recipe),
            "task": asdict(found.task[lane.name]),
            "neutral": asdict(found.neutral[lane.name]),
            "peak_predicted_bytes": plans[lane.name].get("peak_bytes"),
            "peak_measured_bytes": summaries[lane.name]["peak_bytes"],
            "peak_measured": "allocated" if summaries[lane.name]["device"] not in (None, "cpu") else "resident",
            "tokens_per_second": summaries[lane.name]["tokens_per_second"],
            "seconds": summaries[lane.name]["seconds"],
            "steps": summaries[lane.name]["steps"],
            "adapter_bytes": folder_bytes(lane.paths.adapter),
            "curve": _thinned(lane.watch.history.train.steps, lane.watch.history.train.losses),
            "held_out": [[event.step, event.loss] for event in lane.watch.history.evals],
        }
        for lane in lanes
    ]
    _remember(worker, rows, folder, Path(data_path(recipe.data.path)))
    advice = advise_race(
        {lane.name: found.task[lane.name] for lane in lanes},
        {name: plan.get("peak_bytes") for name, plan in plans.items()},
        told["different_answers"],
    )
    return {
        "schema": 1,
        "what": "race",
        "recipe": recipe.name,
        "model": recipe.model.base,
        "data": recipe.data.path,
        "reference": names[0],
        **told,
        "lanes": rows,
        "recommendation": asdict(advice),
        "cost": {"seconds": time.perf_counter() - began},
    }


def _held_in(recipe: Recipe) -> str:
    kept = kept_modules(recipe)
    return f"{base_form(recipe)}, {', '.join(kept)} in 16 bit" if kept else base_form(recipe)


def _plan(lane: Lane) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        plan = json.loads(lane.paths.plan.read_bytes())
        if isinstance(plan, dict):
            return plan
    return {}


def _thinned(steps: Sequence[int], losses: Sequence[float]) -> list[list[float]]:
    apart = max(1, len(steps) // _MOST_POINTS)
    return [[step, loss] for step, loss in list(zip(steps, losses, strict=True))[::apart]]


def _remember(worker: Worker, rows: Sequence[dict[str, Any]], folder: Path, data: Path) -> None:
    """Keep the results; a home that cannot be written to costs the memory of them, not the report."""
    try:
        model, rested = model_fingerprint(folder), data_fingerprint(data)
        remember_results(
            tuple(
                LaneResult(
                    model=model,
                    data=rested,
                    lane=row["name"],
                    run=row["run"],
                    loss=Interval(**row["task"]["loss"]),
                    more=Interval(**row["task"]["more"]),
                    tokens=row["task"]["tokens"],
                    steps=row["steps"],
                    tokens_per_second=row["tokens_per_second"],
                )
                for row in rows
            )
        )
    except OSError as error:
        worker.emit(Warned, topic="audit", message=f"the outcome is not kept for the next recipe: {error}")
