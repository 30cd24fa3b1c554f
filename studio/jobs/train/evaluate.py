"""Held-out loss and held-out answers, through the same loss path and micro-batch as training."""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from studio.jobs.base.data.rows import Example, Prompt
from studio.jobs.base.generation import greedy, stop_ids
from studio.jobs.train.batches import Batcher, loss_tokens


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Mean negative log-likelihood per labelled token, and how many tokens it rests on."""

    loss: float
    loss_tokens: int


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


def held_out_loss(
    step_model: nn.Module,
    examples: Sequence[Example],
    *,
    batcher: Batcher,
    progress: Callable[[float], None],
) -> HeldOutLoss:
    """Return the loss over all held-out rows.

    Args:
        step_model: Called with a batch, returns the summed loss.
        examples: Held-out rows.
        batcher: Training's, so that evaluation never needs more memory than training.
        progress: Told the fraction done.
    """
    total, tokens, done = 0.0, 0, 0
    with evaluating(step_model):
        for rows in batcher.groups(examples):
            total += float(step_model(batcher.batch(rows)))
            tokens += loss_tokens(rows)
            done += len(rows)
            progress(done / len(examples))
    return HeldOutLoss(total / tokens if tokens else math.nan, tokens)


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
