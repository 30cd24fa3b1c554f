"""The bytes that are there all the time: frozen weights, adapters, their gradients and the optimizer's state."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from studio.core.direct_weights import kept_16bit
from studio.core.layer_parts import Linear
from studio.core.placement.streaming import BUFFERS, streamed_layers
from studio.core.shape import EXPERTS_DOWN, EXPERTS_UP, Layer, ModelShape
from studio.core.trainable import ATTENTION, MLP, AdaptedPart, target_names, trained_tensors, whole_tensors
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

_PAGED_FROM = 100_000
"""Elements from which bitsandbytes pages a state tensor (optim/optimizer.py get_state_buffer)."""

_EIGHT_BIT_FROM = 4096
"""Elements from which bitsandbytes keeps a state in 8 bits (min_8bit_size)."""


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """The optimizer's state.

    Attributes:
        resident: What stays on the device.
        paged: What lies in unified memory and may be paged to the host.
        spared: A tensor just below bitsandbytes' threshold has its state in 32 bits, which takes more than a slightly
            larger tensor's in 8 bits. This is that difference, summed over the tensors with 8-bit state: a smaller rank
            may need so much more. At most 24 504 bytes per tensor.
    """

    resident: int
    paged: int
    spared: int


@dataclass(frozen=True, slots=True)
class FrozenForm:
    """How the frozen weights are held.

    Attributes:
        quant_type: nf4, fp4 or int8; empty where linear maps are not quantised.
        double_quant: Whether 4-bit scales are quantised again.
        itemsize: Bytes of a weight that is not quantised.
        embedding_itemsize: The same for embedding and head, which may go back to 16 bit alone.
        compute: Bytes per element of a quantised layer's bias, which bitsandbytes casts to the compute type.
        skipped: Modules that stay in 16 bit though others are quantised.
        alignment: What an allocation is rounded up to, in bytes; 1 on a CPU.
        packs_experts: Whether fused experts are quantised with the linear maps.
        streamed: How many layers are streamed, at most.
    """

    quant_type: str
    double_quant: bool
    itemsize: int
    embedding_itemsize: int
    compute: int
    skipped: tuple[str, ...] = ()
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
        setup.skip_modules,
        1 if setup.device == "cpu" else ALIGNMENT,
        setup.packs_experts,
        setup.streamed,
    )


def _aligned(size: float, alignment: int = ALIGNMENT) -> int:
    return -(-int(size) // alignment) * alignment


def quantised_parts(linear: Linear, form: FrozenForm) -> tuple[int, ...]:
    """Return the bytes of the tensors that one quantised weight becomes: packed weights, scales, tables.

    In 4 bits 0.515869 bytes per weight with double quantisation, 0.5625 without (QLoRA paper: 0.127 bits per parameter
    against 0.5); in 8 bits a byte and one fp32 scale per output (bitsandbytes functional.int8_vectorwise_quant).
    """
    weights = linear.inputs * linear.outputs
    if form.quant_type == "int8":
        sizes: tuple[int, ...] = (weights, 4 * linear.outputs)
    else:
        scales = -(-weights // BLOCK)
        blocks = -(-scales // SCALE_BLOCK)
        held = (scales, 4 * blocks) if form.double_quant else (4 * scales,)
        sizes = (-(-weights // 2), *held, *_CODE_BYTES[form.double_quant])
    return tuple(_aligned(size, form.alignment) for size in sizes)


@lru_cache(maxsize=256)
def base_bytes(shape: ModelShape, form: FrozenForm) -> int:
    """Return the bytes of the frozen weights."""
    tables = shape.buffers * form.compute + shape.mask_bytes
    if not form.quant_type:
        return shape.parameters * form.itemsize + tables
    linears = list(_quantised_linears(shape, form.skipped))
    packed = sum(count * linear.copies * sum(quantised_parts(linear, form)) for count, linear in linears)
    biases = sum(count * linear.biases for count, linear in linears)
    weights = sum(count * linear.weights for count, linear in linears)
    for count, stack in _packed_stacks(shape, form):
        packed += count * sum(quantised_parts(_whole(stack), form))
        weights += count * stack.weights
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
        layers: How many layers of each of `shape.groups` are streamed.
    """

    left: int = 0
    buffers: int = 0
    host: int = 0
    layers: tuple[int, ...] = ()


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
        layers=tuple(sum(shape.kinds[number] == kind for number in numbers) for kind in range(len(shape.groups))),
    )


