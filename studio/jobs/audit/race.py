"""Compares LoRA and QLoRA, trained with the same recipe, seed and data, on the same held-out rows."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from studio.core.audit import advise_race
from studio.core.audit_tables import joined
from studio.core.base_form import base_form, precision_words
from studio.core.errors import BadInput
from studio.core.events import Phase, Warned
from studio.core.intervals import Interval
from studio.core.recipe import Recipe
from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.figures import Measured, check_cost, ground_of, measure, prove
from studio.jobs.audit.lanes import TRAINING_SHARE, Lane
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.audit.variants import AdapterForms, stored_variant
from studio.jobs.audit.walk import Variant
from studio.jobs.base.load import base_folder, four_bit_of
from studio.jobs.base.progress import read_fingerprint
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.probe.adapter_folder import find_adapter
from studio.probe.audit import audit_of_run, recipe_of_race
from studio.probe.fingerprint import short_fingerprint
from studio.probe.held_out import rows_of_run
from studio.probe.models import find_base
from studio.probe.quality import data_fingerprint, model_fingerprint
from studio.runs.atomic import read_object
from studio.runs.held_out import read_record, shared_record
from studio.runs.quality import LaneResult, remember_results
from studio.runs.requests import AuditRequest
from studio.runs.status import Status
from studio.runs.summary import folder_bytes, summary_of
from studio.runs.worker import Worker

_MOST_POINTS = 200


def audit_race(worker: Worker, request: AuditRequest, lanes: Sequence[Lane], began: float) -> dict[str, Any]:
    """Measure the lanes and return the report; the results are kept for this model and data.

    Args:
        worker: Of the race.
        request: Names the recipe and the lanes.
        lanes: The trained lanes.
        began: When their training began, as `time.perf_counter` counts.

    Raises:
        BadInput: A lane's base, data or adapter cannot be used.
        JobFailed: A lane cannot be measured.
        Cancelled: The user asked for it.
    """
    recipe = recipe_of_race(request)
    found, told, folder = measure_lanes(worker, request, lanes, share=(TRAINING_SHARE, 1.0))
    plans = {lane.name: read_object(lane.paths.plan) for lane in lanes}
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
    _remember(worker, rows, folder, recipe)
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
        "data": " + ".join(recipe.data.words),
        "reference": lanes[0].name,
        **told,
        "lanes": rows,
        "recommendation": asdict(advice),
        "cost": {"seconds": time.perf_counter() - began},
    }


def measure_lanes(
    worker: Worker, request: AuditRequest, lanes: Sequence[Lane], *, share: tuple[float, float]
) -> tuple[Measured, dict[str, Any], Path]:
    """Return the figures of the lanes compared with the first one, facts on the rows, and the base's folder.

    The rows are those that every lane held out and none was trained on, according to the lanes' own records.

    Raises:
        BadInput: A lane's base, data or adapter cannot be used.
        JobFailed: The model cannot be run block by block, or a number is not finite.
        Cancelled: The user asked for it.
    """
    first = lanes[0]
    base = find_base(first.recipe.model.base, first.recipe.model.revision)
    folder = base_folder(base, lambda name, fraction: worker.emit(Phase, name=name, fraction=fraction))
    of_first = replace(audit_of_run(first.paths), text=request.text)
    rows = read_audit_rows(
        of_first,
        load_tokenizer(first.paths.adapter),
        lambda text: worker.emit(Warned, topic="data", message=text),
        found=rows_of_run(
            shared_record([read_record(lane.paths) for lane in lanes]),
            f"the runs {joined([lane.paths.name for lane in lanes])}",
            Path(of_first.data),
            format=of_first.format,
            wanted=int(of_first.rows),
            seed=int(of_first.seed),
        ),
        recipe=first.recipe,
    )
    weights = FolderWeights.of(folder)
    found = short_fingerprint(read_fingerprint(worker, folder))
    runs = [str(lane.paths.root) for lane in lanes]
    ground = ground_of(worker, request, weights, parts_of(weights.clean), rows, found, runs)
    variants = [_variant(weights, folder, lane) for lane in lanes]
    check_cost(ground, variants, alone=False)
    prove(ground, stored_variant(weights))
    return measure(ground, variants, kept_as="lanes", share=share), rows.told(), folder


def _variant(weights: FolderWeights, folder: Path, lane: Lane) -> Variant:
    quant = four_bit_of(lane.recipe.model)
    skeleton = build_skeleton(folder, find_adapter(lane.paths.adapter))
    if skeleton.vocabulary is not None:
        raise BadInput(f"the lane {lane.name} brings an embedding of its own, which a race cannot compare yet.")
    forms = AdapterForms(weights, skeleton, quant)
    (trained, *_) = forms.all(trained_in_4_bits=lane.recipe.method == "qlora")
    variant = trained.variant
    own_key = f"{lane.name}:{variant.head.key}" if variant.head.key else ""
    return replace(variant, name=lane.name, head=replace(variant.head, key=own_key))


def _held_in(recipe: Recipe) -> str:
    return ", ".join(filter(None, (base_form(recipe), precision_words(recipe))))


def _thinned(steps: Sequence[int], losses: Sequence[float]) -> list[list[float]]:
    apart = max(1, len(steps) // _MOST_POINTS)
    return [[step, loss] for step, loss in list(zip(steps, losses, strict=True))[::apart]]


def _remember(worker: Worker, rows: Sequence[dict[str, Any]], folder: Path, recipe: Recipe) -> None:
    """Keep the results for later recommendations; if they cannot be written, warn, and report all the same."""
    try:
        model, rested = model_fingerprint(folder), data_fingerprint(recipe)
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
