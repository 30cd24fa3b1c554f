"""A training step on a real card: the job's own model, optimizer and loop, and torch's own counters."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from studio.core.events import MemorySeen, RunEvent, Warned
from studio.core.recipe import Recipe
from studio.jobs.base.device import card_used
from studio.jobs.base.precision import choose_precision
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.measure.step import run_steps
from studio.jobs.measure.storages import PAGED, Peaks
from studio.jobs.measure.weightless import frozen_tensors
from studio.jobs.train.batches import Batcher
from studio.jobs.train.memory import limit_memory
from studio.jobs.train.optimizer import optimizer_of
from studio.jobs.train.step_model import StepModel
from studio.jobs.train.trainable_model import trainable_model
from studio.probe.device import place_of
from studio.probe.models import find_base, refuse_untrainable
from studio.runs.worker import Worker

_STEPS = 3
_PROVEN_TOKENS = 64


class Counters(Protocol):
    """What of `torch.cuda` is read."""

    def max_memory_allocated(self) -> int:
        """Bytes of live tensors at their highest since the last reset."""

    def reset_peak_memory_stats(self) -> None:
        """Begin anew."""


class CardMeter:
    """Reads the allocator's peak at the end of every stage, and keeps the highest of each.

    What weights, gradients and optimizer hold is known by their tensors; the rest of a peak is counted as activations,
    around the loss as logits. The allocator's peak never held what bitsandbytes pages: that is counted apart.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._stage = ""
        self._heights: dict[str, int] = {}
        self._parts: dict[str, dict[str, int]] = {}
        self._held: dict[str, int] = {}

    def stage(self, name: str) -> None:
        """Say that a stage begins: the one before is over."""
        self._close()
        self._stage = name

    def claim(self, tensors: Iterable[Any], component: str) -> None:
        """Say what tensors belong to; of the adapter's gradients all are alive at the end of the backward."""
        known = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        paged = [tensor for tensor in known if getattr(tensor, "is_paged", False)]
        size = _bytes_of(known) - _bytes_of(paged)
        self._held[component] = size + (self._held.get(component, 0) if component == "gradients" else 0)
        if paged:
            self._held[PAGED] = _bytes_of(paged)

    def seen(self, peak_bytes: int) -> None:
        """Take over a peak that somebody else read, and reset, within the stage."""
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
    """Train three steps and one held-out batch on the longest rows and return what the card held.

    Args:
        worker: Of the measurement.
        recipe: What is measured.
        device: The card, with its number; it is torch's current one.

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
            # The loop's own watch resets the counters.
            meter.seen(fields.get("peak_bytes") or 0)
            shown = max(shown, fields.get("device_bytes") or 0)
        worker.emit(kind, **fields)

    precision = choose_precision(recipe.model.dtype, device)
    torch.manual_seed(recipe.train.seed)
    meter.stage("load")
    base = find_base(recipe.model.base, recipe.model.revision)
    refuse_untrainable(base, recipe.method)
    tell = PhaseTeller(worker.emit)
    model, _ = trainable_model(recipe, base, device, precision, worker=worker, tell=tell, checkpoint=None)
    trained = [p for p in model.parameters() if p.requires_grad]
    known = {id(p) for p in trained}
    meter.claim((t for t in frozen_tensors(model) if id(t) not in known), "base")
    meter.claim(trained, "adapter")
    step_model = StepModel(model, recipe.train.loss, precision.autocast)
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
