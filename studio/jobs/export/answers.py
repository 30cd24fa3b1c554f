"""Whether an exported model still answers as the merged one: logits of both on the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from studio.core.errors import JobFailed
from studio.jobs.base.weights.streamed import folder_logits
from studio.jobs.export.work import Work

TEXTS = (
    "The quick brown fox jumps over the lazy dog. A quantised model should answer as the merged one does.",
    "def add(a, b):\n    return a + b\n\n\nassert add(2, 3) == 5\n",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
)
_WORK = 2e11
"""Parameters times tokens of one pass: a few seconds on two cores."""
_FEWEST_TOKENS, _MOST_TOKENS = 48, 384
_CANNOT_RUN = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True, slots=True)
class Loss:
    """The exported model against the merged one: KL in nats per token, share of equal top tokens."""

    tokens: int
    mean_kl: float
    same_top_token: float


def rows_of(texts: Sequence[str], tokenizer: Any, parameters: float) -> list[list[int]]:
    """Return ids of some texts, as many tokens as a model of this size can do in seconds."""
    budget = int(min(_MOST_TOKENS, max(_FEWEST_TOKENS, _WORK / max(1.0, parameters))))
    each = max(8, budget // len(texts))
    return [tokenizer(text, add_special_tokens=False).input_ids[:each] or [0] for text in texts]


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[batch, seq]`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row] + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def merged_answers(work: Work, merged: Path, rows: Sequence[Sequence[int]]) -> Tensor | None:
    """Return the merged model's fp32 logits `[tokens, vocabulary]`, one decoder layer in memory at a time.

    Returns:
        None, said aloud, where this model cannot be run so.
    """
    work.say("checking", detail="answers of the merged model")
    ids, mask = padded(rows)
    try:
        return folder_logits(merged, ids, mask)[mask.bool()]
    except _CANNOT_RUN as error:
        work.warn(f"the answers could not be compared: this model cannot be run layer by layer ({error})")
        return None


def compare(exported: Tensor, merged: Tensor) -> Loss:
    """Return what the export cost, from logits `[tokens, vocabulary]`; tokens that only one of them pads are left out.

    Raises:
        JobFailed: A logit of the exported model is not finite.
    """
    width = min(exported.shape[1], merged.shape[1])
    exported, merged = exported[:, :width], merged[:, :width]
    if not bool(torch.isfinite(exported).all()):
        raise JobFailed("exported_nonfinite", "the exported model's logits hold NaN or infinity", "use another format")
    kl = kl_div(log_softmax(exported, -1), log_softmax(merged, -1), log_target=True, reduction="none").sum(-1)
    same = (exported.argmax(-1) == merged.argmax(-1)).float().mean()
    return Loss(tokens=merged.shape[0], mean_kl=max(0.0, float(kl.mean())), same_top_token=float(same))