def _matrices_of(shape: ModelShape, form: FrozenForm, number: int) -> tuple[int, int]:
    """Return the bytes of a layer's matrices as `base_bytes` counts them, and packed one behind the other."""
    layer = shape.groups[shape.kinds[number]].layer
    names, kept = frozenset(form.skipped), kept_16bit(shape.family)
    alone = packed = 0

    def add(matrix: Linear, copies: int, quantised: bool) -> None:
        nonlocal alone, packed
        plain = matrix.inputs * matrix.outputs * form.itemsize
        parts = quantised_parts(matrix, form) if quantised else (plain,)
        alone += copies * sum(parts)
        packed += copies * sum(map(_aligned, parts))

    for linear in layer.linears:
        skipped = _is_skipped(f"model.layers.{number}.{_block_of(layer, linear)}.{linear.name}", names)
        add(linear, linear.copies, bool(form.quant_type) and linear.name not in kept and not skipped)
    if layer.experts and not layer.expert_maps:
        for stack in layer.experts.stacks(shape.hidden):
            packs = form.packs_experts and stack.inputs * stack.outputs % BLOCK == 0
            skipped = _is_skipped(f"model.layers.{number}.{MLP}.{stack.name}", names)
            add(_whole(stack), 1, packs and not skipped)
    return alone, packed


@dataclass(frozen=True, slots=True)
class Held:
    """How much of the frozen weights is in fewer bits.

    Attributes:
        kept_16bit_bytes: Bytes of the weights that are not quantised: embedding, head, norms, routers, what is skipped.
        four_bit_share: Share of the weights of linear maps and routed experts inside the layers that is in 4 bits;
            head and routers are not among them.
    """

    kept_16bit_bytes: int
    four_bit_share: float


@lru_cache(maxsize=256)
def held_of(shape: ModelShape, form: FrozenForm) -> Held:
    """Return how much of the frozen weights is in fewer bits, and how many bytes are not."""
    stacks = [] if any(group.layer.expert_maps for group in shape.groups) else list(_stacks(shape))
    every = sum(count * linear.weights for count, linear in (*shape.all_linears(), *stacks))
    if not form.quant_type:
        return Held(shape.parameters * form.itemsize, 0.0)
    linears = list(_quantised_linears(shape, form.skipped))
    packed = sum(count * linear.weights for count, linear in (*linears, *_packed_stacks(shape, form)))
    biases = sum(count * linear.biases for count, linear in linears)
    embeddings = shape.embedding_parameters + shape.head_parameters
    kept = (shape.parameters - packed - biases - embeddings) * form.itemsize
    kept += biases * form.compute + embeddings * form.embedding_itemsize
    return Held(kept, 0.0 if form.quant_type == "int8" else packed / max(1, every))


def _stacks(shape: ModelShape) -> Iterator[tuple[int, Linear]]:
    for group in shape.groups:
        if group.layer.experts and not group.layer.expert_maps:
            for stack in group.layer.experts.stacks(shape.hidden):
                yield group.count, stack


def _packed_stacks(shape: ModelShape, form: FrozenForm) -> Iterator[tuple[int, Linear]]:
    """Yield the stacks of routed experts, after the number of layers in which they are quantised.

    A stack stays in 16 bit where weights of two experts would share a scale.
    """
    if not form.packs_experts:
        return
    names = frozenset(form.skipped)
    for kind, group in enumerate(shape.groups):
        if group.layer.experts and not group.layer.expert_maps:
            layers = [index for index, each in enumerate(shape.kinds) if each == kind]
            for stack in group.layer.experts.stacks(shape.hidden):
                if stack.inputs * stack.outputs % BLOCK == 0:
                    taken = (not _is_skipped(f"model.layers.{index}.{MLP}.{stack.name}", names) for index in layers)
                    yield sum(taken) if names else group.count, stack


def _whole(stack: Linear) -> Linear:
    """Return a stack as one matrix: all of its experts share their tables."""
    return Linear(stack.name, stack.inputs * stack.copies, stack.outputs)


def _quantised_linears(shape: ModelShape, skipped: tuple[str, ...]) -> Iterator[tuple[int, Linear]]:
    """Yield every linear map, after the number of layers in which it is quantised.

    A module is skipped by its path's beginning or its end (transformers quantizers_utils.should_convert_module).
    """
    kept = kept_16bit(shape.family)
    if not skipped and not kept:
        yield from shape.all_linears()
        return
    names = frozenset(skipped)
    for kind, group in enumerate(shape.groups):
        layers = [index for index, each in enumerate(shape.kinds) if each == kind]
        for linear in group.layer.linears:
            place = f"{_block_of(group.layer, linear)}.{linear.name}"
            if linear.name not in kept:
                yield sum(not _is_skipped(f"model.layers.{index}.{place}", names) for index in layers), linear
    for linear in shape.outer:
        if linear.name not in kept:
            yield int(not _is_skipped(f"model.{linear.name}", names)), linear


