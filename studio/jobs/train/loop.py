"""The training loop: every optimizer step, from its rows to its event.

It knows nothing of data formats, of model families or of where checkpoints lie.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from studio.core.errors import StudioError
from studio.core.events import PAIR_FIGURES, StepDone, Warned
from studio.core.recipe import TrainSection
from studio.core.schedule import Extension, extended_rate_at
from studio.jobs.train.batches import StepBatches
from studio.jobs.train.checkpoint import TrainState, random_state, restore_random
from studio.jobs.train.guards import MovementGuard, check_gradient, check_labels, check_loss
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.objectives import FIGURES, Encoded
from studio.jobs.train.optimizer import set_learning_rate
from studio.jobs.train.shrink import LoadAgain, Shrinking


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
        rescue: Saves the last whole step before an error ends the training.
        shrinking: Repeats a step in a smaller form where its memory was refused; None lets it fail.
        extensions: Steps that the run was given beyond its plan.
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
    rescue: Callable[[TrainState], object] = field(default=lambda state: None)
    shrinking: Shrinking | None = None
    extensions: tuple[Extension, ...] = ()


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
    movement = MovementGuard(
        parts.step_model, warn=lambda message: parts.emit(Warned, topic="adapter", message=message)
    )
    first, skipped = state.step + 1, 0
    shrinking = parts.shrinking if parts.shrinking is not None and parts.shrinking.on else None
    undo = Undo(parts, copies=shrinking is not None)
    parts.step_model.train()
    for step in range(first, total_steps + 1):
        began = time.perf_counter()
        rate = extended_rate_at(
            step,
            planned_steps=parts.extensions[0].after if parts.extensions else total_steps,
            extensions=parts.extensions,
            peak=section.learning_rate,
            schedule=section.schedule,
            warmup_fraction=section.warmup_fraction,
        )
        set_learning_rate(parts.optimizer, rate)
        # A new optimizer makes its state in its first step: only there is the backward pass seen without it.
        work = partial(_take, parts, section, step, movement, skipped=skipped, undo=undo, first=step == first)
        undo.mark()
        try:
            taken = work() if shrinking is None else shrinking.attempt(work, shrinking.steps, undo)
        except Exception as error:
            if not isinstance(error, (StudioError, LoadAgain)) and undo.whole:
                undo()
                parts.rescue(state)
            raise
        skipped = taken.skipped
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - began
        parts.emit(
            StepDone,
            step=step,
            loss=taken.loss,
            learning_rate=rate,
            grad_norm=taken.grad_norm,
            tokens=taken.tokens,
            seconds=seconds,
            loss_tokens=taken.labelled,
            **taken.figures,
        )
        if not skipped:
            movement.after_step(step)
        parts.memory.see("step", step)
        state = replace(
            state,
            step=step,
            tokens=state.tokens + taken.tokens,
            seconds=state.seconds + seconds,
            scaler=dict(parts.scaler.state_dict()),
        )
        if shrinking is not None:
            shrinking.state = state
        try:
            if between(state):
                break
        except Exception as error:
            if not isinstance(error, (StudioError, LoadAgain)):
                parts.rescue(state)
            raise
    return state


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a step showed.

    Attributes:
        loss: Its mean loss.
        grad_norm: Before clipping.
        tokens: Real tokens.
        labelled: What its loss was divided by.
        figures: Of pairs.
        skipped: How many steps in a row had no finite gradient, this one included.
    """

    loss: float
    grad_norm: float
    tokens: int
    labelled: int
    figures: dict[str, float]
    skipped: int


def _take(
    parts: LoopParts,
    section: TrainSection,
    step: int,
    movement: MovementGuard,
    *,
    skipped: int,
    undo: "Undo",
    first: bool,
) -> _Taken:
    """Take a step: forward and backward of all its rows, and the optimizer."""
    micro_batches = parts.batches.of_step(step)
    labelled = sum(map(parts.batches.denominator, micro_batches))
    check_labels(labelled, step)
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
    norm = torch.nn.utils.clip_grad_norm_(undo.trained, limit)
    # Both are read at once: a card is waited for one time a step.
    loss_value, grad_norm = map(float, torch.stack([loss, norm.to(loss.dtype)]).cpu())
    check_loss(loss_value, step, parts.steadier)
    skipped = 0 if math.isfinite(grad_norm) else skipped + 1
    check_gradient(grad_norm, step, skipped, scaled=parts.scaler.is_enabled(), steadier=parts.steadier)
    if first:
        parts.memory.see("backward", step)
    if not skipped:  # the scaler skips a step with a gradient that is not finite: the adapter cannot move in it
        movement.see_gradients()
    figures = mean_figures(of_pairs)
    tokens = sum(len(example.input_ids) for rows in micro_batches for example in rows)
    undo.keep()
    parts.scaler.step(parts.optimizer)
    undo.drop()
    return _Taken(loss_value, grad_norm, tokens, labelled, figures, skipped)


class Undo:
    """Takes back a step that was begun: gradients, weights, optimizer, scaler and random state.

    An optimizer that is refused memory may have changed some weights. So they and its state are copied before it begins
    and dropped after it. On a card only the first step is copied: there the state is allocated, and all later steps
    write in place.

    Attributes:
        trained: The parameters that learn.
        whole: Whether weights and optimizer are those of a whole step, or can be put back to it.
    """

    def __init__(self, parts: LoopParts, *, copies: bool) -> None:
        """Prepare to take back steps of these parts; `copies` says whether what the optimizer changes is copied."""
        self.whole, self._copies = True, copies
        self.trained = [parameter for parameter in parts.step_model.parameters() if parameter.requires_grad]
        self._optimizer: Any = parts.optimizer
        self._scaler = parts.scaler
        self._weights: list[torch.Tensor] = []
        self._state: dict[Any, dict[str, Any]] = {}
        self._random = random_state()

    def mark(self) -> None:
        """Note the random state with which the step begins."""
        self._random = random_state()

    def keep(self) -> None:
        """Copy what the optimizer will change.

        Raises:
            Exception: Memory is refused; nothing was changed.
        """
        if not self._copies or (self._optimizer.state and self.trained[0].device.type == "cuda"):
            self.whole = False
            return
        self._state = {
            parameter: {name: _copied(value) for name, value in entries.items()}
            for parameter, entries in self._optimizer.state.items()
        }
        self._weights = [parameter.detach().to("cpu", copy=True) for parameter in self.trained]

    def drop(self) -> None:
        """Let go of the copies, as the optimizer is done."""
        self.whole = True
        self._weights, self._state = [], {}

    @torch.no_grad()
    def __call__(self) -> None:
        """Take back what has been done since `mark`."""
        if self._weights:
            for parameter, weight in zip(self.trained, self._weights, strict=True):
                parameter.copy_(weight)
            for parameter in list(self._optimizer.state):
                if parameter in self._state:
                    self._optimizer.state[parameter] = self._state[parameter]
                else:
                    del self._optimizer.state[parameter]
        self.drop()
        self._optimizer.zero_grad(set_to_none=True)
        # What `unscale_` noted, and `update` would forget, which a failed step does not reach.
        vars(self._scaler).get("_per_optimizer_states", {}).clear()
        restore_random(self._random)


def _copied(value: Any) -> Any:
    """Return a copy of an entry of an optimizer's state; bitsandbytes has tables within."""
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


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
