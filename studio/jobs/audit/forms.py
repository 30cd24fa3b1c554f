"""The forms in which a linear layer's weights can be held: as stored, in 4 bits, in 8 bits.

A 4-bit layer multiplies by weights that bitsandbytes dequantises, in the dtype of its input (fp32 here). It does not
call bitsandbytes' own 4-bit product, which on CPUs with AVX512-BF16 repacks the weights at the first call.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn

from studio.core.recipe import QuantType
from studio.jobs.base.eight_bit import codes_and_scales, dequantised
from studio.jobs.base.load import FourBit

# bitsandbytes logs at every int8 product that fp32 inputs are cast; here that is intended.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

_WEIGHTS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Weights of a layer that are cast or dequantised at once: on a CPU as many as stay in its caches. No fp32 copy of the
whole layer is ever made. Measured: not slower than one product, and the same bits."""
_NESTED_BLOCK = 256
"""Scales that share a second scale (bitsandbytes `quantize_4bit`, `compress_statistics`)."""
OUTLIER = 6.0
"""Activations of at least this size stay in 16 bit in LLM.int8() (its paper, and transformers' default)."""
BLOCK = 64
"""Weights that share a scale."""
AT_ONCE = 2**18
"""Weights that are quantised at once: what is computed from them stays in a core's cache."""
_CELLS = 1024
"""Cells of the grid over [-1, 1]. The bounds between codes lie further apart than a cell (FP4: .0052 and more)."""
_LEAST = 1e-38
"""The smallest scale that bitsandbytes divides by."""


class Unrounded(nn.Module):
    """A linear layer that keeps its weight `[out, in]` as stored and casts it when it is used."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = _frozen(weight), None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` of `[..., in]`."""
        if self.weight.dtype == x.dtype:
            return nn.functional.linear(x, self.weight, self.bias)
        return _linear(x, self.weight.shape, self.rows, self.bias)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return rows `[stop - first, in]` of the weight that is used, fp32."""
        return self.weight[first:stop].float()


class FourBits(nn.Module):
    """A linear layer with its weight in 4 bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quant: FourBit) -> None:
        super().__init__()
        self.codes, self.scales = packed(weight, quant)
        self.shape, self.quant_type = weight.shape, quant.quant_type
        self.bias = None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` of `[..., in]`."""
        return _linear(x, self.shape, self.rows, self.bias)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return rows `[stop - first, in]` of the weight that is used, fp32; `first` must be a block's beginning."""
        columns = self.shape[1]
        codes = self.codes[first * columns // 2 : -(-stop * columns // 2)]
        scales = self.scales[first * columns // BLOCK : -(-stop * columns // BLOCK)]
        state = QuantState(
            scales,
            shape=torch.Size((stop - first, columns)),
            code=get_4bit_type(self.quant_type, device=codes.device),
            blocksize=BLOCK,
            quant_type=self.quant_type,
            dtype=torch.float32,
        )
        back: Tensor = dequantize_4bit(codes, state)
        return back


class EightBits(nn.Module):
    """bitsandbytes' own LLM.int8() layer: weights and activations in 8 bits, outlier activations in 16.

    Which columns of the activations are outliers depends on all tokens of a call, so it is given one row at a time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.inner = Linear8bitLt(
            columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=OUTLIER, device="meta"
        )
        parts = [int8_vectorwise_quant(weight[a:b].half())[:2] for a, b in _slices(weight.shape, weight.device)]
        codes, self.scales = (torch.cat(list(some)) for some in zip(*parts, strict=True))
        self.inner.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=self.scales)
        if bias is not None:
            self.inner.bias = _frozen(bias)
        self.inner.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` of `[..., in]`."""
        out: Tensor = self.inner(x)
        return out.to(x.dtype)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return rows `[stop - first, in]` of the weight that is used, fp32."""
        codes: Tensor = self.inner.weight.data if self.inner.state.CB is None else self.inner.state.CB
        return codes[first:stop].float() * (self.scales[first:stop].float().unsqueeze(1) / 127)


