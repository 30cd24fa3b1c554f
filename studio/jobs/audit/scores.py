"""Computes figures per token from final hidden states, without ever holding the whole head or all logits.

The vocabulary is gone through in blocks. For each token and variant a running maximum, a sum of exponentials and a
weighted sum of logit differences are kept. Log-likelihood, KL divergence and top token follow from them exactly.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from studio.jobs.base.head_form import HeadForm, formed

HeadRows = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""Returns rows `[first, stop)` of a head: weight `[rows, hidden]` and bias `[rows]` or None, both fp32."""

_LOGITS_AT_ONCE = 2**21
"""Logits of each of two models that are held at once: 8 MiB in fp32."""
_HEAD_NUMBERS = 2**22
"""Weights of the head that are read at once."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Figures of one variant, one number per token: `[tokens]` each.

    Attributes:
        loss: Negative log-likelihood of the token that follows, in nats.
        kl: KL divergence of this variant's distribution from the reference's, in nats; 0 for the reference.
        same: Whether the most likely token is the reference's.
    """

    loss: Tensor
    kl: Tensor
    same: Tensor


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a variant.

    Attributes:
        rows: Returns some of its rows.
        vocabulary: How many rows it has.
        key: Variants with the same key have the same head, which is then read once.
    """

    rows: HeadRows
    vocabulary: int
    key: str = ""


@dataclass(frozen=True, slots=True)
class _Led:
    """A block of the reference's logits, `[some, block]`.

    Attributes:
        logits: The logits themselves.
        weights: `exp(logit - highest)`, where `highest` is the running maximum.
        shift: By which sums of earlier weights are multiplied, as the maximum has grown, `[some]`.
    """

    logits: Tensor
    weights: Tensor
    shift: Tensor


class _Sums:
    """The running sums of one variant over the blocks of the vocabulary, `[tokens]` each.

    `highest` and `top` are the largest logit and its token, `total` the sum of `exp(logit - highest)`, `apart` the
    weighted sum of differences from the reference's logits, `target` the logit of the token that follows.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.highest = torch.full((tokens,), -torch.inf, device=device)
        self.top = torch.zeros(tokens, dtype=torch.long, device=device)
        self.total = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.apart = torch.zeros(tokens, dtype=torch.float64, device=device)
        self.target = torch.zeros(tokens, device=device)

    def take(self, part: slice, logits: Tensor, first: int, targets: Tensor) -> None:
        """Add logits `[some, block]` of some tokens; the block begins at token `first` of the vocabulary."""
        highest, place = logits.max(-1)
        before = self.highest[part]
        better = highest > before
        self.top[part] = torch.where(better, place + first, self.top[part])
        now = torch.maximum(before, highest)
        self.total[part] = self.total[part] * (before - now).double().exp() + _summed(logits, now)
        self.highest[part] = now
        inside = (targets >= first) & (targets < first + logits.shape[-1])
        index = (targets - first).clamp(0, logits.shape[-1] - 1)
        chosen = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        self.target[part] = torch.where(inside, chosen, self.target[part])

    def lead(self, part: slice, logits: Tensor, first: int, targets: Tensor) -> "_Led":
        """Add the reference's logits; return what the variants that are compared with it need of them."""
        before = self.highest[part].clone()
        self.take(part, logits, first, targets)
        shift = (before - self.highest[part]).double().exp()
        return _Led(logits, (logits - self.highest[part].unsqueeze(-1)).exp_(), shift)

    def follow(self, part: slice, logits: Tensor, first: int, targets: Tensor, led: "_Led") -> None:
        """Add a variant's logits of the same tokens; they are overwritten."""
        self.take(part, logits, first, targets)
        apart = (logits.neg_().add_(led.logits).mul_(led.weights)).sum(-1, dtype=torch.float64)
        self.apart[part] = self.apart[part] * led.shift + apart

    @property
    def normaliser(self) -> Tensor:
        """Logarithm of the sum of exponentials of all logits, fp64 `[tokens]`."""
        return self.highest.double() + self.total.log()


