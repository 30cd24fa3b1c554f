"""Held-out loss and held-out answers, through the same loss path and micro-batch as training."""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from studio.core.intervals import Interval, ratio_interval
from studio.jobs.base.data.rows import Example, Prompt
from studio.jobs.base.generation import greedy, stop_ids
from studio.jobs.train.batches import Batcher, loss_tokens
from studio.jobs.train.step_model import StepModel
from studio.runs.held_out import RowLosses


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Put the model in evaluation mode without gradients, and back as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def held_out_losses(
    step_model: StepModel,
    examples: Sequence[Example],
    *,
    batcher: Batcher,
    progress: Callable[[float], None],
) -> RowLosses:
    """Return the loss of each held-out row, in the order of the rows.

    Args:
        step_model: Called with a batch.
        examples: Held-out rows.
        batcher: Training's, so that evaluation never needs more memory than training.
        progress: Told the fraction done.
    """
    sums, done = [math.nan] * len(examples), 0
    places = {id(example): place for place, example in enumerate(examples)}
    with evaluating(step_model):
        for rows in batcher.groups(examples):
            losses = step_model.row_losses(batcher.batch(rows)).tolist()
            for example, loss in zip(rows, losses, strict=True):
                sums[places[id(example)]] = loss
            done += len(rows)
            progress(done / len(examples))
    return RowLosses(tuple(sums), tuple(loss_tokens([example]) for example in examples))


def gain_since(before: RowLosses | None, after: RowLosses) -> Interval | None:
    """Return the loss per token after training above that before it, paired row by row; None where it is not known."""
    if before is None or before.tokens != after.tokens or not all(map(math.isfinite, (*before.sums, *after.sums))):
        return None
    return ratio_interval([late - early for late, early in zip(after.sums, before.sums, strict=True)], after.tokens)


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    new_tokens: int,
    autocast: Callable[[], Any],
    cancelled: Callable[[], bool],
) -> str:
    """Return the model's greedy continuation of one prompt as text, special tokens left out.

    Args:
        model: A causal model with `generate`.
        tokenizer: Its tokenizer.
        prompt: Token ids up to where the answer starts.
        new_tokens: Most tokens to generate.
        autocast: Maker of the arithmetic's context.
        cancelled: Asked after every token; true ends the answer there.
    """
    stops = stop_ids(tokenizer, getattr(model, "generation_config", None))
    with evaluating(model), autocast():
        made = greedy(model, prompt.input_ids, stops=stops, new_tokens=new_tokens, cancelled=cancelled)
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()
