"""What loading a model and attaching an adapter leave behind in the allocator: weights, and holes between them.

Sources: transformers/core_model_loading.py and modeling_utils.py (`caching_allocator_warmup`), bitsandbytes
nn/modules.py Params4bit, peft/utils/other.py and tuners/tuners_utils.py.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from studio.core.linear import Linear
from studio.core.shape import Layer, ModelShape
from studio.core.stock.allocator import Block, CachingAllocator
from studio.core.stock.setup import StockSetup, loads_in_threads
from studio.core.trainable import trained_tensors, whole_tensors
from studio.core.vram.setup import Setup
from studio.core.vram.static import base_bytes, frozen_form, quantised_parts

_READING_BYTES = 300_000
"""Bytes that a reader could have read in the time that it needs to begin with a weight: 0.3 ms at 1 GB/s."""


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor of the checkpoint: how many elements, and the linear map whose quantised weight it becomes."""

    elements: int
    linear: Linear | None = None


def load(allocator: CachingAllocator, shape: ModelShape, setup: Setup, readers: int) -> list[int]:
    """Load the base, attach the adapter, and return the elements of every trained tensor.

    Args:
        allocator: Where it is loaded.
        shape: The model.
        setup: How it is held and trained.
        readers: Threads that read ahead while weights are quantised.
    """
    weights = list(_weights(shape))
    if setup.quantised:
        _quantised(allocator, shape, setup, weights, readers)
    else:
        for weight in weights:
            allocator.allocate(weight.elements * setup.residual_itemsize)
    missing = base_bytes(shape, frozen_form(setup.kind)) - allocator.allocated
    if missing > 0:
        allocator.allocate(missing)
    return _attach(allocator, shape, setup)


def _weights(shape: ModelShape) -> Iterator[_Weight]:
    """Yield the checkpoint's tensors in the order of their names, in which they are loaded."""
    if not shape.tied:
        yield _Weight(shape.embedding_parameters)
    yield _Weight(shape.embedding_parameters)
    for group in shape.groups:
        layer = tuple(_weights_of(group.layer, shape.hidden))
        for _ in range(group.count):
            yield from layer
    if shape.other_parameters:
        yield _Weight(shape.other_parameters)


def _weights_of(layer: Layer, hidden: int) -> Iterator[_Weight]:
    """Yield a layer's: norms and biases, the MLP's and the experts' maps, the attention's."""
    yield _Weight(layer.norm_parameters)
    experts = layer.experts
    if experts and not layer.expert_maps:
        for stack in experts.stacks(hidden):
            yield _Weight(stack.weights)
    mixer = layer.mixer.linears if layer.mixer else ()
    for maps in ((*layer.mlp, *layer.expert_maps), (*layer.attention, *mixer)):
        for linear in sorted(maps, key=lambda linear: linear.name):
            for _ in range(linear.copies):
                if linear.biases:
                    yield _Weight(linear.biases // linear.copies)
                yield _Weight(linear.inputs * linear.outputs, linear)


def _quantised(
    allocator: CachingAllocator, shape: ModelShape, setup: Setup, weights: list[_Weight], readers: int
) -> None:
    """Load weights one after another and quantise each; a 16-bit weight is freed once its packed form is there."""
    half, form = setup.compute_itemsize, frozen_form(setup.kind)
    if loads_in_threads(setup):
        # transformers first allocates what the whole model will take, and frees it (`caching_allocator_warmup`). It
        # counts half a byte for a 4-bit weight and one for an 8-bit weight.
        small = 1 if form.quant_type == "int8" else 0.5
        whole = sum(weight.elements * (small if weight.linear else half) for weight in weights)
        allocator.release(allocator.allocate(int(whole)))
    held: dict[int, Block] = {}
    for number, quantises in _order(weights, half, readers):
        weight = weights[number]
        if not quantises:
            held[number] = allocator.allocate(weight.elements * half)
        elif weight.linear:
            packed, *rest = quantised_parts(weight.linear, form)
            for size in (*rest[:1], packed, *rest[1:]):
                allocator.allocate(size)
            allocator.release(held.pop(number))
    if isinstance(setup, StockSetup) and setup.kbit_prepare:
        # From 0.20 on peft empties the cache afterwards. The measured rows show no sign of that, so it is left out.
        for number, block in held.items():
            wide = allocator.allocate(weights[number].elements * 4)
            allocator.release(block)
            held[number] = wide
    if isinstance(setup, StockSetup) and setup.head_cast_back:
        for number in range(1 + (not shape.tied)):
            narrow = allocator.allocate(weights[number].elements * half)
            allocator.release(held[number])
            held[number] = narrow


def _order(weights: list[_Weight], itemsize: int, readers: int) -> Iterator[tuple[int, bool]]:
    """Yield the numbers of the weights in the order in which they arrive (False) and are used (True).

    Each reader takes the next weight as soon as it is done with its last one, and needs time in proportion to the size
    of a weight. Weights are used in their order, each as soon as it is there. While one reader is busy with a large
    embedding, the others read ahead.
    """
    free, events, latest = [0.0] * readers, list[tuple[float, bool, int]](), 0.0
    for number, weight in enumerate(weights):
        begins = heapq.heappop(free)
        ends = begins + weight.elements * itemsize + _READING_BYTES
        heapq.heappush(free, ends)
        latest = max(latest, ends)
        events += [(begins, False, number), (latest, True, number)]
    for _, quantises, number in sorted(events):
        yield number, quantises


def _attach(allocator: CachingAllocator, shape: ModelShape, setup: Setup) -> list[int]:
    """Attach the adapter. Beside 16-bit weights peft makes it in their format first and casts it when all is there."""
    sizes = [elements for count, elements in trained_tensors(shape, setup.adapted) for _ in range(count)]
    narrow = [] if setup.quantised else [allocator.allocate(setup.compute_itemsize * elements) for elements in sizes]
    for number, elements in enumerate(sizes):
        allocator.allocate(4 * elements)
        if narrow:
            allocator.release(narrow[number])
    whole = [elements for count, elements in whole_tensors(shape, setup.adapted) for _ in range(count)]
    for elements in whole:
        allocator.allocate(setup.residual_itemsize * elements)
    return sizes + whole
