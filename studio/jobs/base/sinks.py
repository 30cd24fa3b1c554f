"""Attention with sinks by torch's fused kernels: exact, and without matrices of seq x seq.

A sink is a learnt number per head that takes part in every row's softmax and attends to nothing. transformers 5.24
computes it eagerly. Here torch's kernel computes the attention without it, and what it returns beside the output, each
row's log-sum-exp `l`, says what the sink `s` changes:

    output' = output * sigmoid(l - s)        l' = log(exp(l) + exp(s))

A kernel's backward makes the weights again as `exp(score - l)`, and the scores' gradients with them from the sum of
`gradient * output` over each row. With output' and l' both are those of the softmax with a sink, so that the kernel's
own backward gives exact gradients of queries, keys and values. The sink's gradient is `-exp(s - l')` times that sum.

It has been run on CPUs only. What runs on a card is written after the operators' declarations and checked on fake
tensors: shapes, not numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask

from studio.jobs.base.device import FLASH_CAPABILITY

SINK_ATTENTION = "studio_sinks"
"""Its name among transformers' attention implementations."""

FAMILIES = frozenset({"gpt_oss", "granite_swa", "granitemoe_swa", "flint"})
"""Types of configs whose attention is transformers' usual one and a sink (`s_aux`), nothing else. Others that have
sinks also have values of another width, or layers that choose which tokens they see."""

Kernel = Literal["cpu", "flash", "efficient"]

_HALF = (torch.bfloat16, torch.float16)
_BIAS_ALIGNMENT = 16
"""The memory-efficient kernel wants each row of a mask to begin at a multiple of 16 bytes (kernel_forward.h,
check_supported); as torch's own attention.cpp (pad_bias) does, rows are padded to 16 numbers."""

_aten = torch.ops.aten
_OPERATORS = {
    "cpu": ("_scaled_dot_product_flash_attention_for_cpu",),
    "cuda": ("_flash_attention_forward", "_scaled_dot_product_efficient_attention"),
}
"""Operators called here, by the kind of device; each has a backward of the same name."""


def serves(config: PretrainedConfig, device: torch.device) -> bool:
    """Return whether this attention computes a model's sinks on a device.

    It drops no attention weights, and on a card heads must be multiples of 8 numbers and of at most 256.
    """
    if getattr(config, "model_type", "") not in FAMILIES or getattr(config, "attention_dropout", None):
        return False
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fits = device.type == "cpu" or (head_dim % 8 == 0 and head_dim <= 256)
    operators = _OPERATORS.get(device.type, ())
    return fits and bool(operators) and all(hasattr(_aten, name) for name in operators)


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the kernel that computes attention without a mask of numbers.

    Args:
        device: Where it runs.
        dtype: Of queries, keys and values.
    """
    if device.type != "cuda":
        return "cpu"
    able = dtype in _HALF and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    return "flash" if able else "efficient"


def sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    s_aux: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output `[batch, seq, heads, head_dim]`, and None for its weights.

    Args:
        module: The attention layer.
        query: `[batch, heads, seq, head_dim]`.
        key: `[batch, key-value heads, keys, head_dim]`.
        value: Like `key`.
        attention_mask: What `sink_mask` made; None where a token sees all before it, or a window of them.
        s_aux: The sinks `[heads]`.
        scaling: What scores are multiplied by.
        sliding_window: How many tokens back a token sees, itself included.
        dropout: Must be 0: the kernels drop nothing here.

    Raises:
        ValueError: Attention weights are to be dropped.
    """
    if dropout:
        raise ValueError("attention with sinks drops no attention weights: load the model with eager attention")
    query, key, value = (tensor.to(computed_in(query)) for tensor in (query, key, value))
    rows, keys = query.shape[2], key.shape[2]
    kernel, bias = kernel_for(query.device, query.dtype), attention_mask
    if bias is None and sliding_window is not None and keys > sliding_window and kernel != "flash":
        bias = _bias(window_mask(rows, keys, sliding_window, query.device), query.dtype, kernel)
    if bias is not None:
        kernel = "efficient" if kernel == "flash" else kernel
        # A mask of truths is somebody else's: `sink_mask` makes numbers, once for all layers.
        bias = _bias(bias, query.dtype, kernel) if bias.dtype == torch.bool else bias.to(query.dtype)
    call = KernelCall(kernel, scaling or query.shape[-1] ** -0.5, causal=bias is None and rows > 1)
    if kernel == "flash":
        back = -1 if sliding_window is None or keys <= sliding_window else sliding_window - 1
        by_token = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return _attend(tuple(by_token), s_aux, None, replace(call, back=back)), None
    if kernel == "efficient":  # it takes no grouped heads
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        bias = None if bias is None else bias.expand(query.shape[0], query.shape[1], rows, keys)
    return _attend((query, key, value), s_aux, bias, call).transpose(1, 2).contiguous(), None


