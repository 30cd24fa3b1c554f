"""The training loop: every optimizer step, from its rows to its event.

It knows nothing of data formats, of model families or of where checkpoints lie.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from studio.core.events import PAIR_FIGURES, StepDone, Warned
from studio.core.recipe import TrainSection
from studio.core.schedule import learning_rate_at
from studio.jobs.train.batches import StepBatches
from studio.jobs.train.checkpoint import TrainState
from studio.jobs.train.guards import MovementGuard, check_gradient, check_labels, check_loss
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.objectives import FIGURES, Encoded
from studio.jobs.train.optimizer import set_learning_rate


@dataclass(frozen=True, slots=True)
class LoopParts:
    """What the loop works with.

    Attributes:
        step_model: Returns the summed loss of a batch.
        optimizer: Of the trainable parameters.
        scaler: The fp16 loss scaler; does nothing for other formats.
        batches: The rows of every step, and what a step's summed loss is divided by.
        device: Where the model is.
        memory: Reads the memory.
        emit: Gets the events.
        backward: Goes backward from a scaled loss.
        steadier: Advice that names a number format of wider range; empty where there is none.
    """

    step_model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: StepBatches
    device: torch.device
    memory: MemoryWatch
    emit: Callable[..., None]
    backward: Callable[[torch.Tensor], None] = field(default=lambda loss: loss.backward())
    steadier: str = ""


def train(
    parts: LoopParts, section: TrainSection, total_steps: int, state: TrainState, between: Callable[[TrainState], bool]
) -> TrainState:
    """Take the steps after `state.step` up to `total_steps`, and return where the training stands afterwards.

    Args:
        parts: What the loop works with.
        section: Learning rate, schedule and clipping.
        total_steps: The last step.
        state: Where the training stands now.
        between: Called after every step: evaluates, saves or waits, and returns True to end the training early.

    Raises:
        JobFailed: A guard fired (see `guards`): going on would be useless.
    """
    trainable = [p for p in parts.step_model.parameters() if p.requires_grad]
    movement = MovementGuard(
        parts.step_model, warn=lambda message: parts.emit(Warned, topic="adapter", message=message)
    )
    first, skipped = state.step + 1, 0
    parts.step_model.train()
    for step in range(first, total_steps + 1):
        began = time.perf_counter()
        micro_batches = parts.batches.of_step(step)
        labelled = sum(map(parts.batches.denominator, micro_batches))
        check_labels(labelled, step)
        rate = learning_rate_at(
            step,
            total_steps=total_steps,
            peak=section.learning_rate,
            schedule=section.schedule,
            warmup_fraction=section.warmup_fraction,
        )
        set_learning_rate(parts.optimizer, rate)

        loss = torch.zeros((), device=parts.device)
        of_pairs = list[torch.Tensor]()
        for rows in micro_batches:
            # Divided by the labels of the whole step, not of the micro-batch: the parts then add up to one mean over
            # the step, however its rows are cut into micro-batches.
            part = _loss_of(parts, rows, of_pairs) / labelled
            parts.backward(parts.scaler.scale(part))
            loss += part.detach()
        # Unscaled before clipping: the limit is meant for true gradients.
        parts.scaler.unscale_(parts.optimizer)
        # Without a limit nothing is clipped, but the norm is still wanted.
        limit = section.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
        # Both are read at once: a card is waited for one time a step.
        loss_value, grad_norm = map(float, torch.stack([loss, norm.to(loss.dtype)]).cpu())
        check_loss(loss_value, step, parts.steadier)
        skipped = 0 if math.isfinite(grad_norm) else skipped + 1
        check_gradient(grad_norm, step, skipped, scaled=parts.scaler.is_enabled(), steadier=parts.steadier)
        if step == first:
            # A new optimizer makes its state in its first step: only here is the backward pass seen without it.
            parts.memory.see("backward", step)
        if not skipped:  # the scaler skips a step with a gradient that is not finite: the adapter cannot move in it
            movement.see_gradients()
        parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - began
        seen = sum(len(example.input_ids) for rows in micro_batches for example in rows)
        parts.emit(
            StepDone,
            step=step,
            loss=loss_value,
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens=seen,
            seconds=seconds,
            loss_tokens=labelled,
            **mean_figures(of_pairs),
        )
        if not skipped:
            movement.after_step(step)
        parts.memory.see("step", step)
        state = replace(
            state,
            step=step,
            tokens=state.tokens + seen,
            seconds=state.seconds + seconds,
            scaler=dict(parts.scaler.state_dict()),
        )
        if between(state):
            break
    return state


def _loss_of(parts: LoopParts, rows: Sequence[Encoded], figures: list[torch.Tensor]) -> torch.Tensor:
    """Return the summed loss of a micro-batch, whose tensors are let go; pairs add their figures to the list."""
    batch = parts.batches.batch(rows)
    loss: torch.Tensor = parts.step_model(batch)
    if FIGURES in batch:
        figures.append(batch[FIGURES])
    return loss


def mean_figures(of_batches: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the means of the figures of pairs by name; nothing where there are none.

    Args:
        of_batches: `[pairs, figures]` of each micro-batch.
    """
    if not of_batches:
        return {}
    return dict(zip(PAIR_FIGURES, torch.cat(list(of_batches)).double().mean(0).tolist(), strict=True))