class EightBitWeights(nn.Module):
    """A linear layer of a training's base with its weight in 8 bits: activations are not rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.codes, self.scales = codes_and_scales(weight)
        self.shape = weight.shape
        self.bias = None if bias is None else _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` of `[..., in]`."""
        return _linear(x, self.shape, self.rows, self.bias)

    def rows(self, first: int, stop: int) -> Tensor:
        """Return rows `[stop - first, in]` of the weight that is used, fp32."""
        return dequantised(self.codes[first:stop], self.scales[first:stop], torch.float32)


Layer = Unrounded | FourBits | EightBits | EightBitWeights


@dataclass(frozen=True, slots=True)
class Form:
    """A way to hold the linear layers of a model.

    Attributes:
        name: Its name in reports and requests.
        make: Makes the layer from weight `[out, in]` and bias `[out]`.
        bits: Bits of a weight with its share of the scales; 0 for the files' own format.
        by_row: Whether the layer must get one row at a time.
        quant: The 4-bit code, in which stacks of experts are held as well; None for other forms.
    """

    name: str
    make: Callable[[Tensor, Tensor | None], Layer]
    bits: float = 0.0
    by_row: bool = False
    quant: FourBit | None = None


def four_bits(name: str, quant: FourBit) -> Form:
    """Return the form of a 4-bit code.

    A weight takes 4 bits. Each 64 weights share a scale of 32 bits; with double quantisation it has 8 bits, and each
    256 scales share one of 32.
    """
    scale_bits = 8 / 64 + 32 / (64 * _NESTED_BLOCK) if quant.double_quant else 32 / 64
    return Form(name, lambda weight, bias: FourBits(weight, bias, quant), 4 + scale_bits, quant=quant)


