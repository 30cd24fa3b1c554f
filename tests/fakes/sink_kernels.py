"""Stand-ins for the attention kernels of cards, in plain torch, with the arguments and layouts that sinks use."""

from typing import Any

import torch
from torch import Tensor


def seen_by(rows: int, keys: int, window: int | None = None) -> Tensor:
    behind = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)[None, :]
    return (behind >= 0) & (behind < (window or keys))


class Kernels:
    """The operators of cards in plain torch, with their arguments and layouts; the others are torch's own."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.aten, name)

    def _scores(self, query: Tensor, key: Tensor, scale: float, seen: Tensor | None, bias: Tensor | None) -> Tensor:
        scores = query @ key.transpose(-1, -2) * scale
        scores = scores if bias is None else scores + bias
        return scores if seen is None else scores.masked_fill(~seen, -torch.inf)

    def _back(
        self, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scores: Tensor
    ) -> Any:
        """What every fused kernel's backward does, `[batch, heads, seq, head_dim]`, keys repeated."""
        weights = torch.exp(scores - sums[..., None])
        inner = weights * (gradient @ v.transpose(-1, -2) - (gradient * out).sum(-1, keepdim=True))
        return inner @ k, inner.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ gradient

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Any, wanted: bool, drop: float, causal: bool, *, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.called.append("efficient")
        assert wanted
        assert not drop
        assert q.shape[1] == k.shape[1]
        if bias is not None:
            assert bias.shape == (*q.shape[:3], k.shape[2])
            assert bias.stride(2) % 16 == 0
            assert not causal
        scores = self._scores(q, k, scale, seen_by(q.shape[2], k.shape[2]) if causal else None, bias)
        sums = torch.full((*q.shape[:2], -(-q.shape[2] // 32) * 32), torch.nan, dtype=q.dtype)
        sums[..., : q.shape[2]] = scores.logsumexp(-1)
        return scores.softmax(-1) @ v, sums, torch.tensor(1), torch.tensor(2)

    def _scaled_dot_product_efficient_attention_backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Any,
        out: Tensor,
        sums: Tensor,
        *rest: Any,
        scale: float,
    ) -> tuple[Any, ...]:
        seed, offset, drop, mask, causal = rest
        assert (int(seed), int(offset), drop, mask) == (1, 2, 0.0, [True, True, True, False])
        scores = self._scores(q, k, scale, seen_by(q.shape[2], k.shape[2]) if causal else None, bias)
        found = self._back(gradient, q, k, v, out, sums[..., : q.shape[2]], scores)
        return found[0] * scale, found[1] * scale, found[2], None

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Any, other: Any, *rest: Any, scale: float, **window: int
    ) -> tuple[Any, ...]:
        self.called.append("flash")
        assert rest[4] is False
        out, sums = self._flash(q, k, v, starts, rest, scale, window, None)
        return out, sums, torch.tensor(1), torch.tensor(2), None

    def _flash_attention_backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        sums: Tensor,
        *rest: Any,
        scale: float,
        **window: int,
    ) -> Any:
        starts, _, *rest_, seed, offset = rest
        assert (int(seed), int(offset)) == (1, 2)
        return self._flash(q, k, v, starts, rest_, scale, window, (gradient, out, sums))

    def _flash(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Any, rest: Any, scale: float, window: Any, back: Any
    ) -> Any:
        longest, other, drop, causal = rest[:4]
        assert not drop
        left, right = window["window_size_left"], window["window_size_right"]
        assert causal == (left == -1 and right == 0)
        groups = q.shape[-2] // k.shape[-2]
        repeated = [tensor.repeat_interleave(groups, -2) for tensor in (k, v)]
        q_, k_, v_ = (tensor.transpose(-2, -3) for tensor in (q, *repeated))  # heads before tokens
        rows, keys = q_.shape[-2], k_.shape[-2]
        seen = seen_by(rows, keys, left + 1 if left >= 0 else None) if right == 0 else torch.ones(rows, keys).bool()
        if starts is None:
            assert (longest, other) == (rows, keys)
        else:
            assert starts.dtype == torch.int32
            assert longest == other == int(starts.diff().max())
            row = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
            seen &= row[:, None] == row[None, :]
        scores = self._scores(q_, k_, scale, seen, None)
        if back is None:
            return (scores.softmax(-1) @ v_).transpose(-2, -3), scores.logsumexp(-1)
        gradient, out, sums = back
        heads_first = (tensor.transpose(-2, -3) for tensor in (gradient, out))
        gradient, out = heads_first
        found = self._back(gradient, q_, k_, v_, out, sums, scores)
        gq, gk, gv = (tensor.transpose(-2, -3) for tensor in found)
        by_group = [tensor.unflatten(-2, (-1, groups)).sum(-2) for tensor in (gk * scale, gv)]
        return gq * scale, *by_group