def packed_sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    *,
    starts: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Return the output `[tokens, heads, head_dim]` of rows packed one after another, by one call of the flash kernel.

    Args:
        query: `[tokens, heads, head_dim]`.
        key: `[tokens, key-value heads, head_dim]`.
        value: Like `key`.
        sinks: One for each head.
        starts: int32, the rows' first places and the end.
        longest: Tokens of the longest row.
        scale: What scores are multiplied by.
        window: How many tokens back a token sees, itself included; None for all of its row.
    """
    back = -1 if window is None else window - 1
    call = KernelCall("flash", scale or query.shape[-1] ** -0.5, causal=True, back=back, longest=longest)
    return _attend((query, key, value), sinks, None, call, starts)


def sink_mask(
    *,
    q_length: int,
    kv_length: int,
    dtype: torch.dtype,
    device: torch.device,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **named: Any,
) -> Tensor | None:
    """Return the mask `[batch, 1, queries, keys]` in numbers for all layers of a kind; None where none is needed.

    Padding at the end of a row is not masked: no token of the row sees it, and what padding itself sees is used by
    nobody.

    Args:
        q_length: Number of queries.
        kv_length: Number of keys.
        dtype: Of the residual stream.
        device: Where it is needed.
        attention_mask: True where a token is no padding, `[batch, keys]`.
        local_size: The layers' sliding window.
        allow_is_causal_skip: Whether the mask is the usual causal one, which may be left out.
        **named: What else transformers' mask functions take.
    """
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    kernel = kernel_for(device, dtype)
    windowed = local_size is not None and kv_length > local_size and kernel != "flash"
    alike = q_length == kv_length and _is_padded_at_the_end(attention_mask)
    alone = q_length == 1 and attention_mask is None
    if allow_is_causal_skip and not windowed and (alike or alone):
        return None
    seen = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        device=device,
        **named,
    )
    return None if seen is None else _bias(seen, dtype, "efficient" if kernel == "flash" else kernel)


def _is_padded_at_the_end(mask: Tensor | None) -> bool:
    """Return whether no token follows padding in any row."""
    return mask is None or bool((mask[:, :-1] | ~mask[:, 1:]).all())


def window_mask(rows: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return a mask `[1, 1, rows, keys]`, True where a token is seen: itself and the `window - 1` before it."""
    behind = torch.arange(keys - rows, keys, device=device).unsqueeze(1) - torch.arange(keys, device=device)
    return ((behind >= 0) & (behind < window)).expand(1, 1, rows, keys)


