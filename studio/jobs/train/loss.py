"""Linear cross-entropy that never builds the whole logits.

Only tokens with a label reach the head, a chunk at a time. With a frozen head the gradient of the hidden states is
made in the same pass, so nothing but that gradient outlives a chunk. With a trained head (an adapter on it, or the
head itself) each chunk is recomputed in the backward pass, which costs time and is right for anything.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from studio.core.loss_chunk import loss_chunk_tokens
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.head_form import HeadForm


def shifted(labels: Tensor) -> Tensor:
    """Return labels moved one to the left, so that position i holds the token to predict after i: `[batch, seq]`."""
    moved = torch.full_like(labels, IGNORED)
    moved[:, :-1] = labels[:, 1:]
    return moved


def chunked_loss_sum(hidden: Tensor, head: nn.Module, labels: Tensor, form: HeadForm) -> Tensor:
    """Return the summed negative log-likelihood of the labelled tokens, fp32 scalar.

    Args:
        hidden: Final hidden states `[batch, seq, hidden]`.
        head: The output embedding; its weight is `[vocabulary, hidden]` where it is a plain linear layer.
        labels: Already shifted, `[batch, seq]`, `IGNORED` where nothing is to be learnt.
        form: How the head's output becomes logits.
    """
    wanted = labels != IGNORED
    rows, targets = hidden[wanted], labels[wanted]
    if rows.shape[0] == 0:
        return hidden.sum() * 0.0
    vocabulary = int(getattr(head, "out_features", 0)) or cast(Tensor, head.weight).shape[0]
    chunk = loss_chunk_tokens(vocabulary, rows.shape[0])
    frozen = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    if frozen:
        linear = cast(nn.Linear, head)
        return cast(Tensor, cast(Any, _FrozenHeadLoss).apply(rows, linear.weight, linear.bias, targets, form, chunk))
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, rows.shape[0], chunk):
        part, answers = rows[start : start + chunk], targets[start : start + chunk]
        total = total + cast(Tensor, checkpoint(_head_loss, part, answers, head, form, use_reentrant=False))
    return total


def _head_loss(rows: Tensor, targets: Tensor, head: nn.Module, form: HeadForm) -> Tensor:
    logits = head(rows).float() * form.scale
    if form.softcap:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """Loss and hidden-state gradient in one pass over chunks of rows `[chunk, hidden]`."""

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, form: HeadForm, chunk: int
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        wanted = ctx.needs_input_grad[0]
        grads = torch.empty_like(rows) if wanted else None
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, rows.shape[0], chunk):
                part = slice(start, start + chunk)
                loss, grad = _chunk(rows[part].to(weight.dtype), weight, bias, targets[part], form=form, wanted=wanted)
                total += loss
                if grads is not None and grad is not None:
                    grads[part] = grad
        if grads is not None:
            ctx.save_for_backward(grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return grads.mul_(grad_outputs[0].to(grads.dtype)), None, None, None, None, None


def _chunk(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, form: HeadForm, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the chunk's summed loss and, where wanted, its gradient `[chunk, hidden]` in the head's dtype."""
    logits = nn.functional.linear(rows, weight, bias).float()
    if form.scale != 1.0:
        logits *= form.scale
    slope: Tensor | None = None
    if form.softcap:
        logits = torch.tanh_(logits.div_(form.softcap))
        if wanted:
            slope = 1 - logits.square()
        logits *= form.softcap
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    index = targets.unsqueeze(-1)
    loss = (normaliser - logits.gather(-1, index)).sum()
    if not wanted:
        return loss, None
    probabilities = logits.sub_(normaliser).exp_()
    probabilities.scatter_add_(-1, index, torch.full_like(index, -1, dtype=probabilities.dtype))
    if slope is not None:
        probabilities *= slope
    if form.scale != 1.0:
        probabilities *= form.scale
    return loss, probabilities.to(weight.dtype) @ weight
