"""The bytes of the frozen weights: how each linear map is held, what that takes, and what of it may wait elsewhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from studio.core.direct_weights import kept_16bit
from studio.core.layer_parts import Linear
from studio.core.layer_precision import (
    FOUR_BIT,
    INT8,
    PRECISIONS,
    SIXTEEN_BIT,
    LayerPrecision,
    Table,
    precision_of,
)
from studio.core.placement.streaming import BUFFERS, streamed_layers
from studio.core.shape import Layer, ModelShape
from studio.core.trainable import ATTENTION, MLP
from studio.core.vram.setup import Setup

ALIGNMENT = 512
"""The CUDA caching allocator rounds every request up to this (c10/cuda/CUDACachingAllocator.cpp kMinBlockSize)."""

BLOCK = 64
"""Weights that share one scale: bitsandbytes' default block size."""

SCALE_BLOCK = 256
"""Scales that share one scale of scales with double quantisation (bitsandbytes functional.quantize_4bit)."""

_CODE_BYTES = {False: (64,), True: (64, 1024, 4)}
"""Bytes of the tables beside one 4-bit weight tensor, without and with double quantisation: 16 entries in fp32; with it
also a copy of the 256 entries by which the scales are quantised, and the scales' offset."""


@dataclass(frozen=True, slots=True)
class FrozenForm:
    """How the frozen weights are held.

    Attributes:
        quant_type: nf4, fp4 or int8; empty where linear maps are not quantised.
        double_quant: Whether 4-bit scales are quantised again.
        itemsize: Bytes of a weight that is not quantised.
        embedding_itemsize: The same for embedding and head, which may go back to 16 bit alone.
        compute: Bytes per element of a quantised layer's bias, which bitsandbytes casts to the compute type.
        precision: Which linear maps are held in other bits than the others (`studio.core.layer_precision`).
        alignment: What an allocation is rounded up to, in bytes; 1 on a CPU.
        packs_experts: Whether fused experts are quantised with the linear maps.
        streamed: How many layers are streamed, at most.
    """

    quant_type: str
    double_quant: bool
    itemsize: int
    embedding_itemsize: int
    compute: int
    precision: Table = ()
    alignment: int = ALIGNMENT
    packs_experts: bool = False
    streamed: int = 0


@lru_cache(maxsize=256)
def frozen_form(setup: Setup) -> FrozenForm:
    """Return how a kind of set-up holds the frozen weights."""
    return FrozenForm(
        setup.quant_type if setup.quantised else "",
        setup.double_quant,
        setup.residual_itemsize,
        setup.embedding_itemsize,
        setup.compute_itemsize,
        setup.precision if setup.quantised else (),
        1 if setup.device == "cpu" else ALIGNMENT,
        setup.packs_experts,
        setup.streamed,
    )


