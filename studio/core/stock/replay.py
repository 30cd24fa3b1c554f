"""Reserved bytes by replay: a model is loaded and trained for two steps in the allocator's bookkeeping.

Takes 20 to 27 ms for a model of 8 B parameters, half a microsecond a birth or death: for a plan, not for a slider. What
the rows of three public archives reserved stands beside it in the table of `python -m tests.bench.bench_estimate`.

Loading a model and attaching an adapter leave weights in the allocator, and holes between them. Sources:
transformers/core_model_loading.py and modeling_utils.py (`caching_allocator_warmup`), bitsandbytes nn/modules.py
Params4bit, peft/utils/other.py and tuners/tuners_utils.py.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from studio.core.layer_parts import Linear
from studio.core.shape import Layer, ModelShape
from studio.core.stock.allocator import Block, CachingAllocator
from studio.core.stock.loop import stock_loop
from studio.core.stock.modules import TransformersLoss
from studio.core.stock.setup import StockSetup, loads_in_threads
from studio.core.trainable import trained_tensors, whole_tensors
from studio.core.vram.decoder_layer import LayerPass, layer_pass
from studio.core.vram.frozen import base_bytes, frozen_form, quantised_parts
from studio.core.vram.head import Loss, head_pass
from studio.core.vram.loop import Loop, at_size, mask_count, own_loop
from studio.core.vram.modules import Kernel
from studio.core.vram.setup import Setup
from studio.core.vram.static import resident_state
from studio.core.vram.tape import Events

_STEPS = 2
"""The optimizer's state is made at the end of the first step; later steps are like the second."""
_READING_BYTES = 300_000
"""Bytes that a reader could have read in the time that it needs to begin with a weight: 0.3 ms at 1 GB/s."""


class Peak(NamedTuple):
    """Highest bytes of live blocks and of segments."""

    allocated: int
    reserved: int


