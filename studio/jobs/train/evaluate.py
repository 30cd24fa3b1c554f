"""Held-out loss and held-out answers, through the same loss path and micro-batch as training."""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from studio.jobs.base.data.rows import Example, Prompt
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


def answer(model: nn.Module, tokenizer: Any, prompt: Prompt, *, new_tokens: int, autocast: Callable[[], Any]) -> str:
    """Return the model's greedy continuation of one prompt as text, special tokens left out.

    Args:
        model: A causal model with `generate`.
        tokenizer: Its tokenizer.
        prompt: Token ids up to where the answer starts.
        new_tokens: Most tokens to generate.
        autocast: Maker of the arithmetic's context.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([prompt.input_ids], device=device)
    stops = sorted({*_as_list(getattr(model, "generation_config", None)), *_one(tokenizer.eos_token_id)})
    with evaluating(model), autocast():
        made: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stops or None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0],
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _as_list(config: Any) -> list[int]:
    stop = getattr(config, "eos_token_id", None)
    return list(stop) if isinstance(stop, (list, tuple)) else _one(stop)


def _one(stop: int | None) -> list[int]:
    return [] if stop is None else [int(stop)]
