"""One measurement of a training step, from its request to its report: traced without a card, or run on a real one."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
import transformers

from studio.core.events import Finished, Phase, Started, Warned
from studio.core.layer_precision import in_sixteen_bit
from studio.core.quantised_base import QuantisedBase
from studio.core.recipe import Recipe
from studio.jobs.base.device import job_device
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.progress import heed
from studio.jobs.measure.real import measure_card
from studio.jobs.measure.trace import Target, trace
from studio.probe.measure import base_config, remember_measurement
from studio.probe.models import BaseFound, refuse_untrainable
from studio.runs.atomic import write_whole
from studio.runs.requests import MeasureRequest
from studio.runs.worker import Worker

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def measure_run(worker: Worker, request: MeasureRequest) -> None:
    """Measure a training step and write `report.json`: bytes by stage and component.

    Raises:
        BadInput: The model cannot be built or loaded.
        JobFailed: The recipe does not fit the model, or its step cannot be traced.
    """
    recipe = request.recipe
    versions = {name: version(name) for name in _LIBRARIES}
    worker.emit(Started, job="measure", method=recipe.method, model=recipe.model.base, versions=versions)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    began = time.perf_counter()
    on_card = request.how == "auto" and request.device == "cuda"
    device = job_device(recipe.device.device) if on_card else torch.device("cpu")
    if device.type == "cuda":
        worker.emit(Phase, name="training three steps on the longest rows")
        seen = measure_card(worker, recipe, device)
    else:
        worker.emit(Phase, name="tracing the step without weights", detail=recipe.method)
        try:
            seen = _traced(worker, request)
        except Cancelled:
            return worker.emit(Finished, outcome="stopped", seconds=round(time.perf_counter() - began, 3))
    report = {**seen, "versions": versions, "seconds": round(time.perf_counter() - began, 3)}
    write_whole(worker.paths.report, json.dumps(report, indent=1))
    if why := remember_measurement(worker.paths, report, time.time()):
        worker.emit(Warned, topic="calibration", message=f"what was measured is not kept for later plans: {why}")
    return worker.emit(Finished, outcome="done", seconds=report["seconds"])


def _traced(worker: Worker, request: MeasureRequest) -> Mapping[str, Any]:
    def look() -> None:
        heed(worker, "stopped while the step was traced")

    recipe = request.recipe
    target = Target(request.device, request.dtype, request.capability)
    values = base_config(recipe.model.base, recipe.model.revision)
    base = BaseFound("folder", recipe.model.base, None, values, 0)
    refuse_untrainable(base, recipe.method)
    seen = trace(_as_it_lies(recipe, base.quantised), values, target, on_stage=look)
    return {"source": "trace", "peaks": seen.log.peaks(), "trainable_parameters": seen.trainable_parameters}


def _as_it_lies(recipe: Recipe, base: QuantisedBase | None) -> Recipe:
    """Return the recipe with the 4-bit form of a prequantised base, which is kept when it is loaded.

    A base in another code, such as MXFP4, is brought into the recipe's form while it is loaded.
    """
    if base is None or not base.in_four_bits:
        return recipe
    kept = in_sixteen_bit(base.skipped)
    held = replace(recipe.model, quant_type=base.quant_type, double_quant=base.double_quant, precision=kept)
    return replace(recipe, model=held)
