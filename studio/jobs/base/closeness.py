"""How close the answers of two models are: logits of both on the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

FEWEST_TOKENS, MOST_TOKENS = 48, 384
"""That are compared, however large or small a model is."""
CANNOT_RUN = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError)
"""What a model raises that cannot be run a layer at a time."""


@dataclass(frozen=True, slots=True)
class Closeness:
    """One model against another on the same tokens: KL in nats, share of equal top tokens, logit gap."""

    tokens: int
    mean_kl: float
    largest_kl: float
    same_top_token: float
    largest_logit_difference: float


def rows_of(texts: Sequence[str], tokenizer: Any, tokens: float) -> list[list[int]]:
    """Return the ids of the beginnings of some texts, about so many tokens together."""
    each = max(8, int(tokens) // len(texts))
    return [tokenizer(text, add_special_tokens=False).input_ids[:each] or [0] for text in texts]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[batch, seq]`; the mask is 0 for padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row] + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def compare(made: Tensor, meant: Tensor) -> Closeness:
    """Return how close logits `[tokens, vocabulary]` are to those that are meant.

    Tokens that only one of the two has, as padding of its vocabulary, are left out.
    """
    width = min(made.shape[1], meant.shape[1])
    made, meant = made[:, :width], meant[:, :width]
    pairs = list(zip(made, meant, strict=True))  # a token at a time: a vocabulary can be large
    kl = torch.stack(
        [
            kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), log_target=True, reduction="sum")
            for ours, theirs in pairs
        ]
    )
    gaps = torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs])
    return Closeness(
        tokens=made.shape[0],
        mean_kl=max(0.0, float(kl.mean())),
        largest_kl=max(0.0, float(kl.max())),
        same_top_token=float((made.argmax(-1) == meant.argmax(-1)).float().mean()),
        largest_logit_difference=float(gaps.max()),
    )