def aligned(size: float, alignment: int = ALIGNMENT) -> int:
    """Return a number of bytes rounded up as an allocation is."""
    return -(-int(size) // alignment) * alignment


class HeldLinear(NamedTuple):
    """A linear map as it is held in some layers.

    Attributes:
        layers: In how many layers.
        linear: The map, or a stack of experts as one.
        precision: In how many bits.
    """

    layers: int
    linear: Linear
    precision: LayerPrecision


def quantised_parts(linear: Linear, form: FrozenForm, precision: LayerPrecision = FOUR_BIT) -> tuple[int, ...]:
    """Return the bytes of the tensors that one quantised weight becomes: packed weights, scales, tables.

    In 4 bits 0.515869 bytes per weight with double quantisation, 0.5625 without (QLoRA paper: 0.127 bits per parameter
    against 0.5); in 8 bits a byte and one fp32 scale per output (bitsandbytes functional.int8_vectorwise_quant).
    """
    weights = linear.inputs * linear.outputs
    if INT8 in (form.quant_type, precision):
        sizes: tuple[int, ...] = (weights, 4 * linear.outputs)
    else:
        scales = -(-weights // BLOCK)
        blocks = -(-scales // SCALE_BLOCK)
        held = (scales, 4 * blocks) if form.double_quant else (4 * scales,)
        sizes = (-(-weights // 2), *held, *_CODE_BYTES[form.double_quant])
    return tuple(aligned(size, form.alignment) for size in sizes)


def parts_of(held: HeldLinear, form: FrozenForm) -> tuple[int, ...]:
    """Return the bytes of the tensors in which one copy of a linear map is held."""
    linear = held.linear
    if held.precision == SIXTEEN_BIT:
        return (linear.inputs * linear.outputs * form.itemsize,)
    return quantised_parts(linear, form, held.precision)


@lru_cache(maxsize=256)
def held_linears(shape: ModelShape, form: FrozenForm, without: frozenset[int] = frozenset()) -> tuple[HeldLinear, ...]:
    """Return every linear map of the layers, and how it is held.

    Args:
        shape: The model.
        form: How the frozen weights are held.
        without: Numbers of layers that are left out.
    """
    return tuple(held for held in _each_linear(shape, form, without) if held.layers)


def _each_linear(shape: ModelShape, form: FrozenForm, without: frozenset[int]) -> Iterator[HeldLinear]:
    kept = kept_16bit(shape.family) if form.quant_type else frozenset[str]()
    for kind, group in enumerate(shape.groups):
        numbers = [number for number, each in enumerate(shape.kinds) if each == kind and number not in without]
        for linear in group.layer.linears:
            paths = paths_of(group.layer, linear)
            if not form.quant_type or linear.name in kept:
                yield HeldLinear(len(numbers), linear, SIXTEEN_BIT)
            elif not form.precision:
                yield HeldLinear(len(numbers), linear, FOUR_BIT)
            else:
                words = [precision_of(form.precision, number, *paths) for number in numbers]
                yield from (HeldLinear(words.count(word), linear, word) for word in PRECISIONS)


def _outer(shape: ModelShape, form: FrozenForm) -> Iterator[HeldLinear]:
    """Yield every linear map outside of layers but the head, and how it is held."""
    kept = kept_16bit(shape.family)
    for linear in shape.outer:
        plain = not form.quant_type or linear.name in kept
        yield HeldLinear(1, linear, SIXTEEN_BIT if plain else precision_of(form.precision, None, (linear.name,)))


@lru_cache(maxsize=256)
def held_stacks(shape: ModelShape, form: FrozenForm, without: frozenset[int] = frozenset()) -> tuple[HeldLinear, ...]:
    """Return every stack of routed experts, and how it is held: in 4 bits or 16.

    A stack stays in 16 bit where weights of two experts would share a scale.
    """
    found = []
    for kind, group in enumerate(shape.groups):
        numbers = [number for number, each in enumerate(shape.kinds) if each == kind and number not in without]
        for stack in stacks_of(shape, group.layer):
            packs = form.packs_experts and stack.inputs * stack.outputs % BLOCK == 0
            packed = packs * sum(_stack_precision(form, number, stack) == FOUR_BIT for number in numbers)
            found.append(HeldLinear(packed, _whole(stack), FOUR_BIT))
            found.append(HeldLinear(len(numbers) - packed, _whole(stack), SIXTEEN_BIT))
    return tuple(held for held in found if held.layers)


def packs_stacks(shape: ModelShape, form: FrozenForm) -> bool:
    """Whether any stack of routed experts is in 4 bits, or `model.precision` does not say otherwise."""
    return not form.precision or any(held.precision == FOUR_BIT for held in held_stacks(shape, form))


def _stack_precision(form: FrozenForm, number: int, stack: Linear) -> LayerPrecision:
    return precision_of(form.precision, number, *places(MLP, stack.name)) if form.precision else FOUR_BIT


def _whole(stack: Linear) -> Linear:
    """Return a stack as one matrix: all of its experts share their tables."""
    return Linear(stack.name, stack.inputs * stack.copies, stack.outputs)


_ALSO = {ATTENTION: ("attn", "attention", "self_attention"), MLP: ("feed_forward", "block_sparse_moe", "ffn")}
"""What other families call these parts of a layer. Which one a family has is not known here: all are understood."""


def places(block: str, name: str) -> tuple[tuple[str, ...], ...]:
    """Return the paths inside a layer that a module may have which a part of the layer has by name."""
    return tuple((place, *name.split(".")) for place in (block, *_ALSO.get(block, ())))


def paths_of(layer: Layer, linear: Linear) -> tuple[tuple[str, ...], ...]:
    """Return the paths that a linear map may have inside its layer."""
    if layer.mixer and linear in layer.mixer.linears:
        return places(layer.mixer.place, linear.name)
    return places(ATTENTION if linear in layer.attention else MLP, linear.name)


@lru_cache(maxsize=256)
def everywhere_plain(shape: ModelShape, form: FrozenForm) -> frozenset[str]:
    """Return the names of the linear maps that `model.precision` keeps in 16 bit in every layer."""
    if not form.precision:
        return frozenset()
    held = held_linears(shape, form)
    return frozenset(one.linear.name for one in held) - {
        one.linear.name for one in held if one.precision != SIXTEEN_BIT
    }


@lru_cache(maxsize=256)
def base_bytes(shape: ModelShape, form: FrozenForm) -> int:
    """Return the bytes of the frozen weights."""
    tables = shape.buffers * form.compute + shape.mask_bytes
    if not form.quant_type:
        return shape.parameters * form.itemsize + tables
    every = (*held_linears(shape, form), *_outer(shape, form))
    linears = [held for held in every if held.precision != SIXTEEN_BIT]
    stacks = [held for held in held_stacks(shape, form) if held.precision != SIXTEEN_BIT]
    packed = sum(held.layers * held.linear.copies * sum(parts_of(held, form)) for held in (*linears, *stacks))
    biases = sum(held.layers * held.linear.biases for held in linears)
    weights = sum(held.layers * held.linear.weights for held in (*linears, *stacks))
    embeddings = shape.embedding_parameters + shape.head_parameters
    rest = shape.parameters - weights - biases - embeddings
    return packed + biases * form.compute + rest * form.itemsize + embeddings * form.embedding_itemsize + tables


@dataclass(frozen=True, slots=True)
class StreamedBytes:
    """What a streamed base has in main memory instead of on the card.

    Attributes:
        left: What the frozen weights take less on the card.
        buffers: What the buffers take there, through which streamed layers pass.
        host: What waits in main memory.
        layers: Numbers of the streamed layers.
    """

    left: int = 0
    buffers: int = 0
    host: int = 0
    layers: frozenset[int] = frozenset()


@lru_cache(maxsize=256)
def streamed_bytes(shape: ModelShape, form: FrozenForm, looked_up: bool = True) -> StreamedBytes:
    """Return what streaming moves to main memory: the matrices of layers, and an embedding that is looked up there.

    Args:
        shape: The model.
        form: How the frozen weights are held.
        looked_up: Whether the input embedding is frozen, so that it may wait, too; one that is the head's stays.
    """
    numbers = streamed_layers(form.streamed, shape.layers)
    if not numbers:
        return StreamedBytes()
    sizes = [_matrices_of(shape, form, number) for number in numbers]
    waits = looked_up and not shape.tied
    embedding = shape.embedding_parameters * form.embedding_itemsize if waits else 0
    return StreamedBytes(
        left=sum(held for held, _ in sizes) + embedding,
        buffers=min(BUFFERS, len(numbers)) * max(packed for _, packed in sizes),
        host=sum(packed for _, packed in sizes) + embedding,
        layers=frozenset(numbers),
    )


def _of_layer(shape: ModelShape, form: FrozenForm, number: int) -> tuple[HeldLinear, ...]:
    others = frozenset(range(shape.layers)) - {number}
    return (*held_linears(shape, form, others), *held_stacks(shape, form, others))


def layer_bytes(shape: ModelShape, form: FrozenForm, number: int) -> int:
    """Return the bytes of a layer's matrices, as `base_bytes` counts them."""
    return _matrices_of(shape, form, number)[0]


def layer_shares(shape: ModelShape, form: FrozenForm, number: int) -> dict[LayerPrecision, float]:
    """Return the share of a layer's matrices that is held in each precision."""
    shares = dict.fromkeys(PRECISIONS, 0.0)
    held = _of_layer(shape, form, number)
    whole = max(1, sum(one.linear.weights for one in held))
    for one in held:
        shares[one.precision] += one.linear.weights / whole
    return shares


def _matrices_of(shape: ModelShape, form: FrozenForm, number: int) -> tuple[int, int]:
    """Return the bytes of a layer's matrices as `base_bytes` counts them, and packed one behind the other."""
    parts = [(one.linear.copies, parts_of(one, form)) for one in _of_layer(shape, form, number)]
    alone = sum(copies * sum(sizes) for copies, sizes in parts)
    return alone, sum(copies * sum(map(aligned, sizes)) for copies, sizes in parts)


@dataclass(frozen=True, slots=True)
class Held:
    """How much of the frozen weights is in fewer bits.

    Attributes:
        kept_16bit_bytes: Bytes of the weights that are not quantised: embedding, head, norms, routers, what
            `model.precision` keeps.
        four_bit_share: Share of the weights of linear maps and routed experts inside the layers that is in 4 bits;
            head and routers are not among them.
        eight_bit_share: The same for 8 bits.
    """

    kept_16bit_bytes: int
    four_bit_share: float
    eight_bit_share: float = 0.0


@lru_cache(maxsize=256)
def held_of(shape: ModelShape, form: FrozenForm) -> Held:
    """Return how much of the frozen weights is in fewer bits, and how many bytes are not."""
    if not form.quant_type:
        return Held(shape.parameters * form.itemsize, 0.0)
    linears, stacks = (*held_linears(shape, form), *_outer(shape, form)), held_stacks(shape, form)
    every = sum(held.layers * held.linear.weights for held in (*linears, *stacks))
    packed = dict.fromkeys(PRECISIONS, 0)
    for held in (*linears, *stacks):
        eight = form.quant_type == INT8 and held.precision == FOUR_BIT
        packed[INT8 if eight else held.precision] += held.layers * held.linear.weights
    biases = sum(held.layers * held.linear.biases for held in linears if held.precision != SIXTEEN_BIT)
    embeddings = shape.embedding_parameters + shape.head_parameters
    kept = (shape.parameters - packed[FOUR_BIT] - packed[INT8] - biases - embeddings) * form.itemsize
    kept += biases * form.compute + embeddings * form.embedding_itemsize
    return Held(kept, packed[FOUR_BIT] / max(1, every), packed[INT8] / max(1, every))


def stacks_of(shape: ModelShape, layer: Layer) -> tuple[Linear, ...]:
    """Return the stacks of routed experts in a layer."""
    return layer.experts.stacks(shape.hidden) if layer.experts and not layer.expert_maps else ()
