"""The forms in which a linear layer's weights can be held: as they are stored, in 4 bits, in 8 bits.

A 4-bit layer multiplies by what bitsandbytes dequantises, in the arithmetic of its input (fp32 here). It does not call
bitsandbytes' own 4-bit product: on CPUs with AVX512-BF16 that one repacks the weights at the first call.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn

from studio.jobs.base.load import FourBit

# It says at every call that fp32 inputs are cast; they are meant to be.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

_AT_ONCE = 2**18
"""Weights that are rounded at once: the temporaries of bitsandbytes' CPU code are five times their size."""
_NESTED_BLOCK = 256
"""Scales that share a second scale (bitsandbytes `quantize_4bit`, `compress_statistics`)."""
OUTLIER = 6.0
"""Activations from here on stay in 16 bit in LLM.int8() (its paper, and transformers' default)."""


class Stored(nn.Module):
    """A linear layer with its weight `[out, in]` as stored; it is cast when it is used."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = _frozen(weight), None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` of `[..., in]`."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class FourBits(nn.Module):
    """A linear layer with its weight in 4 bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quant: FourBit) -> None:
        super().__init__()
        self.packed, self.state = packed(weight, quant)
        self.bias = None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` of `[..., in]`."""
        return nn.functional.linear(x, self.rounded().to(x.dtype), self.bias)

    def rounded(self) -> Tensor:
        """Return the weight `[out, in]` that is really used, fp32."""
        back: Tensor = dequantize_4bit(self.packed, self.state)
        return back


class EightBits(nn.Module):
    """bitsandbytes' own LLM.int8() layer: weights and activations in 8 bits, outlying activations in 16.

    Which activations lie out depends on all tokens of a call: give it one row at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.inner = Linear8bitLt(
            columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=OUTLIER, device="meta"
        )
        self.inner.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
        if bias is not None:
            self.inner.bias = _frozen(bias)
        self.scales: Tensor = self.inner.weight.SCB
        self.inner.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` of `[..., in]`."""
        out: Tensor = self.inner(x)
        return out.to(x.dtype)

    def rounded(self) -> Tensor:
        """Return the weight `[out, in]` that is really used, fp32."""
        codes: Tensor = self.inner.weight.data if self.inner.state.CB is None else self.inner.state.CB
        return codes.float() * (self.scales.float().unsqueeze(1) / 127)


Layer = Stored | FourBits | EightBits


@dataclass(frozen=True, slots=True)
class Form:
    """A way to hold the linear layers of a model.

    Attributes:
        name: In reports and requests.
        make: From weight `[out, in]` and bias to the layer.
        bits: Per weight, scales included; 0 for what the files have.
        by_row: Whether the layer must see one row at a time.
    """

    name: str
    make: Callable[[Tensor, Tensor | None], Layer]
    bits: float = 0.0
    by_row: bool = False


def four_bits(name: str, quant: FourBit) -> Form:
    """Return the form of a 4-bit code: 4 bits a weight, and per 64 weights a scale of 32 bits, or nested ones of 8."""
    scale_bits = 8 / 64 + 32 / (64 * _NESTED_BLOCK) if quant.double_quant else 32 / 64
    return Form(name, lambda weight, bias: FourBits(weight, bias, quant), 4 + scale_bits)


STORED = Form("16-bit", Stored)
FORMS = {
    form.name: form
    for form in (
        STORED,
        four_bits("nf4", FourBit("nf4", double_quant=False)),
        four_bits("nf4+dq", FourBit("nf4", double_quant=True)),
        four_bits("fp4", FourBit("fp4", double_quant=False)),
        four_bits("fp4+dq", FourBit("fp4", double_quant=True)),
        Form("int8", EightBits, 8.0, by_row=True),
    )
}
"""All forms by name."""


def form_of_quant(quant: FourBit) -> Form:
    """Return the form that a recipe's 4-bit settings mean."""
    return FORMS[f"{quant.quant_type}{'+dq' if quant.double_quant else ''}"]


def packed(weight: Tensor, quant: FourBit) -> tuple[Tensor, QuantState]:
    """Return the 4-bit codes of a weight `[out, in]` and what dequantises them to fp32, as `quantize_4bit` gives them.

    A part at a time, since bitsandbytes' CPU code would hold several fp32 copies of the whole.
    """
    if weight.device.type != "cpu":
        made = quantize_4bit(
            weight.float().contiguous(), quant_type=quant.quant_type, compress_statistics=quant.double_quant
        )
        return made[0], made[1]
    parts = [
        quantize_4bit(part.float(), quant_type=quant.quant_type) for part in torch.split(weight.reshape(-1), _AT_ONCE)
    ]
    state: QuantState = parts[0][1]
    state.shape, state.absmax = weight.shape, torch.cat([part.absmax for _, part in parts])
    if quant.double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=_NESTED_BLOCK)
        state.nested = True
    return torch.cat([codes for codes, _ in parts]), state


def squared_norms(weight: Tensor, layer: Layer) -> tuple[float, float]:
    """Return the squared Frobenius norms of a layer's rounding error (0 where it is stored) and of its weight."""
    rounded = None if isinstance(layer, Stored) else layer.rounded()
    changed = whole = 0.0
    step = max(1, _AT_ONCE // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        exact = weight[first : first + step].to(torch.float32, copy=True)
        whole += float(exact.square().sum())
        if rounded is not None:
            changed += float(exact.sub_(rounded[first : first + step]).square_().sum())
    return changed, whole


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
