"""Traces training without weights and without a card: the training job's code on fake tensors, every storage counted.

The model is built from its config, adapted, and trained for two steps by `studio.jobs.train`'s loop. Sizes are exact
for what operators allocate; `studio.jobs.measure.card` says what it imitates of a card and what it does not know.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel

from studio.core.recipe import Recipe
from studio.core.vram.setup import ITEMSIZES
from studio.jobs.base.precision import Precision
from studio.jobs.base.streaming.base import stream
from studio.jobs.base.streaming.layers import ordinary_bytes
from studio.jobs.measure.card import TracedCopies, card_habits
from studio.jobs.measure.fake import Numbers, fake_world
from studio.jobs.measure.step import run_steps
from studio.jobs.measure.storages import HOST, StorageLog, Storages
from studio.jobs.measure.weightless import config_of, weightless_base
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.batches import Batcher
from studio.jobs.train.objectives import Batch, Encoded, Objective
from studio.jobs.train.objectives.of_recipe import objective_of
from studio.jobs.train.objectives.supervised import SUPERVISED
from studio.jobs.train.offload import offload_checkpoints
from studio.jobs.train.optimizer import optimizer_of
from studio.jobs.train.step_model import StepModel
from studio.jobs.train.trainable_model import streamed_of

_CUDA_BLOCK_BYTES = 512
"""The caching allocator rounds every request up to this (c10/cuda/CUDACachingAllocator.cpp kMinBlockSize)."""

_STEPS = 2
"""The optimizer makes its state in the first step, so the second is the first that has it from the beginning."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a step is traced for.

    Attributes:
        device_type: `cuda` or `cpu`.
        dtype: bf16, fp16 or fp32.
        capability: The card's compute capability.
    """

    device_type: str
    dtype: str
    capability: tuple[int, int] = (8, 0)


@dataclass(frozen=True, slots=True)
class Traced:
    """What a recipe's training allocates and frees, in order, and how many parameters it trains."""

    log: StorageLog
    trainable_parameters: int


def trace(
    recipe: Recipe, values: dict[str, Any], target: Target, *, on_stage: Callable[[], None] = lambda: None
) -> Traced:
    """Trace a recipe's training.

    Args:
        recipe: The recipe of the training.
        values: The base model's config.json.
        target: The device and the number format.
        on_stage: Called when a stage begins; what it raises ends the trace.

    Raises:
        BadInput: The model cannot be built.
        JobFailed: The recipe does not fit the model, or what it allocates depends on the weights' values.
    """
    config = config_of(values)
    storages = Storages(block_bytes=_CUDA_BLOCK_BYTES if target.device_type == "cuda" else 1, on_stage=on_stage)
    with fake_world() as numbers, torch.random.fork_rng(devices=[]):
        parameters = run_engine(config, recipe, target, storages, numbers, objective=objective_of(recipe))
    return Traced(storages.log, parameters)


def _stream(model: PeftModel, count: int, storages: Storages) -> None:
    def new(component: str) -> Callable[[int], torch.Tensor]:
        def made(size: int) -> torch.Tensor:
            with storages.newborn(component):
                return ordinary_bytes(size)

        return made

    stream(model, count, torch.device("cpu"), new_host=new(HOST), new_buffer=new("base"))


@dataclass(frozen=True, slots=True)
class _FakeBatcher(Batcher):
    """Makes batches of fake tensors whose whole numbers are known."""

    numbers: Numbers = field(kw_only=True)

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Return the rows of one micro-batch as fake tensors."""
        return self.numbers.batch(lambda: Batcher.batch(self, rows))


def run_engine(
    config: Any,
    recipe: Recipe,
    target: Target,
    storages: Storages,
    numbers: Numbers | None = None,
    *,
    objective: Objective = SUPERVISED,
) -> int:
    """Build the model, adapt it, train it for two steps and evaluate one batch, while storages are logged.

    Args:
        config: transformers' config of the base.
        recipe: The recipe of the training.
        target: The device and the number format.
        storages: Logs what is allocated and freed.
        numbers: Makes fake batches; None runs with real tensors on this CPU, with random weights.
        objective: What is learnt.

    Returns:
        The number of trained parameters.
    """
    assert target.dtype in ITEMSIZES, target.dtype  # noqa: S101  never "auto": who asks knows the device
    precision = Precision(target.dtype, "cpu")
    storages.stage("load")
    base = weightless_base(config, recipe, precision.dtype, target.device_type, storages)
    with ExitStack() as stack:
        stack.enter_context(storages)
        if target.device_type == "cuda":
            stack.enter_context(card_habits(storages, target.capability))
        with storages.newborn("adapter"):
            keeps = recipe.train.keep_dequantised is True
            model = attach_adapter(base, recipe.adapter, recompute=recipe.train.recompute, keep_dequantised=keeps)
            if recipe.train.offload_checkpoints and target.device_type == "cuda":
                offload_checkpoints(model, TracedCopies(storages))
        trained = [p for p in model.parameters() if p.requires_grad]
        storages.claim(trained, "adapter")
        if streamed_of(recipe):
            _stream(model, streamed_of(recipe), storages)
        optimizer = optimizer_of(recipe, model, torch.device(target.device_type), warn=lambda message: None)
        way = (recipe.train.micro_batch, 0, torch.device("cpu"), 0, objective)
        run_steps(
            StepModel(model, recipe.train.loss, precision.autocast, objective),
            recipe,
            storages,
            optimizer=optimizer,
            scaler=precision.scaler(),
            batcher=_FakeBatcher(*way, numbers=numbers) if numbers else Batcher(*way),
            steps=_STEPS,
            emit=lambda *args, **fields: None,
        )
    return sum(p.numel() for p in trained)
