"""Liger's fused linear cross-entropy (Hsu et al. 2024), where it is installed and the device can run it.

It makes loss and hidden-state gradient in one pass, as `loss` does, with kernels that overwrite the 16-bit logits of a
chunk by their gradient. It takes a frozen plain head without a factor on its logits; `StepModel` has others go through
`loss`. What it returns is proven like every loss here, by `head.agrees`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from studio.core.errors import BadInput
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.head_form import HeadForm


def require_liger(device: torch.device) -> None:
    """Refuse a recipe that asks for liger where it cannot run.

    Raises:
        BadInput: Says why, and what to use instead.
    """
    if device.type != "cuda":
        why = f"its kernels run on CUDA cards, and this run is on {device.type}"
    elif find_spec("liger_kernel") is None or find_spec("triton") is None:
        why = "the package liger-kernel is not installed (pip install liger-kernel)"
    else:
        return
    raise BadInput(f"train.loss is liger: {why}. chunked needs nothing and never builds the whole logits either.")


def takes(head: nn.Module, form: HeadForm) -> bool:
    """Return whether liger's loss is this head's: plain, frozen, logits not multiplied."""
    return type(head) is nn.Linear and form.scale == 1.0 and not any(p.requires_grad for p in head.parameters())


def liger_loss_sum(hidden: Tensor, head: nn.Module, labels: Tensor, form: HeadForm) -> Tensor:
    """Return the summed negative log-likelihood of the labelled tokens, fp32 scalar.

    Args:
        hidden: Final hidden states `[batch, seq, hidden]`.
        head: One that `takes` accepts; its weight is `[vocabulary, hidden]`.
        labels: Already shifted, `[batch, seq]`, `IGNORED` where nothing is to be learnt.
        form: How the head's output becomes logits.
    """
    linear = cast(nn.Linear, head)
    wanted = labels != IGNORED
    # Masked tokens stay out of the head, as in `loss`.
    rows, targets = hidden[wanted], labels[wanted]
    if rows.shape[0] == 0:
        return hidden.sum() * 0.0
    kernels: Any = import_module("liger_kernel.transformers")  # optional, and needs triton
    fused = kernels.LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=form.softcap)
    loss: Tensor = fused(linear.weight, rows.to(linear.weight.dtype), targets, linear.bias)
    return loss.float()