def _bias(seen: Tensor, dtype: torch.dtype, kernel: Kernel) -> Tensor:
    """Return 0 where a token is seen and a large negative number elsewhere.

    The number is finite, so that a row that sees nothing has a log-sum-exp and gives all its weight to the sink. It is
    a quarter of the lowest one, because kernels compute with powers of 2: scores are multiplied by 1.44.
    """
    keys = seen.shape[-1]
    width = keys if kernel == "cpu" else math.ceil(keys / _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    made = torch.full((*seen.shape[:-1], width), torch.finfo(dtype).min / 4, dtype=dtype, device=seen.device)
    return made.narrow(-1, 0, keys).masked_fill_(seen, 0)


def computed_in(query: Tensor) -> torch.dtype:
    """Return the format in which attention is computed: autocast does not know this function."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


@dataclass(frozen=True, slots=True)
class KernelCall:
    """How a kernel is called, forward and backward.

    The flash kernel takes and gives `[batch, seq, heads, head_dim]`, or `[tokens, heads, head_dim]` of packed rows; the
    others `[batch, heads, seq, head_dim]`.

    Attributes:
        kernel: Which one.
        scale: What scores are multiplied by.
        causal: Whether a token sees none after it.
        back: How many tokens before itself a token sees; -1 for all. Only flash has windows.
        longest: Tokens of the longest packed row; 0 where rows are not packed.
    """

    kernel: Kernel
    scale: float
    causal: bool
    back: int = -1
    longest: int = 0

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, starts: Tensor | None
    ) -> Sequence[Any]:
        """Return the output, the log-sum-exp `[.., heads, rows]` and what else the backward needs."""
        if self.kernel == "cpu":
            made = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, self.causal, attn_mask=bias, scale=self.scale
            )
            return tuple(made)
        if self.kernel == "efficient":
            made = _aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, 0.0, self.causal, scale=self.scale
            )
            return tuple(made)
        longest = (self.longest, self.longest) if starts is not None else (query.shape[1], key.shape[1])
        made = _aten._flash_attention_forward(
            query,
            key,
            value,
            starts,
            starts,
            *longest,
            0.0,
            self._flash_causal,
            False,
            scale=self.scale,
            **self._window,
        )
        return tuple(made[:4])

    def backward(
        self,
        gradient: Tensor,
        inputs: Sequence[Tensor],
        bias: Tensor | None,
        starts: Tensor | None,
        made: Sequence[Any],
    ) -> Sequence[Tensor]:
        """Return the gradients of queries, keys and values."""
        query, key, value = inputs
        output, sums, *state = made
        if self.kernel == "cpu":
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, query, key, value, output, sums, 0.0, self.causal, attn_mask=bias, scale=self.scale
            )
            return tuple(found)
        if self.kernel == "efficient":
            wanted = [True, True, True, False]
            found = _aten._scaled_dot_product_efficient_attention_backward(
                gradient, query, key, value, bias, output, sums, *state, 0.0, wanted, self.causal, scale=self.scale
            )
            return tuple(found[:3])
        longest = (self.longest, self.longest) if starts is not None else (query.shape[1], key.shape[1])
        found = _aten._flash_attention_backward(
            *(gradient, query, key, value, output, sums, starts, starts, *longest, 0.0, self._flash_causal, *state),
            scale=self.scale,
            **self._window,
        )
        return tuple(found)

    @property
    def _flash_causal(self) -> bool:
        return self.causal and self.back < 0

    @property
    def _window(self) -> dict[str, int]:
        """The window to the left and right of a token, as `torch.nn.attention.varlen` gives it: -1 is without limit."""
        return {"window_size_left": self.back, "window_size_right": 0 if self.causal else -1}

    def by_row(self, of_heads: Tensor) -> Tensor:
        """Return numbers `[.., heads, rows]` laid as the output is, with 1 for head_dim."""
        return (of_heads.transpose(-1, -2) if self.kernel == "flash" else of_heads).unsqueeze(-1)

    def by_head(self, of_rows: Tensor) -> Tensor:
        """Return numbers that lie as the output does, without head_dim, as `[.., heads, rows]`."""
        return of_rows.transpose(-1, -2) if self.kernel == "flash" else of_rows


class _SinkAttention(torch.autograd.Function):
    """A kernel's attention, with the sink put in; its inputs lie as the kernel takes them."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query, key, value, sinks, bias, starts, call = given
        made = call.forward(query, key, value, bias, starts)
        output, sums = made[0], made[1]
        rows = _rows(call, query, sums)
        sink = sinks.unsqueeze(-1)
        output.mul_(call.by_row(torch.sigmoid(rows - sink)))
        torch.logaddexp(rows, sink, out=rows)
        ctx.save_for_backward(query, key, value, sinks, bias, starts, *made)
        ctx.call = call
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, bias, starts, *made = ctx.saved_tensors
        call, (gradient,), of_sinks = ctx.call, gradients, None
        found = call.backward(gradient, (query, key, value), bias, starts, made)
        if ctx.needs_input_grad[3]:
            output, sums = made[0], made[1]
            share = torch.exp(sinks.unsqueeze(-1) - _rows(call, query, sums))
            spent = share * call.by_head((gradient.to(sums.dtype) * output).sum(-1))
            heads = spent.shape[-2]
            of_sinks = -spent.reshape(-1, heads, spent.shape[-1]).sum((0, 2)).to(sinks.dtype)
        return (*found, of_sinks, None, None, None)


def _rows(call: KernelCall, query: Tensor, sums: Tensor) -> Tensor:
    """Return the log-sum-exp of real rows: the memory-efficient kernel pads their number to a multiple of 32."""
    return sums.narrow(-1, 0, query.shape[2]) if call.kernel == "efficient" else sums


def _attend(
    inputs: Sequence[Tensor], sinks: Tensor, bias: Tensor | None, call: KernelCall, starts: Tensor | None = None
) -> Tensor:
    output: Tensor = _SinkAttention.apply(*inputs, sinks, bias, starts, call)  # type: ignore[no-untyped-call]
    return output


AttentionInterface.register(
    SINK_ATTENTION,
    torch.compiler.disable(sink_attention),  # type: ignore[no-untyped-call]
)
AttentionMaskInterface.register(SINK_ATTENTION, sink_mask)
