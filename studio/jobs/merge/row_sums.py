"""A plain LoRA layer merged a few rows at a time: peft's fp32 sum to the bit, in a few megabytes.

peft makes the whole layer in fp32, its delta twice; here a block of rows passes through the processor's cache once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.base.weights.units import Unit

_BLOCK_ELEMENTS = 2**18
"""1 MiB in fp32; a second core's cache holds block and delta."""
_ROWS_APART = 16
"""Blocks of a multiple of this many rows gave the bits of the whole product for every shape tried (ranks 1 to 256)."""
_SUMMED = (torch.bfloat16, torch.float16, torch.float32)


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
        self._exact: dict[tuple[int, int, int], bool] = {}

    def can(self, sum_: RowSum) -> bool:
        """Whether this gives every bit of peft's sum on this computer.

        The blocks of a product can be summed in another order than the whole: that is up to the processor's library.
        """
        return self._files.tensors[sum_.key].dtype in _SUMMED and all(self._is_exact(b, a) for b, a, _ in sum_.parts)

    @torch.no_grad()
    def blocks(self, sum_: RowSum) -> Iterator[Tensor]:
        """Yield the merged weight as blocks of rows, in order; a block is only good until the next one."""
        count, width = self._files.tensors[sum_.key].entry.shape
        rows = _rows_of(count, width)
        total, delta = torch.empty(rows, width), torch.empty(rows, width)
        cast = torch.empty(rows, width, dtype=sum_.dtype)
        first = 0
        for block in self._files.row_blocks(sum_.key, rows):
            last = first + len(block)
            summed, added, given = (whole[: len(block)] for whole in (total, delta, cast))
            summed.copy_(block)
            for b, a, scaling in sum_.parts:
                torch.mm(b[first:last], a, out=added)
                summed.add_(added.mul_(scaling))
            yield given.copy_(summed)
            first = last

    def _is_exact(self, b: Tensor, a: Tensor) -> bool:
        form = (b.shape[0], b.shape[1], a.shape[1])
        if form not in self._exact:
            whole, rows = b @ a, _rows_of(b.shape[0], a.shape[1])
            starts = range(0, b.shape[0], rows)
            self._exact[form] = all(torch.equal(b[at : at + rows] @ a, whole[at : at + rows]) for at in starts)
        return self._exact[form]


def _rows_of(count: int, width: int) -> int:
    return min(count, max(1, _BLOCK_ELEMENTS // max(1, width) // _ROWS_APART) * _ROWS_APART)
