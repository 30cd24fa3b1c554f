"""Merges a plain LoRA layer a few rows at a time, with the same bits as peft's fp32 sum, in a few megabytes.

peft holds the whole layer in fp32, and its delta twice. Here each block of rows stays in the processor's cache.
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
"""Blocks hold a multiple of so many rows: these had the whole product's bits for every shape tried (ranks 1 to 256)."""
_SUMMED = (torch.bfloat16, torch.float16, torch.float32)
_SMALLEST_PRODUCT = 2.0**-100
"""Smallest product of two fp32 numbers that is let through: every partial sum of such products is then a multiple of
2^-146, which fp32 can hold."""
_LARGEST_SUM = 2.0**120

Room = Callable[[int], memoryview]
"""Returns memory of so many bytes."""


class Way(Enum):
    """How rows of a product can be added to rows of a weight so that every bit is as in the whole sum."""

    AT_ONCE = "product and sum in one call"
    APART = "product first, then the sum"
    WHOLE = "only the whole product has these bits"


@dataclass(frozen=True, slots=True)
class RowSum:
    """A linear layer's weight and what is added to it.

    Attributes:
        key: The name of the weight in the base's files, `[out, in]`.
        dtype: dtype of the result.
        parts: For each adapter, in order, B `[out, rank]` and A `[rank, in]`, both fp32, and its scaling.
    """

    key: str
    dtype: torch.dtype
    parts: tuple[tuple[Tensor, Tensor, float], ...]


def is_plain(unit: Unit) -> bool:
    """Return whether a unit is a linear layer of which only the weight changes, by low-rank products."""
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
    """Return B, A and scaling of each of a plain unit's adapters, in the order in which peft merges them."""
    layer: Any = unit.wrapper
    return tuple(
        (layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach(), layer.scaling[name])
        for name in layer.active_adapters
        if name in layer.lora_A
    )


class RowSums:
    """Computes row sums. Whether a block has the bits of the whole product is tested once for each shape of a layer."""

    def __init__(self, files: TensorFiles) -> None:
        """Take the base's tensors."""
        self._files = files
        self._ways: dict[tuple[int, int, int], Way] = {}

    def can(self, sum_: RowSum) -> bool:
        """Return whether a sum by rows has every bit of peft's sum on this computer.

        The processor's library may add up the blocks of a product in another order than the whole product.
        """
        known = self._files.dtype(sum_.key) in _SUMMED
        return known and all(self._way(b, a) is not Way.WHOLE for b, a, _ in sum_.parts)

    @torch.no_grad()
    def blocks(self, sum_: RowSum, room: Room) -> Iterator[Tensor]:
        """Yield the merged weight as blocks of rows `[rows, in]`, in order.

        Args:
            sum_: What to compute.
            room: Returns the memory for each block.

        Raises:
            OSError: The base's file cannot be read.
        """
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
        """Scale B instead of the product, where that is exact and product and sum may be one call."""
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
        with one_thread():  # the blocks are computed so, and threads may change the order of a sum
            return _compare(whole, b, a, rows)


def _compare(whole: Tensor, b: Tensor, a: Tensor, rows: int) -> Way:
    # Stands for the base's weight: numbers as large as the product, so that every rounding of the sum shows.
    weight = whole[:rows].flip(0)
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
    """Return whether `(b * scaling) @ a` has the bits of `(b @ a) * scaling`.

    It does if the scaling is a power of two and no product or sum leaves the range of fp32.
    """
    if math.frexp(scaling)[0] != 0.5:  # the mantissa of every power of two
        return False
    smallest, largest = min(1.0, scaling), max(1.0, scaling) * b.shape[1]
    for factor in (b, a):
        sizes = factor.abs()
        sizes = sizes[sizes > 0]
        if sizes.numel():
            smallest, largest = smallest * float(sizes.min()), largest * float(sizes.max())
    return smallest >= _SMALLEST_PRODUCT and largest <= _LARGEST_SUM