UNROUNDED = Form("16-bit", Unrounded)
EIGHT_BIT_WEIGHTS = Form("int8 weights", EightBitWeights, 8.0)
"""What `model.precision` calls int8."""
FORMS = {
    form.name: form
    for form in (
        UNROUNDED,
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


def packed(weight: Tensor, quant: FourBit) -> tuple[Tensor, Tensor]:
    """Return bitsandbytes' 4-bit codes of a weight `[out, in]`, two a byte, and the fp32 scale of each 64 weights.

    With double quantisation the scales are quantised and dequantised again, as at every use of such a layer.
    """
    if weight.device.type == "cpu":
        codes, scales = codes_of(weight, quant.quant_type)
    else:
        codes, state = quantize_4bit(weight.float().contiguous(), quant_type=quant.quant_type)
        scales = state.absmax
    if quant.double_quant:
        offset = scales.mean()
        nested, state = quantize_blockwise(scales - offset, blocksize=_NESTED_BLOCK)
        scales = dequantize_blockwise(nested, state) + offset
    return codes, scales


def squared_norms(weight: Tensor, layer: Layer) -> tuple[float, float]:
    """Return the squared Frobenius norms of a layer's rounding error (0 if it is not quantised) and of its weight."""
    changed = whole = 0.0
    for first, stop in _slices(weight.shape, weight.device):
        exact = weight[first:stop].to(torch.float32, copy=True)
        whole += _squared(exact)
        if not isinstance(layer, Unrounded):
            changed += _squared(exact.sub_(layer.rows(first, stop)))
    return changed, whole


def _squared(tensor: Tensor) -> float:
    flat = tensor.view(-1)
    return float(torch.dot(flat, flat))


def _linear(x: Tensor, shape: torch.Size, rows: Callable[[int, int], Tensor], bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias`, `[..., out]`, with a weight that is computed some rows at a time."""
    flat = x.reshape(-1, shape[1])
    out = flat.new_empty(flat.shape[0], shape[0])
    for first, stop in _slices(shape, x.device):
        weight, part = rows(first, stop).to(x.dtype).t(), out[:, first:stop]
        if bias is None:
            torch.mm(flat, weight, out=part)
        else:
            torch.addmm(bias[first:stop], flat, weight, out=part)
    return out.view(*x.shape[:-1], shape[0])


def _slices(shape: torch.Size, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield parts of a weight as first row and the row after the last; each part begins at a block of 64 weights."""
    step = max(BLOCK, _WEIGHTS_AT_ONCE.get(device.type, 2**26) // shape[1] // BLOCK * BLOCK)
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Tables for finding the 4-bit code of a number in [-1, 1].

    Attributes:
        below: For each cell, the code below the bound in it, counted in order of the codes' values.
        bound: For each cell, the bound in it; 2, which nothing exceeds, where there is none.
        order: The code of each place in that order; None where the codes are in order already.
    """

    below: Tensor
    bound: Tensor
    order: Tensor | None


def codes_of(weight: Tensor, quant_type: QuantType) -> tuple[Tensor, Tensor]:
    """Return the codes, two a byte, `[weights / 2, 1]`, and the scales `[weights / 64]` of weights on a CPU.

    They are the same bits that bitsandbytes computes, several times as fast. bitsandbytes 0.50 finds the code of each
    weight by bisection among the 15 bounds between codes, which takes 17 of its 22 ns a weight (one core, AVX-512).
    Here a weight's cell on an even grid gives the code, after one comparison with the only bound that the cell can
    hold. All other arithmetic is the same. If a quick trial gives another result (with another version of the library),
    or the last block is shorter than 64, the library's own code is used.

    Args:
        weight: Any shape.
        quant_type: The code.
    """
    parts = [_codes(part.float(), quant_type) for part in torch.split(weight.reshape(-1), AT_ONCE)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])


def _codes(part: Tensor, quant_type: QuantType) -> tuple[Tensor, Tensor]:
    if part.numel() % BLOCK == 0 and _is_the_same(quant_type):
        found = _quick(part, quant_type)
        if found is not None:
            return found
    codes, state = quantize_4bit(part, quant_type=quant_type)
    return codes, state.absmax


def _quick(part: Tensor, quant_type: QuantType) -> tuple[Tensor, Tensor] | None:
    """Return codes and scales of fp32 weights in whole blocks; None where one is not finite."""
    grid, blocks = _grid(quant_type), part.view(-1, BLOCK)
    scales = torch.linalg.vector_norm(blocks, torch.inf, dim=-1)
    if not bool(torch.isfinite(scales).all()):
        return None
    scaled = (blocks * (1.0 / scales.clamp(min=_LEAST)).view(-1, 1)).clamp_(-1, 1).view(-1)
    cell = (scaled + 1.0).mul_(_CELLS / 2).to(torch.int32)
    above = scaled.gt(torch.index_select(grid.bound, 0, cell)).view(torch.uint8)
    codes = torch.index_select(grid.below, 0, cell).add_(above)
    if grid.order is not None:
        codes = torch.index_select(grid.order, 0, codes.to(torch.int32))
    return (codes[::2].bitwise_left_shift(4)).bitwise_or_(codes[1::2]).unsqueeze(1), scales


@cache
def _grid(quant_type: QuantType) -> _Grid:
    code: Tensor = get_4bit_type(quant_type, device=torch.device("cpu"))
    order = torch.argsort(code)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    cells = ((bounds + 1.0) * (_CELLS / 2)).to(torch.int64)
    if len(set(cells.tolist())) < len(bounds):
        raise ValueError("two bounds lie in one cell of the grid")
    bound = torch.full((_CELLS + 1,), 2.0)
    bound[cells] = bounds
    below = torch.searchsorted(cells, torch.arange(_CELLS + 1)).to(torch.uint8)
    sorted_already = torch.equal(order, torch.arange(len(code)))
    return _Grid(below, bound, None if sorted_already else order.to(torch.uint8))


@cache
def _is_the_same(quant_type: QuantType) -> bool:
    """Return whether the library gives the same bits on weights of every magnitude and around every bound."""
    made = torch.Generator().manual_seed(0)
    grid = _grid(quant_type)
    bounds = grid.bound[grid.bound < 2]
    around = torch.cat([bounds, *(torch.nextafter(bounds, torch.tensor(far)) for far in (-2.0, 2.0))])
    edges = torch.cat([around, torch.tensor([1.0, -1.0, 0.0]), torch.zeros(-(around.numel() + 3) % BLOCK)])
    edges = edges.view(-1, BLOCK)
    edges[:, 0] = 1.0
    random = torch.randn(256, BLOCK, generator=made) * 10.0 ** torch.randint(-30, 30, (256, 1), generator=made)
    trial = torch.cat([edges, random, torch.zeros(1, BLOCK)]).view(-1)
    own = _quick(trial, quant_type)
    codes, state = quantize_4bit(trial, quant_type=quant_type)
    return own is not None and torch.equal(own[0], codes) and torch.equal(own[1], state.absmax)