@torch.no_grad()
def score(
    finals: Mapping[str, Tensor],
    targets: Tensor,
    heads: Mapping[str, Head],
    form: HeadForm,
    *,
    reference: str,
    tell: Callable[[float], None] = lambda fraction: None,
) -> dict[str, TokenScores]:
    """Return the figures of every variant.

    Args:
        finals: Final hidden states `[tokens, hidden]` of each variant, the reference among them.
        targets: The token that follows each, `[tokens]`.
        heads: The head of each variant.
        form: How the head's output becomes logits.
        reference: Name of the variant that the others are compared with.
        tell: Gets the fraction done.
    """
    tokens, device = targets.shape[0], targets.device
    sums = {name: _Sums(tokens, device) for name in finals}
    vocabulary = heads[reference].vocabulary
    block = max(1, min(vocabulary, _HEAD_NUMBERS // finals[reference].shape[-1]))
    chunk = max(1, _LOGITS_AT_ONCE // block)
    for first in range(0, vocabulary, block):
        made: dict[str, tuple[Tensor, Tensor | None]] = {}

        def logits_of(
            name: str, part: slice, first: int = first, made: dict[str, tuple[Tensor, Tensor | None]] = made
        ) -> Tensor:
            head = heads[name]
            if head.key not in made:
                weight, bias = head.rows(first, min(first + block, vocabulary))
                made[head.key] = weight.to(device), None if bias is None else bias.to(device)
            return formed(linear(finals[name][part].float(), *made[head.key]), form)

        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            led = sums[reference].lead(part, logits_of(reference, part), first, targets[part])
            for name in finals:
                if name != reference:
                    sums[name].follow(part, logits_of(name, part), first, targets[part], led)
        tell(min(first + block, vocabulary) / vocabulary)
    return {name: _scores(sums[name], sums[reference]) for name in finals}


@torch.no_grad()
def score_given(given: Iterable[Tensor], finals: Tensor, targets: Tensor, head: Head, form: HeadForm) -> TokenScores:
    """Return the figures of a model whose logits are given, compared with a reference whose hidden states are given.

    Args:
        given: The model's fp32 logits `[some, vocabulary]`, some tokens at a time.
        finals: Final hidden states `[tokens, hidden]` of the reference.
        targets: The token that follows each, `[tokens]`.
        head: The reference's head.
        form: How that head's output becomes logits.
    """
    own, reference = (_Sums(targets.shape[0], targets.device) for _ in range(2))
    block = max(1, min(head.vocabulary, _HEAD_NUMBERS // finals.shape[-1]))
    start = 0
    for logits in given:
        part = slice(start, start + logits.shape[0])
        for first in range(0, head.vocabulary, block):
            weight, bias = head.rows(first, min(first + block, head.vocabulary))
            bias = None if bias is None else bias.to(targets.device)
            wanted = formed(linear(finals[part].float(), weight.to(targets.device), bias), form)
            led = reference.lead(part, wanted, first, targets[part])
            columns = logits[:, first : first + block].to(targets.device, copy=True)
            own.follow(part, columns, first, targets[part], led)
        start = part.stop
    return _scores(own, reference)


def _scores(own: _Sums, reference: _Sums) -> TokenScores:
    loss = own.normaliser - own.target.double()
    if own is reference:
        return TokenScores(loss, torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool))
    # sum p (log p - log q) = sum p (x - y) - (log sum exp x - log sum exp y)
    kl = own.apart / reference.total - (reference.normaliser - own.normaliser)
    return TokenScores(loss, kl.clamp(min=0.0), own.top == reference.top)


def _summed(logits: Tensor, highest: Tensor) -> Tensor:
    return (logits - highest.unsqueeze(-1)).exp_().sum(-1, dtype=torch.float64)
