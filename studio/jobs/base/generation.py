"""Greedy generation: a model's answer up to a token that ends it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria


class Watch(StoppingCriteria):
    """Ends an answer after any token when it is no longer wanted."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        """Ask `cancelled` after every token."""
        self._cancelled = cancelled

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        """Return for each sequence whether it ends, `[batch]`; transformers calls this after every token."""
        return torch.full((input_ids.shape[0],), self._cancelled(), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def greedy(
    model: Any, ids: Sequence[int], *, stops: Sequence[int], new_tokens: int, cancelled: Callable[[], bool]
) -> list[int]:
    """Return the token ids of a model's greedy answer, each the most likely next one; a stop token may be the last.

    The model's own generation config is ignored: many of them punish repetition, forbid tokens or search with beams,
    and the answer would not be the greedy one.

    Args:
        model: A causal model with `generate`, in evaluation mode.
        ids: Token ids of the prompt, one or more.
        stops: Tokens that end an answer.
        new_tokens: Most tokens of the answer.
        cancelled: Asked after every token; True ends the answer there.
    """
    prompt = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with _without_own_settings(model):
        made: Tensor = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(stops) or None,
            pad_token_id=stops[0] if stops else 0,
            stopping_criteria=[Watch(cancelled)],
        )
    return [int(token) for token in made[0, len(ids) :]]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Replace a model's generation config by an empty one: `generate` reads from it what its caller does not set."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = causal.generation_config
    causal.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        causal.generation_config = own
