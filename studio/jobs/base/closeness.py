"""How close two models are: compares their logits on the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

FEWEST_TOKENS, MOST_TOKENS = 48, 384
"""Fewest and most tokens that are compared; how many in between depends on the model's size."""
CANNOT_RUN = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError)
"""The exceptions of a model that cannot be run one layer at a time."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """One model compared with another on the same tokens.

    Attributes:
        tokens: How many were compared.
        mean_kl: Mean Kullback-Leibler divergence per token, in nats.
        largest_kl: The largest of one token, in nats.
        same_top_token: Share of tokens, 0 to 1, after which both find the same next token most likely.
        largest_logit_difference: Largest absolute difference of two logits.
    """

    tokens: int
    mean_kl: float
    largest_kl: float
    same_top_token: float
    largest_logit_difference: float


def rows_of(texts: Sequence[str], tokenizer: Any, tokens: float) -> list[list[int]]:
    """Return the token ids of the beginnings of texts, about `tokens` of them in all, at least 8 of each text."""
    each = max(8, int(tokens) // len(texts))
    return [tokenizer(text, add_special_tokens=False).input_ids[:each] or [0] for text in texts]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[batch, seq]`; the mask is 0 for padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row] + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def compare(made: Tensor, meant: Tensor) -> Closeness:
    """Return how close logits are to the logits that they should be.

    Some models pad their vocabulary: the columns that only one of the two has are left out.

    Args:
        made: `[tokens, vocabulary]`, of the model that is examined.
        meant: `[tokens, vocabulary]`, of the reference.
    """
    width = min(made.shape[1], meant.shape[1])
    made, meant = made[:, :width], meant[:, :width]
    # One token at a time: a vocabulary can be large, and the softmax of all tokens would be copies of all logits.
    pairs = list(zip(made, meant, strict=True))
    kl = torch.stack(
        [
            kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), log_target=True, reduction="sum")
            for ours, theirs in pairs
        ]
    )
    gaps = torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs])
    return Closeness(
        tokens=made.shape[0],
        mean_kl=max(0.0, float(kl.mean())),  # rounding can make the KL of equal models slightly negative
        largest_kl=max(0.0, float(kl.max())),
        same_top_token=float((made.argmax(-1) == meant.argmax(-1)).float().mean()),
        largest_logit_difference=float(gaps.max()),
    )
