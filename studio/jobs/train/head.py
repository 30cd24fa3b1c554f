"""A causal language model taken apart into backbone and head, and proof that the two give the model's own loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from studio.core.recipe import Loss
from studio.jobs.base.head_form import HeadForm, head_form_of
from studio.jobs.train.liger import liger_loss_sum, takes
from studio.jobs.train.loss import chunked_loss_sum, shifted

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Relative difference allowed between the two losses: rounding of the logits in each dtype, not a different formula."""


@dataclass(frozen=True, slots=True)
class SplitModel:
    """Hidden states from `backbone`, logits from `head` in the family's `form`, their loss from one of two paths."""

    backbone: nn.Module
    head: nn.Module
    form: HeadForm
    path: Literal["chunked", "liger"] = "chunked"

    def loss_sum(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Return the summed loss of a batch: labels `[batch, seq]`, not yet shifted, and what the backbone takes."""
        hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        loss_sum = liger_loss_sum if self.path == "liger" else chunked_loss_sum
        return loss_sum(hidden, self.head, shifted(labels), self.form)

    def row_losses(self, rows: "Rows", labels: Tensor, **inputs: Any) -> Tensor:
        """Return the summed loss of each row of a batch `[rows]`, fp32; arguments as for `loss_sum`."""
        hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        loss_sum = liger_loss_sum if self.path == "liger" else chunked_loss_sum
        wanted = shifted(labels)
        return torch.stack([loss_sum(hidden[row], self.head, wanted[row], self.form).float() for row in rows])


Rows = Sequence[tuple[slice, slice]]
"""Where the rows of a batch stand in a tensor `[batch, seq]`."""


def rows_of(labels: Tensor, row_lengths: Tensor | None = None) -> Rows:
    """Return where the rows of a batch stand: below each other, or packed one behind the other.

    Args:
        labels: `[batch, seq]`.
        row_lengths: Of packed rows, `[rows]`; None for rows of their own.
    """
    if row_lengths is None:
        return [(slice(row, row + 1), slice(None)) for row in range(labels.shape[0])]
    ends = row_lengths.cumsum(0).tolist()
    return [(slice(0, 1), slice(end - length, end)) for end, length in zip(ends, row_lengths.tolist(), strict=True)]


def full_row_losses(causal: nn.Module, rows: Rows, labels: Tensor, **inputs: Any) -> Tensor:
    """Return the summed loss of each row `[rows]` through the model's own forward and whole logits."""
    logits, wanted = causal(**inputs, use_cache=False).logits.float(), shifted(labels)
    one_by_one = ((logits[row].flatten(0, 1), wanted[row].flatten()) for row in rows)
    return torch.stack([nn.functional.cross_entropy(*row, reduction="sum") for row in one_by_one])


def full_loss_sum(causal: nn.Module, labels: Tensor, **inputs: Any) -> Tensor:
    """Return the summed loss through the model's own forward and whole logits; labels `[batch, seq]`."""
    logits = causal(**inputs, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), shifted(labels).flatten(), reduction="sum")


def split(causal: nn.Module, loss: Loss) -> SplitModel | None:
    """Return backbone and head of a causal model, or None where it does not have these two parts.

    Args:
        causal: The model, adapters included.
        loss: What is wanted; `liger` becomes `chunked` for heads that liger's loss is not made for.
    """
    backbone = getattr(causal, "base_model", None)
    head = cast(Any, causal).get_output_embeddings()
    if not isinstance(backbone, nn.Module) or backbone is causal or not isinstance(head, nn.Module):
        return None
    form = head_form_of(cast(Any, causal).config)
    return SplitModel(backbone, head, form, "liger" if loss == "liger" and takes(head, form) else "chunked")


def agrees(parts: SplitModel, causal: nn.Module, batch: dict[str, Tensor], autocast: Callable[[], Any]) -> bool:
    """Return whether the split gives the model's own loss on a batch: seen, not assumed from the family's name."""
    was_training = causal.training
    causal.eval()
    try:
        with torch.no_grad(), autocast():
            ours, theirs = float(parts.loss_sum(**batch)), float(full_loss_sum(causal, **batch))
    finally:
        causal.train(was_training)
    dtype = next(parts.head.parameters()).dtype
    return abs(ours - theirs) <= TOLERANCE.get(dtype, 1e-4) * max(abs(theirs), 1e-6)
