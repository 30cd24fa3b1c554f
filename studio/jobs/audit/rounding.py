"""bitsandbytes' 4-bit codes on a CPU, bit for bit and several times as fast as its own code makes them.

bitsandbytes 0.50 looks every weight up among the 15 bounds between the codes by bisection, 17 of its 22 ns a weight
(one core, AVX-512). Here the weight's place on an even grid says the code, but for one comparison with the only bound
that can lie in that cell. Everything before and after is the same arithmetic. Where a quick trial shows another result
(another version of the library), or a block has no length of 64, the library's own code is used.
"""

from dataclasses import dataclass
from functools import cache

import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from torch import Tensor

from studio.core.recipe import QuantType

BLOCK = 64
"""Weights that share a scale."""
AT_ONCE = 2**18
"""Weights that are rounded at once: what is made of them stays in a core's cache."""
_CELLS = 1024
"""Of the grid over [-1, 1]; bounds lie further apart than a cell (FP4: .0052 and more)."""
_LEAST = 1e-38
"""bitsandbytes divides by no smaller scale."""


@dataclass(frozen=True, slots=True)
class _Grid:
    """For each cell: the code below the bound in it, and that bound (2 where there is none); FP4's order of codes."""

    below: Tensor
    bound: Tensor
    order: Tensor | None


def codes_of(weight: Tensor, quant_type: QuantType) -> tuple[Tensor, Tensor]:
    """Return the codes, two a byte, `[weights / 2, 1]`, and the scales `[weights / 64]` of weights on a CPU.

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
    """Return whether the library gives the same bits on weights of every size and around every bound."""
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
