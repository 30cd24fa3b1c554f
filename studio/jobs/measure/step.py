"""Runs the training job's own loop over full rows, on fake tensors, a CPU or a card, and tells a meter the stages."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from studio.core.recipe import Recipe
from studio.jobs.base.model_class import backbone_of
from studio.jobs.train.batches import Batcher, StepBatches
from studio.jobs.train.checkpoint import TrainState
from studio.jobs.train.loop import LoopParts, train
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.objectives.preference import needs_reference
from studio.jobs.train.step_model import StepModel, evaluating

STAGES = ("load", "forward", "loss", "backward", "optimizer", "eval")
"""The stages in their order; `loss` is head and loss, both forward and backward."""


class Meter(Protocol):
    """Measures memory by stage and component."""

    def stage(self, name: str) -> None:
        """Begin a stage."""

    def claim(self, tensors: Any, component: str) -> None:
        """Count tensors as a component's."""


def run_steps(
    step_model: StepModel,
    recipe: Recipe,
    meter: Meter,
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batcher: Batcher,
    steps: int,
    emit: Callable[..., None],
) -> None:
    """Take optimizer steps on the longest rows, then evaluate one batch, and tell the meter every stage.

    At most two micro-batches are taken per step, because more of them do not change the memory.

    Args:
        step_model: The model and its loss.
        recipe: Says batch size, length and learning rate.
        meter: Measures the memory.
        optimizer: Of the adapter.
        scaler: The fp16 loss scaler.
        batcher: Makes the batches, with the step model's objective.
        steps: Number of optimizer steps. Only from the second on is the optimizer's state there from the beginning.
        emit: Gets the events of the loop.

    Raises:
        JobFailed: A guard of the loop fired.
    """
    causal: Any = step_model.causal
    row = batcher.objective.longest(recipe.train.seq_len, causal.get_input_embeddings().weight.shape[0])
    per_step = recipe.train.micro_batch * min(2, recipe.train.accumulation)
    trainable = [p for p in step_model.parameters() if p.requires_grad]

    def backward(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        meter.stage("optimizer")

    def between(_: TrainState) -> bool:
        meter.claim(_state_of(optimizer), "optimizer")
        return False

    parts = LoopParts(
        step_model=step_model,
        optimizer=optimizer,
        scaler=scaler,
        batches=StepBatches([row] * per_step, batcher, rows_per_step=per_step, seed=recipe.train.seed),
        device=batcher.device,
        memory=MemoryWatch(emit, batcher.device),
        emit=emit,
        backward=backward,
    )
    with _staged(step_model, meter), _claimed_gradients(trainable, meter):
        train(parts, recipe.train, steps, TrainState(0, 0, 0.0, {}), between)
    meter.stage("eval")
    with evaluating(step_model):
        for group in batcher.groups([row] * recipe.train.micro_batch):
            if needs_reference(step_model.objective):
                step_model.reference(batcher.batch(group))  # before a run's first step, with the adapter switched off
            float(step_model(batcher.batch(group)))


@contextmanager
def _staged(step_model: StepModel, meter: Meter) -> Iterator[None]:
    """Tell the meter the stages: forward as the backbone begins, loss as it ends, backward as its gradient arrives."""
    backbone = backbone_of(step_model.causal) or step_model.causal

    def begins(*_: Any) -> None:
        meter.stage("forward")

    def ends(module: nn.Module, inputs: Any, output: Any) -> None:
        meter.stage("loss")
        hidden = getattr(output, "last_hidden_state", None)
        node = None if hidden is None else hidden.grad_fn
        if node is not None:
            node.register_prehook(lambda _: meter.stage("backward"))

    handles = [backbone.register_forward_pre_hook(begins), backbone.register_forward_hook(ends)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _claimed_gradients(trainable: Sequence[nn.Parameter], meter: Meter) -> Iterator[None]:
    def claim(parameter: Tensor) -> None:
        meter.claim([parameter.grad], "gradients")

    handles = [cast(Any, parameter).register_post_accumulate_grad_hook(claim) for parameter in trainable]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
