"""Attention of long rows in groups of heads, so that a kernel's backward works on the memory of one group.

Beside its results, the flash kernel's backward needs the queries' gradient in fp32, and those of keys and values for
every query head, before it sums the heads that share them (flash_api.cpp mha_bwd): four times the bytes of the queries.
Heads know nothing of each other, so that the numbers are the same to the bit. On a card it has not run yet.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from studio.core.tiles import groups_heads, head_groups
from studio.jobs.base import sinks
from studio.jobs.base.sinks import KernelCall

_WIDEST = 256
"""Numbers of a head that the flash kernel takes at most, and a multiple of 8 of them."""


def attention_by_groups(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' `sdpa` returns: the output `[batch, seq, heads, head_dim]`, and None for its weights.

    Args:
        module: The attention layer.
        query: `[batch, heads, seq, head_dim]`.
        key: `[batch, key-value heads, seq, head_dim]`.
        value: Like `key`.
        attention_mask: transformers' mask; None where a token sees all before it.
        dropout: Probability with which attention weights are dropped.
        scaling: What scores are multiplied by.
        is_causal: Whether a token sees none after it; None for what the layer says.
        **named: What else transformers hands over.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and not dropout and causal and named.get("position_bias") is None
    width, grouped = query.shape[-1], plain and torch.is_grad_enabled() and groups_heads(query.shape[2])
    alike = query.shape[2] == key.shape[2] and width == value.shape[-1] <= _WIDEST and width % 8 == 0
    groups = head_groups(key.shape[1]) if grouped and alike and not torch.compiler.is_compiling() else 1
    dtype = sinks.computed_in(query) if groups > 1 else query.dtype
    kernel = sinks.kernel_for(query.device, dtype) if groups > 1 else "efficient"
    if kernel == "efficient":
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **named
        )
        return output
    inputs = [tensor.to(dtype) for tensor in (query, key, value)]
    if kernel == "flash":
        inputs = [tensor.transpose(1, 2) for tensor in inputs]
    call = KernelCall(kernel, scaling or query.shape[-1] ** -0.5, causal=True)
    made = by_groups(inputs, call, groups)
    return made if kernel == "flash" else made.transpose(1, 2).contiguous(), None


def by_groups(inputs: Sequence[Tensor], call: KernelCall, groups: int, starts: Tensor | None = None) -> Tensor:
    """Return a kernel's output for queries, keys and values, laid as it takes them.

    Args:
        inputs: Queries, keys and values.
        call: How the kernel is called.
        groups: How many times; a divisor of the key-value heads.
        starts: int32, the first places of packed rows and the end.
    """
    return cast(Tensor, cast(Any, _ByGroups).apply(*inputs, starts, call, groups))


class _ByGroups(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, call: KernelCall, groups: int
    ) -> Tensor:
        whole = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        states: list[Any] = []
        for into, *parts in _parts((whole, query, key, value), call, groups):
            output, *state = call.forward(parts[0], parts[1], parts[2], None, starts)
            into.copy_(output)
            del output
            states.append(state)
        tensors = [tensor for state in states for tensor in state if isinstance(tensor, Tensor)]
        ctx.call, ctx.groups = call, groups
        ctx.others = [[None if isinstance(one, Tensor) else one for one in state] for state in states]
        ctx.save_for_backward(query, key, value, whole, starts, *tensors)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, whole, starts, *tensors = ctx.saved_tensors
        made = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (query, key, value)]
        given, left = (gradient, whole, query, key, value, *made), iter(tensors)
        for number, (arrived, output, *parts) in enumerate(_parts(given, ctx.call, ctx.groups)):
            state = [next(left) if one is None else one for one in ctx.others[number]]
            # Kernels copy what does not lie as they want it; of a group it seldom does.
            found = ctx.call.backward(arrived.contiguous(), parts[:3], None, starts, (output.contiguous(), *state))
            for into, part in zip(parts[3:], found, strict=True):
                into.copy_(part)
            del found, part
        return *made, None, None, None


def _parts(tensors: Sequence[Tensor], call: KernelCall, groups: int) -> Iterator[list[Tensor]]:
    """Yield the heads of each group, of every tensor."""
    place = -3 if call.kernel == "cpu" else -2
    yield from (list(part) for part in zip(*(tensor.chunk(groups, place) for tensor in tensors), strict=True))


AttentionInterface.register("sdpa", attention_by_groups)