def _block_of(layer: Layer, linear: Linear) -> str:
    if layer.mixer and linear in layer.mixer.linears:
        return layer.mixer.place
    return ATTENTION if linear in layer.attention else MLP


def _is_skipped(path: str, skipped: frozenset[str]) -> bool:
    parts = path.split(".")
    cuts = range(len(parts))
    return any(".".join(parts[cut:]) in skipped or ".".join(parts[: cut + 1]) in skipped for cut in cuts)


@dataclass(frozen=True, slots=True)
class TrainedBytes:
    """What is trained.

    Attributes:
        parameters: All of them.
        weights: Their bytes; gradients take as many.
        head: Bytes of a head that is trained whole, else 0.
        embedding: The same for the input embedding.
        of_experts: How many of the parameters stand beside routed experts.
    """

    parameters: int
    weights: int
    head: int
    embedding: int
    of_experts: int


@lru_cache(maxsize=1024)
def trained_bytes(shape: ModelShape, part: AdaptedPart, whole_itemsize: int) -> TrainedBytes:
    """Return the size of adapter and whole modules.

    Args:
        shape: The model.
        part: What is trained of it.
        whole_itemsize: Bytes per weight of a module trained whole; the adapter is fp32.
    """
    adapter = sum(count * elements for count, elements in trained_tensors(shape, part))
    whole = sum(count * elements for count, elements in whole_tensors(shape, part))
    size = whole_itemsize * shape.embedding_parameters
    head, embedding = size * part.trains_head, size * part.trains_embedding
    experts = {EXPERTS_UP, EXPERTS_DOWN} & target_names(shape, part.targets, as_peft=part.as_peft)
    of_experts = adapter - sum(count * elements for count, elements in trained_tensors(shape, part, without=experts))
    return TrainedBytes(adapter + whole, 4 * adapter + whole_itemsize * whole, head, embedding, of_experts)


@lru_cache(maxsize=1024)
def optimizer_bytes(
    shape: ModelShape, part: AdaptedPart, optimizer: str, whole_itemsize: int = 4, *, pages: bool = True
) -> OptimizerBytes:
    """Return the bytes of AdamW's two moments, tensor by tensor as bitsandbytes decides.

    Args:
        shape: The model.
        part: What is trained of it.
        optimizer: Which AdamW.
        whole_itemsize: Bytes per weight of a module trained whole; torch makes the moments in the weight's format.
        pages: Whether the device has unified memory; on a CPU all state stays where it is (jobs/train/optimizer.py).
    """
    resident = paged = spared = 0
    most_in_32_bits = _moments(_EIGHT_BIT_FROM - 1, optimizer, 4)
    wide = whole_itemsize if optimizer == "adamw_torch" else 4
    adapter, whole = trained_tensors(shape, part), whole_tensors(shape, part)
    tensors = [*((*pair, 4) for pair in adapter), *((*pair, wide) for pair in whole)]
    for count, elements, itemsize in tensors:
        state = _moments(elements, optimizer, itemsize) * count
        if pages and optimizer.startswith("paged") and elements >= _PAGED_FROM:
            paged += state
        else:
            resident += state
        if elements >= _EIGHT_BIT_FROM:
            spared += count * max(0, most_in_32_bits - _moments(elements, optimizer, itemsize))
    return OptimizerBytes(resident, paged, spared)


def _moments(elements: int, optimizer: str, itemsize: int) -> int:
    """Return the bytes of both moments of a trained tensor, each rounded up as the allocator does."""
    return 2 * sum(map(_aligned, _moment(elements, optimizer, itemsize)))


def _moment(elements: int, optimizer: str, itemsize: int = 4) -> tuple[int, ...]:
    """Return the bytes of one moment: its values, and for 8 bits one fp32 scale per 256 of them."""
    if "8bit" not in optimizer or elements < _EIGHT_BIT_FROM:
        return (itemsize * elements,)
    return elements, 4 * -(-elements // 256)


def resident_state(elements: int, optimizer: str) -> tuple[int, ...]:
    """Return the bytes of the tensors that AdamW keeps on the device for one trained tensor."""
    paged = optimizer.startswith("paged") and elements >= _PAGED_FROM
    return () if paged else 2 * _moment(elements, optimizer)
