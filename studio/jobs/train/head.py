"""A causal language model split into backbone and head, and a loss that never holds the logits of all tokens at once.

Before training, the split model's loss is compared with the model's own (`agrees`). In the chunked loss only tokens
with a label reach the head, a chunk at a time. With a frozen head the gradient of the hidden states is computed in the
same pass, so a chunk leaves nothing behind but that gradient. With a trained head (an adapter on it, or the head
itself) each chunk is computed again in the backward pass, which costs time but works for every head.

Liger's fused linear cross-entropy (Hsu et al. 2024) does the same with kernels that write a chunk's gradient over its
16-bit logits, where it is installed and the device can run it. It takes a frozen plain head without a factor on its
logits; other heads go through the chunked loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from studio.core.errors import BadInput
from studio.core.loss_chunk import loss_chunk_tokens
from studio.core.recipe import Loss
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.device import sent
from studio.jobs.base.head_form import HeadForm, head_form_of
from studio.jobs.base.model_class import backbone_of, class_of

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Relative difference allowed between the two losses: as much as rounding of the logits makes in each dtype, so that
another formula is noticed."""


@dataclass(frozen=True, slots=True)
class WholeModel:
    """The loss from a model's own forward pass, with the logits `[batch, seq, vocabulary]` of all tokens in fp32."""

    causal: nn.Module
    path: ClassVar[Loss] = "full"

    def loss_sum(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Return the summed loss of a batch, fp32 scalar.

        Args:
            labels: `[batch, seq]`, not yet shifted; on the host, so that nobody waits for a card to count them.
            **inputs: The model's arguments, such as `input_ids` `[batch, seq]`.
        """
        # In fp32, as transformers' own loss does it (loss/loss_utils.py).
        logits = self._logits(**inputs)
        wanted = sent(shifted(labels), logits.device)
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")

    def row_losses(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Return the summed loss of each row of a batch `[rows]`, fp32; arguments as for `loss_sum`."""
        logits = self._logits(**inputs)
        wanted = sent(shifted(labels), logits.device)
        rows = _rows_of(labels, inputs.get("row_lengths"))
        one_by_one = ((logits[row].flatten(0, 1), wanted[row].flatten()) for row in rows)
        return torch.stack([nn.functional.cross_entropy(*row, reduction="sum") for row in one_by_one])

    def token_losses(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Return the loss of each labelled token `[labelled]`, fp32, row after row; arguments as for `loss_sum`."""
        logits, wanted = self._logits(**inputs).flatten(0, 1), shifted(labels).flatten()
        losses = nn.functional.cross_entropy(logits, sent(wanted, logits.device), reduction="none")
        return losses.index_select(0, sent(_places(wanted), logits.device))

    def _logits(self, **inputs: Any) -> Tensor:
        """Return the logits of all tokens in fp32."""
        kind: Any = self.causal
        if class_of(kind).decoder and "token_type_ids" in signature(kind.forward).parameters:
            # Gemma 3 asks in training for what tells image tokens, of which there are none, from text.
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        logits: Tensor = kind(**inputs, use_cache=False).logits
        return logits.float()


@dataclass(frozen=True, slots=True)
class SplitModel:
    """The loss from a backbone's hidden states and a head, by chunks or by liger.

    Attributes:
        causal: The whole model that the two are parts of.
        backbone: Returns the final hidden states `[batch, seq, hidden]`.
        head: Turns hidden states into logits.
        form: What the model family does with the head's output.
        path: `chunked` or `liger`.
    """

    causal: nn.Module
    backbone: nn.Module
    head: nn.Module
    form: HeadForm
    path: Loss = "chunked"

    def loss_sum(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Return the summed loss of a batch, fp32 scalar; arguments as for `WholeModel`, which the backbone gets."""
        hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        return self._summed(hidden, shifted(labels))

    def row_losses(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Return the summed loss of each row of a batch `[rows]`, fp32; arguments as for `loss_sum`."""
        hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        wanted, rows = shifted(labels), _rows_of(labels, inputs.get("row_lengths"))
        return torch.stack([self._summed(hidden[row], wanted[row]).float() for row in rows])

    def token_losses(self, labels: Tensor, **inputs: Any) -> Tensor:
        """Return the loss of each labelled token `[labelled]`, fp32, row after row; arguments as for `loss_sum`.

        It is taken in chunks on either path: liger's kernel knows one gradient for all tokens.
        """
        hidden = self.backbone(**inputs, use_cache=False).last_hidden_state
        return chunked_token_losses(hidden, self.head, shifted(labels), self.form)

    def _summed(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.path == "liger":
            return liger_loss_sum(hidden, self.head, labels, self.form)
        return chunked_loss_sum(hidden, self.head, labels, self.form)


TokenLoss = WholeModel | SplitModel
"""Computes the loss of a causal model's labelled tokens with gradients: of each, or summed over a batch or its rows."""


def _rows_of(labels: Tensor, row_lengths: Tensor | None) -> list[tuple[slice, slice]]:
    """Return the index of each row of a batch in a tensor `[batch, seq, ...]`.

    Args:
        labels: `[batch, seq]`.
        row_lengths: Tokens of each packed row, `[rows]`, on the host; None where each row has a line of its own.
    """
    if row_lengths is None:
        return [(slice(row, row + 1), slice(None)) for row in range(labels.shape[0])]
    ends = row_lengths.cumsum(0).tolist()
    return [(slice(0, 1), slice(end - length, end)) for end, length in zip(ends, row_lengths.tolist(), strict=True)]


def token_loss(causal: nn.Module, loss: Loss) -> TokenLoss:
    """Return how a causal model's loss is computed: as wanted, or in a simpler way where the model does not allow it.

    Args:
        causal: The model, adapters included.
        loss: The recipe's word. A model without a separate backbone and head gets `full`; a head that liger cannot take
            gets `chunked`.
    """
    backbone = backbone_of(causal)
    head = cast(Any, causal).get_output_embeddings() if loss != "full" else None
    if not isinstance(backbone, nn.Module) or backbone is causal or not isinstance(head, nn.Module):
        return WholeModel(causal)
    form = head_form_of(cast(Any, causal).config)
    path: Loss = "liger" if loss == "liger" and liger_takes(head, form) else "chunked"
    return SplitModel(causal, backbone, head, form, path)


def agrees(parts: SplitModel, batch: dict[str, Tensor], autocast: Callable[[], Any]) -> bool:
    """Return whether the split model gives the model's own loss on a batch, in evaluation mode.

    A family may do something between backbone and head that `HeadForm` does not know; only a comparison shows it.

    Args:
        parts: The model and its split.
        batch: Arguments of `loss_sum`, labels included.
        autocast: Maker of the context that sets the arithmetic's number format.
    """
    causal = parts.causal
    was_training = causal.training
    causal.eval()
    try:
        with torch.no_grad(), autocast():
            ours, theirs = float(parts.loss_sum(**batch)), float(WholeModel(causal).loss_sum(**batch))
    finally:
        causal.train(was_training)
    dtype = next(parts.head.parameters()).dtype
    return abs(ours - theirs) <= TOLERANCE.get(dtype, 1e-4) * max(abs(theirs), 1e-6)


def shifted(labels: Tensor) -> Tensor:
    """Return labels `[batch, seq]` moved one place left: position i then holds the token that follows i.

    Nothing follows the last position: it gets `IGNORED`.
    """
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
    return _chunked(hidden, head, labels, form, each=False)


def chunked_token_losses(hidden: Tensor, head: nn.Module, labels: Tensor, form: HeadForm) -> Tensor:
    """Return the negative log-likelihood of each labelled token `[labelled]`, fp32; arguments as `chunked_loss_sum`."""
    return _chunked(hidden, head, labels, form, each=True)


def _places(labels: Tensor) -> Tensor:
    """Return where labels `[tokens]` say that something is to be learnt `[labelled]`, where the labels are."""
    return (labels != IGNORED).nonzero()[:, 0]


def _labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states `[labelled, hidden]` of the tokens with a label, which alone reach the head, and these.

    Their places are found where the labels are: on the host, or a card would be waited for to learn how many they are.
    """
    flat = labels.flatten()
    places = _places(flat)
    targets = flat.index_select(0, places)
    rows = hidden.flatten(0, -2).index_select(0, sent(places, hidden.device))
    return rows, sent(targets, hidden.device)


def _chunked(hidden: Tensor, head: nn.Module, labels: Tensor, form: HeadForm, *, each: bool) -> Tensor:
    rows, targets = _labelled(hidden, labels)
    if rows.shape[0] == 0:
        # Not a plain zero, or an empty tensor of no graph: the caller goes backward through it.
        return rows.float().sum(-1) if each else hidden.sum() * 0.0
    # A quantised head's weight has another shape than [vocabulary, hidden], so `out_features` is asked first.
    vocabulary = int(getattr(head, "out_features", 0)) or cast(Tensor, head.weight).shape[0]
    chunk = loss_chunk_tokens(vocabulary, rows.shape[0])
    # Not isinstance: a subclass, such as bitsandbytes' 4-bit layer, multiplies differently.
    frozen = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    if frozen:
        linear, how = cast(nn.Linear, head), (form, chunk, each)
        return cast(Tensor, cast(Any, _FrozenHeadLoss).apply(rows, linear.weight, linear.bias, targets, how))
    parts = []
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, rows.shape[0], chunk):
        part, answers = rows[start : start + chunk], targets[start : start + chunk]
        loss = cast(Tensor, checkpoint(_head_loss, part, answers, head, form, each, use_reentrant=False))
        if each:
            parts.append(loss)
        else:
            total = total + loss
    return torch.cat(parts) if each else total


def _head_loss(rows: Tensor, targets: Tensor, head: nn.Module, form: HeadForm, each: bool) -> Tensor:
    logits = head(rows).float() * form.scale
    if form.softcap:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return nn.functional.cross_entropy(logits, targets, reduction="none" if each else "sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """Loss and hidden-state gradient in one pass over chunks of rows `[chunk, hidden]`.

    The loss is one sum, or that of each token, whose gradients are then weighted one by one.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: tuple[HeadForm, int, bool]
    ) -> Tensor:
        form, chunk, each = how
        shape = rows.shape[:1] if each else ()
        total = torch.zeros(shape, dtype=torch.float32, device=rows.device)
        wanted = ctx.needs_input_grad[0]  # false in evaluation, where no gradient is computed
        grads = torch.empty_like(rows) if wanted else None
        # Each product's format is chosen in `_chunk` itself: the head's for the products, fp32 for the softmax.
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, rows.shape[0], chunk):
                part = slice(start, start + chunk)
                one = rows[part].to(weight.dtype)
                loss, grad = _chunk(one, weight, bias, targets[part], form=form, wanted=wanted, each=each)
                if each:
                    total[part] = loss
                else:
                    total += loss
                if grads is not None and grad is not None:
                    grads[part] = grad
        if grads is not None:
            ctx.save_for_backward(grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        # In place, which saves a second [labelled, hidden] tensor; backward runs once per forward.
        factor = grad_outputs[0].to(grads.dtype)
        return grads.mul_(factor[:, None] if factor.dim() else factor), None, None, None, None


def _chunk(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, form: HeadForm, wanted: bool, each: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the chunk's loss and, where wanted, its gradient `[chunk, hidden]` in the head's dtype.

    The loss is a sum, or that of `each` token `[chunk]`.

    The logits `[chunk, vocabulary]` are by far the largest tensor here, so almost every line changes them in place.
    """
    logits = nn.functional.linear(rows, weight, bias).float()
    if form.scale != 1.0:
        logits *= form.scale
    slope: Tensor | None = None
    if form.softcap:
        logits = torch.tanh_(logits.div_(form.softcap))
        if wanted:
            slope = 1 - logits.square()  # the derivative of softcap * tanh(x / softcap); `logits` is the tanh here
        logits *= form.softcap
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    index = targets.unsqueeze(-1)
    loss = normaliser - logits.gather(-1, index)  # -log softmax at the target
    loss = loss.squeeze(-1) if each else loss.sum()
    if not wanted:
        return loss, None
    # The loss's derivative by the logits: softmax, less 1 at the target. Then the chain rule back through softcap,
    # scale and head.
    probabilities = logits.sub_(normaliser).exp_()
    probabilities.scatter_add_(-1, index, torch.full_like(index, -1, dtype=probabilities.dtype))
    if slope is not None:
        probabilities *= slope
    if form.scale != 1.0:
        probabilities *= form.scale
    return loss, probabilities.to(weight.dtype) @ weight


def require_liger(device: torch.device) -> None:
    """Refuse a recipe that asks for liger where it cannot run; nothing happens where it can.

    Raises:
        BadInput: The device is no CUDA card, or liger or triton is not installed.
    """
    if device.type != "cuda":
        why = f"its kernels run on CUDA cards, and this run is on {device.type}"
    elif find_spec("liger_kernel") is None or find_spec("triton") is None:
        why = "the package liger-kernel is not installed (pip install liger-kernel)"
    else:
        return
    raise BadInput(f"train.loss is liger: {why}. chunked needs nothing and never builds the whole logits either.")


def liger_takes(head: nn.Module, form: HeadForm) -> bool:
    """Return whether liger's loss can be used with a head: a plain linear one, frozen, with unscaled logits."""
    return type(head) is nn.Linear and form.scale == 1.0 and not any(p.requires_grad for p in head.parameters())


def liger_loss_sum(hidden: Tensor, head: nn.Module, labels: Tensor, form: HeadForm) -> Tensor:
    """Return the summed negative log-likelihood of the labelled tokens, fp32 scalar.

    Args:
        hidden: Final hidden states `[batch, seq, hidden]`.
        head: One that `liger_takes` accepts; its weight is `[vocabulary, hidden]`.
        labels: Already shifted, `[batch, seq]`, `IGNORED` where nothing is to be learnt.
        form: How the head's output becomes logits.
    """
    linear = cast(nn.Linear, head)
    rows, targets = _labelled(hidden, labels)
    if rows.shape[0] == 0:
        return hidden.sum() * 0.0  # as in the chunked loss
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # noqa: PLC0415  optional, needs triton

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=form.softcap)
    # The kernel multiplies in the format that it is given; hidden states may come in another than the head's.
    loss: Tensor = fused(linear.weight, rows.to(linear.weight.dtype), targets, linear.bias)
    return loss.float()
