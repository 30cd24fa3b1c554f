"""A plain LoRA layer merged a few rows at a time: peft's fp32 sum to the bit, in a few megabytes.

peft makes the whole layer in fp32, its delta twice; here a block of rows passes through the processor's cache once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from studio.jobs.base.threads import one_thread
from studio.jobs.base.weights.tensor_files import TensorFiles, block_rows
from studio.jobs.base.weights.units import Unit

_ROWS_APART = 16
"""Blocks of a multiple of this many rows gave the bits of the whole product for every shape tried (ranks 1 to 256)."""
_SUMMED = (torch.bfloat16, torch.float16, torch.float32)
_SMALLEST_PRODUCT = 2.0**-100
"""Of two fp32 numbers: every partial sum of such products is a multiple of 2^-146, which fp32 holds."""
_LARGEST_SUM = 2.0**120

Room = Callable[[int], memoryview]
"""Gives memory of so many bytes."""


class Way(Enum):
    """How the rows of a product may be added to those of a weight so that every bit is that of the whole sum."""

    AT_ONCE = "product and sum in one call"
    APART = "product first, then the sum"
    WHOLE = "only the whole product has these bits"


@dataclass(frozen=True, slots=True)
class RowSum:
    """A linear layer's weight and what is added to it.

    Attributes:
        key: The base's tensor, `[out, in]`.
        dtype: Of the result.
        parts: For each adapter in order: B `[out, rank]`, A `[rank, in]`, both fp32, and its scaling.
    """

    key: str
    dtype: torch.dtype
    parts: tuple[tuple[Tensor, Tensor, float], ...]


def is_plain(unit: Unit) -> bool:
    """Whether a unit is a linear layer to whose weight alone low-rank products are added."""
    wrapper: Any = unit.wrapper
    return (
        type(wrapper) is Linear
        and type(unit.inner) is nn.Linear
        and not wrapper.fan_in_fan_out
        and not wrapper.lora_variant
        and not any(wrapper.lora_bias.values())
        and unit.inner.weight.is_meta
    )


def parts_of(unit: Unit) -> tuple[tuple[Tensor, Tensor, float], ...]:
    """Return what a plain unit's adapters add, in the order in which peft merges them."""
    layer: Any = unit.wrapper
    return tuple(
        (layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach(), layer.scaling[name])
        for name in layer.active_adapters
        if name in layer.lora_A
    )


class RowSums:
    """Makes row sums; finds out once for each form of a layer whether a block has the bits of the whole product."""

    def __init__(self, files: TensorFiles) -> None:
        """Take the base's tensors."""
        self._files = files
        self._ways: dict[tuple[int, int, int], Way] = {}

    def can(self, sum_: RowSum) -> bool:
        """Whether this gives every bit of peft's sum on this computer.

        The blocks of a product can be summed in another order than the whole: that is up to the processor's library.
        """
        known = self._files.dtype(sum_.key) in _SUMMED
        return known and all(self._way(b, a) is not Way.WHOLE for b, a, _ in sum_.parts)

    @torch.no_grad()
    def blocks(self, sum_: RowSum, room: Room) -> Iterator[Tensor]:
        """Yield the merged weight as blocks of rows, in order, each in memory that `room` gives."""
        count, width = self._files.shape(sum_.key)
        rows = block_rows(count, width, _ROWS_APART)
        total, delta = torch.empty(rows, width), torch.empty(rows, width)
        parts = [self._scaled(*part) for part in sum_.parts]
        first = 0
        for block in self._files.row_blocks(sum_.key, rows):
            last = first + len(block)
            summed, added = total[: len(block)], delta[: len(block)]
            summed.copy_(block)
            for b, a, scaling in parts:
                if scaling is None:
                    torch.addmm(summed, b[first:last], a, out=summed)
                else:
                    torch.mm(b[first:last], a, out=added)
                    summed.add_(added.mul_(scaling))
            given = torch.frombuffer(room(summed.numel() * sum_.dtype.itemsize), dtype=sum_.dtype)
            yield given.view_as(summed).copy_(summed)
            first = last

    def _scaled(self, b: Tensor, a: Tensor, scaling: float) -> tuple[Tensor, Tensor, float | None]:
        """Scale B instead of the product where that is exact and both can be added at once."""
        if self._way(b, a) is Way.AT_ONCE and scales_exactly(b, a, scaling):
            return b * scaling, a, None
        return b, a, scaling

    @torch.no_grad()
    def _way(self, b: Tensor, a: Tensor) -> Way:
        form = (b.shape[0], b.shape[1], a.shape[1])
        if form not in self._ways:
            self._ways[form] = self._find_way(b, a)
        return self._ways[form]

    def _find_way(self, b: Tensor, a: Tensor) -> Way:
        whole, rows = b @ a, block_rows(b.shape[0], a.shape[1], _ROWS_APART)
        with one_thread():  # as the blocks are made
            return _compare(whole, b, a, rows)


def _compare(whole: Tensor, b: Tensor, a: Tensor, rows: int) -> Way:
    weight = whole[:rows].flip(0)  # numbers as large as what is added show every rounding
    way, made = Way.AT_ONCE, torch.empty_like(weight)
    for first in range(0, b.shape[0], rows):
        block, product = b[first : first + rows], whole[first : first + rows]
        to, out = weight[: len(block)], made[: len(block)]
        if not torch.equal(torch.mm(block, a, out=out), product):
            return Way.WHOLE
        if way is Way.AT_ONCE and not torch.equal(torch.addmm(to, block, a, out=out), product.add_(to)):
            way = Way.APART
    return way


def scales_exactly(b: Tensor, a: Tensor, scaling: float) -> bool:
    """Whether `(b * scaling) @ a` has the bits of `(b @ a) * scaling`: a power of two, all within fp32."""
    if math.frexp(scaling)[0] != 0.5:
        return False
    smallest, largest = min(1.0, scaling), max(1.0, scaling) * b.shape[1]
    for factor in (b, a):
        sizes = factor.abs()
        sizes = sizes[sizes > 0]
        if sizes.numel():
            smallest, largest = smallest * float(sizes.min()), largest * float(sizes.max())
    return smallest >= _SMALLEST_PRODUCT and largest <= _LARGEST_SUM
