"""Measures training steps on a real card, with the training job's model, optimizer and loop, and torch's counters."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from studio.core.events import MemorySeen, RunEvent, Warned
from studio.core.recipe import Recipe
from studio.jobs.base.device import card_used
from studio.jobs.base.precision import choose_precision
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.base.weights.streamed import Absent
from studio.jobs.measure.step import run_steps
from studio.jobs.measure.storages import PAGED, Peaks
from studio.jobs.measure.weightless import frozen_tensors
from studio.jobs.train.batches import Batcher
from studio.jobs.train.memory import limit_memory
from studio.jobs.train.objectives.of_recipe import objective_of
from studio.jobs.train.optimizer import optimizer_of
from studio.jobs.train.step_model import StepModel
from studio.jobs.train.trainable_model import stream_base, trainable_model
from studio.probe.device import place_of
from studio.probe.models import find_base, refuse_untrainable
from studio.runs.worker import Worker

_STEPS = 3
_PROVEN_TOKENS = 64


class Counters(Protocol):
    """The two functions of `torch.cuda` that are used."""

    def max_memory_allocated(self) -> int:
        """Bytes of live tensors at their highest since the last reset."""

    def reset_peak_memory_stats(self) -> None:
        """Make the highest the present one."""


class CardMeter:
    """Reads the allocator's peak at the end of every stage, and keeps the highest of each.

    What weights, gradients and optimizer hold is known from their tensors. The rest of a peak is counted as
    activations, in the loss stage as logits. What bitsandbytes pages is not in the allocator's peak and is counted
    apart.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._stage = ""
        self._heights: dict[str, int] = {}
        self._parts: dict[str, dict[str, int]] = {}
        self._held: dict[str, int] = {}

    def stage(self, name: str) -> None:
        """Begin a stage, which ends the one before."""
        self._close()
        self._stage = name

    def claim(self, tensors: Iterable[Any], component: str) -> None:
        """Count tensors as a component's, in place of earlier ones.

        Gradients come one by one and are added up: all are alive at the end of the backward pass.
        """
        known = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        paged = [tensor for tensor in known if getattr(tensor, "is_paged", False)]
        size = _bytes_of(known) - _bytes_of(paged)
        self._held[component] = size + (self._held.get(component, 0) if component == "gradients" else 0)
        if paged:
            self._held[PAGED] = _bytes_of(paged)

    def seen(self, peak_bytes: int) -> None:
        """Take in a peak, in bytes, that someone else has read and reset during the stage."""
        self._fold(peak_bytes)

    def peaks(self) -> Peaks:
        """Return the bytes of every stage at its highest point, by component."""
        self._close()
        return {stage: dict(self._parts[stage]) for stage in self._heights}

    def _close(self) -> None:
        height = self._counters.max_memory_allocated()
        self._counters.reset_peak_memory_stats()
        self._fold(height)
        if self._stage == "optimizer":
            self._held.pop("gradients", None)

    def _fold(self, height: int) -> None:
        stage = self._stage
        held = {name: size for name, size in self._held.items() if name != "gradients" or stage == "optimizer"}
        if stage and height > self._heights.get(stage, -1):
            rest = "logits" if stage == "loss" else "activations"
            self._heights[stage] = height
            on_card = sum(size for name, size in held.items() if name != PAGED)
            self._parts[stage] = {**held, rest: max(0, height - on_card)}


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure_card(worker: Worker, recipe: Recipe, device: torch.device) -> Mapping[str, Any]:
    """Train three steps and evaluate one batch, all on the longest rows, and return what the card held.

    Args:
        worker: Of the measurement.
        recipe: The recipe to measure.
        device: The card, with its number; it must be torch's current one.

    Raises:
        BadInput: The model cannot be loaded.
        JobFailed: The recipe does not fit the model.
    """
    before = place_of(recipe.device.device).card
    used_before = (before.used_bytes if before else None) or 0
    if note := limit_memory(recipe.device.budget_gib, device):
        worker.emit(Warned, topic="memory", message=note)
    peaks, parameters, shown = train_longest(worker, recipe, device, torch.cuda)
    reserved = torch.cuda.max_memory_reserved(device)
    properties = torch.cuda.get_device_properties(device)
    return {
        "source": "cuda",
        "peaks": peaks,
        "trainable_parameters": parameters,
        "reserved_bytes": reserved,
        "device_bytes": max(reserved, shown - used_before) if shown else None,
        "card": {
            "name": properties.name,
            "total_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            **card_used(device),
        },
    }


def train_longest(worker: Worker, recipe: Recipe, device: torch.device, counters: Counters) -> tuple[Peaks, int, int]:
    """Train three steps on the longest rows.

    Returns:
        Bytes by stage and component, the number of trained parameters, and the most bytes that the device showed for
        all its processes, 0 where it shows none.
    """
    meter = CardMeter(counters)
    shown = 0

    def emit(kind: type[RunEvent], **fields: Any) -> None:
        nonlocal shown
        if kind is MemorySeen:
            # The loop's own memory watch has read this peak and reset the counters.
            meter.seen(fields.get("peak_bytes") or 0)
            shown = max(shown, fields.get("device_bytes") or 0)
        worker.emit(kind, **fields)

    precision = choose_precision(recipe.model.dtype, device)
    torch.manual_seed(recipe.train.seed)
    meter.stage("load")
    base = find_base(recipe.model.base, recipe.model.revision)
    refuse_untrainable(base, recipe.method)
    tell = PhaseTeller(worker.emit)
    model, _, _ = trainable_model(recipe, base, device, precision, worker=worker, tell=tell, checkpoint=None)
    streamed = stream_base(recipe, model, device, worker=worker, tell=tell)
    trained = [p for p in model.parameters() if p.requires_grad]
    known = {id(p) for p in trained}
    frozen = (t for t in frozen_tensors(model) if id(t) not in known and not isinstance(t, Absent))
    meter.claim([*frozen, *(streamed.buffers if streamed else ())], "base")
    meter.claim(trained, "adapter")
    step_model = StepModel(model, recipe.train.loss, precision.autocast, objective_of(recipe))
    vocabulary = cast(Any, step_model.causal).get_input_embeddings().weight.shape[0]
    batcher = Batcher(recipe.train.micro_batch, 0, device, objective=step_model.objective)
    step_model.prove(batcher.batch([batcher.objective.longest(_PROVEN_TOKENS, vocabulary)]))
    optimizer = optimizer_of(recipe, model, device, warn=lambda message: None)
    run_steps(
        step_model,
        recipe,
        meter,
        optimizer=optimizer,
        scaler=precision.scaler(),
        batcher=batcher,
        steps=_STEPS,
        emit=emit,
    )
    return meter.peaks(), sum(p.numel() for p in trained), shown