@lru_cache(maxsize=64)
def replayed(
    shape: ModelShape,
    setup: Setup,
    kernel: Kernel,
    *,
    workspace: int,
    capacity: int | None = None,
    readers: int = 1,
    expandable: bool = False,
) -> Peak:
    """Return what training holds and what it takes from the driver at most.

    Args:
        shape: The model.
        setup: How it is trained; without modules trained whole, and with checkpoints on the device.
        kernel: Which attention runs.
        workspace: Bytes of the cuBLAS workspaces of both threads.
        capacity: Bytes that the driver can give; None for no limit.
        readers: Threads that read ahead while weights are quantised.
        expandable: Whether segments grow, as in our own jobs on a card.
    """
    allocator = CachingAllocator(capacity, expandable=expandable)
    trained = load(allocator, shape, setup, readers)
    training = _Training(allocator, shape, setup, kernel, trained=trained, workspace=workspace // 2)
    for _ in range(_STEPS):
        training.step()
    return Peak(allocator.most_allocated, allocator.most_reserved)


class _Layer(NamedTuple):
    """A layer's pass, its sizes in bytes, and its backward without the result's death: the next layer frees that."""

    passed: LayerPass
    sizes: list[int]
    backward: Events


class _Training:
    """Steps of one set-up, in the order in which the loop takes them."""

    def __init__(
        self,
        allocator: CachingAllocator,
        shape: ModelShape,
        setup: Setup,
        kernel: Kernel,
        *,
        trained: list[int],
        workspace: int,
    ) -> None:
        loop = at_size(_loop_of(shape, setup, kernel), shape, setup)
        rank = max((setup.rank, *(rank for _, rank in setup.rank_pattern)))
        numbers = setup.tokens, setup.squares, rank
        self._allocator = allocator
        self._setup = setup
        self._loop = loop
        self._trained = trained
        self._workspace = workspace
        self._input = setup.tokens * shape.hidden * setup.embedding_itemsize
        rotary, mask = setup.seq_len * shape.head_dim, setup.squares * mask_count(shape, setup, kernel)
        self._shared = [8 * setup.tokens] * 3 + [setup.residual_itemsize * rotary] * 2  # ids, labels, mask; cos, sin
        self._mask = [loop.mask_itemsize * mask] if mask else []
        layers: dict[LayerPass, _Layer] = {}

        def layer(passed: LayerPass) -> _Layer:
            if passed not in layers:
                backward = tuple([event for event in passed.backward if event != ~passed.result])
                layers[passed] = _Layer(passed, [int(size.at(*numbers)) for size in passed.sizes], backward)
            return layers[passed]

        kinds = shape.kinds
        wants, again = loop.input_wants_gradient, setup.recomputes
        self._layers = [
            layer(layer_pass(shape, loop.traits, kind, again, wants or place > 0)) for place, kind in enumerate(kinds)
        ]
        self._head = head_pass(shape, loop.traits, _loss_of_rows(loop, setup.seq_len))
        self._head_sizes = [int(size.at(*numbers)) for size in self._head.sizes]
        self._chunk = loop.loss.chunk_bytes(shape, loop.traits, setup.tokens)
        self._begun: list[Block] = []
        self._state: list[Block] = []

    def step(self) -> None:
        """Take one optimizer step: at its end the gradients are freed, and what the loop holds."""
        gradients: list[Block] = []
        held: list[Block] = []
        for number in range(min(2, self._setup.accumulation)):
            self._release(held)
            held = [self._allocator.allocate(size) for size in self._shared]
            made, logits = self._micro_batch(adds=number > 0)
            held += logits
            gradients += made
        self._optimize()
        self._release(held)
        self._release(gradients)

    def _micro_batch(self, *, adds: bool) -> tuple[list[Block], list[Block]]:
        """Run forward and backward; return the gradients, and the logits where the loop holds them.

        Args:
            adds: Whether gradients are added in place to those that there are already.
        """
        allocate = self._allocator.allocate
        self._begin(1)
        copies = self._trained if self._loop.caches_copies else []
        cached = [allocate(self._setup.compute_itemsize * elements) for elements in copies]
        x = embedded = allocate(self._input)
        mask, alive = [allocate(size) for size in self._mask], []
        for layer in self._layers:
            blocks = {layer.passed.source: x}
            self._play(layer.sizes, layer.passed.forward, blocks, spared=embedded)
            x = blocks.pop(layer.passed.result)
            alive.append(blocks)
        head, sizes, blocks = self._head, self._head_sizes, {0: x}
        events, source = head.forward, ~0
        normed = events.index(source) if source in events else 0
        self._play(sizes, events[:normed], blocks)
        if not self._setup.recomputes:
            # The model holds its input and the mask until its last norm is done; checkpoints hold both longer, and so
            # does a first layer without a norm in front (Olmo 2 and 3), whose adapters save the input itself.
            saved = alive[0].get(self._layers[0].passed.source) is embedded
            self._release(mask if saved else [*mask, embedded])
            mask = []
        self._play(sizes, events[normed:], blocks)
        if self._chunk:
            self._release([allocate(self._chunk)])
        self._release(cached)
        self._begin(2)
        self._play(sizes, head.backward, blocks)
        gradient: Block | None = blocks.pop(head.outgoing)
        logits, gradients = list(blocks.values()), []
        for layer, blocks in zip(reversed(self._layers), reversed(alive), strict=True):
            passed = layer.passed
            assert gradient is not None  # noqa: S101  only the first layer's input may want none
            blocks[passed.incoming] = gradient
            self._play(layer.sizes, layer.backward, blocks)
            gradient = blocks.pop(passed.outgoing, None)
            if not adds:
                gradients += [blocks.pop(number) for number in passed.lasting]
            self._release(list(blocks.values()))  # a checkpoint, and gradients that were added to others
        self._release([*mask, *([gradient] if gradient else [])])
        return gradients, logits

    def _play(self, sizes: list[int], events: Events, blocks: dict[int, Block], spared: Block | None = None) -> None:
        """Let tensors be born and die; what is alive afterwards is in `blocks`, by number.

        Args:
            sizes: Bytes of each tensor, by its number.
            events: What happens.
            blocks: What is alive before.
            spared: A block that somebody else holds: its death here does not free it.
        """
        allocate, release = self._allocator.allocate, self._allocator.release
        for event in events:
            if event < 0:
                if sizes[~event] and (block := blocks.pop(~event)) is not spared:
                    release(block)
            elif sizes[event]:
                blocks[event] = allocate(sizes[event])

    def _begin(self, threads: int) -> None:
        """Let cuBLAS take the workspaces of as many threads, once."""
        while self._workspace and len(self._begun) < threads:
            self._begun.append(self._allocator.allocate(self._workspace))

    def _optimize(self) -> None:
        """Let the optimizer make its state in the first step, and its temporaries in each."""
        optimizer = self._setup.optimizer
        if not self._state:
            sizes = [size for elements in self._trained for size in resident_state(elements, optimizer)]
            self._state = [self._allocator.allocate(size) for size in sizes]
        if self._loop.optimizer_copies:
            self._release([self._allocator.allocate(4 * elements) for elements in self._trained])

    def _release(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._allocator.release(block)


def _loop_of(shape: ModelShape, setup: Setup, kernel: Kernel) -> Loop:
    if isinstance(setup, StockSetup):
        return stock_loop(shape, setup.kind, kernel)
    return own_loop(shape, setup.kind, kernel)


def _loss_of_rows(loop: Loop, seq_len: int) -> Loss:
    """Return the loss of rows of this length: where the last token of each is dropped, a share of the logits is."""
    loss = loop.loss
    if isinstance(loss, TransformersLoss) and loss.shift_copied:
        return replace(loss, shifted=1 - 1 / seq_len)
    return loss


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
