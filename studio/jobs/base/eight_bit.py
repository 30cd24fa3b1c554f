"""Linear layers whose frozen weight is in 8 bits, one scale for each row, and is dequantised for each product.

The weights are those of bitsandbytes' LLM.int8, but not the product: that one rounds activations too, forward but not
backward, finds their outliers with a wait for the card at every layer, and keeps its input and its weight on `ctx`,
where neither a checkpoint nor a stream can see them. Here only the weight is rounded, so that the gradient is exactly
that of the product, and what the backward reads goes through `save_for_backward`.
"""

from typing import Any, cast

import torch
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn

_AT_ONCE = 2**20
"""Weights that a processor brings to or from 8 bits at once: each needs fp32 numbers beside the result."""
_AT_ONCE_ON_CARD = 2**25


class EightBitLinear(Linear8bitLt):  # type: ignore[misc]
    """A linear layer with its weight in 8 bits; its class is what peft knows such a layer by."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, compute_dtype: torch.dtype | None) -> None:
        """Make it without memory.

        Args:
            inputs: Width of what it is given.
            outputs: Width of what it returns.
            bias: Whether it has one.
            compute_dtype: The format of its product; None for that of what it is given.
        """
        super().__init__(inputs, outputs, bias, has_fp16_weights=False, device="meta")
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return `[.., out]` for x `[.., in]`, in the format of x."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        codes, scales = held_in_eight_bits(self.weight)
        made: Any = cast(Any, _Product).apply(x.to(dtype), bias, codes, scales)
        return cast(Tensor, made.to(x.dtype))


class _Product(torch.autograd.Function):
    """`x @ W.T + bias` with a frozen W in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(codes, scales)
        return nn.functional.linear(x, dequantised(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        return gradient @ dequantised(codes, scales, gradient.dtype), None, None, None


def held_in_eight_bits(weight: Any) -> tuple[Tensor, Tensor]:
    """Return the codes `[out, in]` and the fp32 scales `[out]` of a weight in 8 bits."""
    return weight.data, weight.SCB


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight `[out, in]` as it is multiplied with.

    Args:
        codes: Whole numbers from -127 to 127, `[out, in]`.
        scales: The largest absolute weight of each row, fp32 `[out]`.
        dtype: The format of the result.
    """
    made = torch.empty_like(codes, dtype=dtype)
    factors = (scales * (1 / 127)).unsqueeze(1)
    # A card writes the 16-bit product at once; a processor makes it in fp32 first, so it is given a few rows.
    rows = len(codes) if codes.device.type == "cuda" else max(1, _AT_ONCE // codes.shape[1])
    for first in range(0, len(codes), rows):
        part = slice(first, first + rows)
        torch.mul(codes[part], factors[part], out=made[part])
    return made


def in_eight_bits(weight: Tensor) -> Int8Params:
    """Return a weight `[out, in]` in 8 bits, on its device, as bitsandbytes quantises it."""
    codes, scales = codes_and_scales(weight)
    return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


def codes_and_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes `[out, in]` and the fp32 scales `[out]` of a weight."""
    at_once = _AT_ONCE_ON_CARD if weight.device.type == "cuda" else _AT_ONCE
    rows = max(1, at_once // weight.shape[1])
    parts = [int8_vectorwise_quant(weight[first : first + rows].half())[:2] for first in range(0, len(weight), rows)]
    codes, scales = (torch.cat(list(some)) for some in zip(*parts, strict=True))
    return codes, scales


def eight_bit_layer(linear: nn.Module, compute_dtype: torch.dtype | None) -> EightBitLinear:
    """Return the layer in 8 bits that stands for a linear layer, without memory."""
    source: Any = linear
    made = EightBitLinear(
        source.in_features, source.out_features, bias=source.bias is not None, compute_dtype=compute_dtype
    )
    made.requires_grad_(False)
    made.source_cls = getattr(source, "source_cls", type(source))
    return made
