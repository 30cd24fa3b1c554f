"""The bytes that are there all the time: frozen weights, adapters, their gradients and the optimizer's state."""

from dataclasses import dataclass
from functools import lru_cache

from studio.core.shape import Linear, ModelShape
from studio.core.trainable import AdaptedPart, trainable_parameters, trained_tensors

ALIGNMENT = 512
"""The CUDA caching allocator rounds every request up to this (c10/cuda/CUDACachingAllocator.cpp kMinBlockSize)."""

_BLOCK = 64
"""Weights that share one scale: bitsandbytes' default block size."""

_SCALE_BLOCK = 256
"""Scales that share one scale of scales with double quantisation (bitsandbytes functional.quantize_4bit)."""

_CODE_BYTES = {True: 512 + 1024 + 512, False: 512}
"""Per weight: the 16-entry table; with double quantisation also the 256-entry table and the offset."""

_PAGED_FROM = 100_000
"""Elements from which bitsandbytes pages a state tensor (optim/optimizer.py get_state_buffer)."""

_EIGHT_BIT_FROM = 4096
"""Elements from which bitsandbytes keeps a state in 8 bits (min_8bit_size)."""


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """State that stays on the device, and state in unified memory that may be paged to the host."""

    resident: int
    paged: int


def _aligned(size: float) -> int:
    return -(-int(size) // ALIGNMENT) * ALIGNMENT


def quantised_bytes(linear: Linear, double_quant: bool) -> int:
    """Return the bytes of one 4-bit weight with its scales and tables.

    0.515869 bytes per weight with double quantisation, 0.5625 without (QLoRA paper: 0.127 bits per parameter against
    0.5).
    """
    scales = -(-linear.inputs * linear.outputs // _BLOCK)
    packed = _aligned(-(-linear.inputs * linear.outputs // 2))
    if not double_quant:
        return packed + _aligned(4 * scales) + _CODE_BYTES[False]
    return packed + _aligned(scales) + _aligned(4 * -(-scales // _SCALE_BLOCK)) + _CODE_BYTES[True]


@lru_cache(maxsize=256)
def base_bytes(shape: ModelShape, quantised: bool, double_quant: bool, itemsize: int, compute: int) -> int:
    """Return the bytes of the frozen weights.

    Args:
        shape: The model.
        quantised: Whether linear maps are 4-bit. Fused experts never are: bitsandbytes converts `nn.Linear` only.
        double_quant: Whether scales are quantised again.
        itemsize: Bytes of a weight that is not quantised.
        compute: Bytes of a quantised layer's bias, which bitsandbytes casts to the compute type.
    """
    if not quantised:
        return shape.parameters * itemsize
    linears = list(shape.all_linears())
    packed = sum(count * linear.copies * quantised_bytes(linear, double_quant) for count, linear in linears)
    biases = sum(count * linear.biases for count, linear in linears)
    weights = sum(count * linear.weights for count, linear in linears)
    return packed + biases * compute + (shape.parameters - weights - biases) * itemsize


@lru_cache(maxsize=1024)
def adapter_parameters(shape: ModelShape, part: AdaptedPart) -> int:
    """Return the number of trained parameters."""
    return trainable_parameters(shape, part)


@lru_cache(maxsize=1024)
def optimizer_bytes(shape: ModelShape, part: AdaptedPart, optimizer: str) -> OptimizerBytes:
    """Return the bytes of AdamW's two moments, tensor by tensor as bitsandbytes decides."""
    resident = paged = 0
    for count, elements in trained_tensors(shape, part):
        state = _moments(elements, optimizer) * count
        if optimizer.startswith("paged") and elements >= _PAGED_FROM:
            paged += state
        else:
            resident += state
    return OptimizerBytes(resident, paged)


def _moments(elements: int, optimizer: str) -> int:
    if "8bit" not in optimizer or elements < _EIGHT_BIT_FROM:
        return 2 * _aligned(4 * elements)
    return 2 * (_aligned(elements) + _aligned(4 * -(-elements // 256)))
