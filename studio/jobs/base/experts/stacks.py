"""Stacks: the 3-D weights in which transformers 5 holds all experts of a layer, and their 4-bit form.

bitsandbytes' own `replace_parameter_4bit` wants the whole stack in 16 bit and gives back the whole stack at every use.
Here a stack is quantised and dequantised a few experts at a time. Its bytes are the same as if it had been quantised
whole: the blocks that share a scale never cross from one expert to the next, as an expert has a multiple of 64 weights.
"""

import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
)
from bitsandbytes.nn import Params4bit
from torch import Tensor

from studio.core.vram.frozen import BLOCK, SCALE_BLOCK


class FourBitStack(Params4bit):  # type: ignore[misc]
    """A stack in 4 bits, packed as bitsandbytes does."""

    @property
    def ds_shape(self) -> torch.Size:
        """The shape of the weights: where a parameter has this, peft sizes an adapter by it (layer.py ParamWrapper)."""
        shape: torch.Size = self.quant_state.shape
        return shape


class Packing:
    """Quantises a stack, a few experts at a time."""

    def __init__(self, shape: torch.Size, *, quant_type: str, double_quant: bool) -> None:
        """Begin a stack.

        Args:
            shape: Of its weights, `[experts, .., ..]`.
            quant_type: The 4-bit code, nf4 or fp4.
            double_quant: Whether the scales are quantised too.
        """
        self._shape, self._quant_type, self._double_quant = shape, quant_type, double_quant
        self._weights = shape[1] * shape[2]
        self._packed: Tensor | None = None
        self._absmax: Tensor | None = None
        self._dtype = torch.bfloat16
        self._done = 0

    def add(self, experts: Tensor) -> None:
        """Quantise the next experts `[some, .., ..]`.

        Raises:
            ValueError: They are not of the stack's shape.
        """
        if experts.shape[1:] != self._shape[1:]:
            raise ValueError(f"experts of shape {tuple(experts.shape)} do not belong to a stack of {self._shape}")
        packed, state = quantize_4bit(
            experts.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type=self._quant_type
        )
        if self._packed is None or self._absmax is None:
            whole = self._shape.numel()
            self._packed = packed.new_empty((whole // 2, 1))
            self._absmax = state.absmax.new_empty(whole // BLOCK)
            self._dtype = experts.dtype
        first = self._done * self._weights
        stop = first + experts.numel()
        self._packed[first // 2 : stop // 2] = packed
        self._absmax[first // BLOCK : stop // BLOCK] = state.absmax
        self._done += experts.shape[0]

    def packed(self) -> tuple[Tensor, QuantState]:
        """Return the stack in 4 bits: its packed weights and its scales.

        Raises:
            ValueError: Experts are missing.
        """
        if self._packed is None or self._absmax is None or self._done != self._shape[0]:
            raise ValueError(f"{self._done} experts were given for a stack of {self._shape[0]}")
        state = QuantState(
            absmax=self._absmax,
            shape=self._shape,
            dtype=self._dtype,
            blocksize=BLOCK,
            code=get_4bit_type(self._quant_type, device=self._packed.device),
            quant_type=self._quant_type,
        )
        if self._double_quant:  # as bitsandbytes.functional.quantize_4bit does it for a whole tensor
            state.offset = self._absmax.mean()
            state.absmax, state.state2 = quantize_blockwise(self._absmax - state.offset, blocksize=SCALE_BLOCK)
            state.nested = True
        return self._packed, state


def four_bit_stack(packed: Tensor, state: QuantState) -> FourBitStack:
    """Return the parameter of a packed stack."""
    return FourBitStack(
        packed,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        bnb_quantized=True,
    )


def weights_of(stack: Tensor, first: int, stop: int) -> Tensor:
    """Return experts `[stop - first, .., ..]` of a stack, dequantised where it is in 4 bits."""
    state: QuantState | None = getattr(stack, "quant_state", None)
    if state is None:
        return stack[first:stop]
    weights = state.shape[1] * state.shape[2]
    begin, end = first * weights, stop * weights
    part = QuantState(
        absmax=_scales(state, begin // BLOCK, end // BLOCK),
        # A block a row: bitsandbytes 0.50 gives wrong numbers on a CPU where rows are no multiple of a block long.
        shape=torch.Size(((end - begin) // BLOCK, BLOCK)),
        dtype=state.dtype,
        blocksize=BLOCK,
        code=state.code,
        quant_type=state.quant_type,
    )
    made: Tensor = dequantize_4bit(stack.detach()[begin // 2 : end // 2], part)
    return made.view(stop - first, *state.shape[1:])


def _scales(state: QuantState, first: int, stop: int) -> Tensor:
    """Return scales in fp32; those quantised again share a scale with neighbours, which are dequantised with them."""
    held: Tensor = state.absmax
    if not state.nested:
        return held[first:stop]
    block, most = first // SCALE_BLOCK, -(-stop // SCALE_BLOCK)
    start = block * SCALE_BLOCK
    near = held[start : min(most * SCALE_BLOCK, held.numel())]
    wide: Tensor = dequantize_blockwise(
        near, absmax=state.state2.absmax[block:most], code=state.state2.code, blocksize=SCALE_BLOCK
    )
    wide += state.offset
    return wide[first - start : stop - start]


def packed_and_back(stack: Tensor, *, quant_type: str, double_quant: bool) -> Tensor:
    """Return a stack as it is after it was quantised and dequantised.

    Args:
        stack: `[experts, .., ..]`.
        quant_type: The 4-bit code.
        double_quant: Whether the scales are quantised too.
    """
    packing = Packing(stack.shape, quant_type=quant_type, double_quant=double_quant)
    for number in range(stack.shape[0]):
        packing.add(stack[number : number + 1])
    return weights_of(four_bit_stack(*packing.packed()), 0, stack.shape[0])
