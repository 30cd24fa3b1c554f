"""From live tensors to what the card shows: the allocator's segments, what it cannot reuse, the CUDA context.

"Allocated" is what tensors hold, "reserved" is what the caching allocator has taken from the driver, "device" is what
nvidia-smi shows. They are three numbers and are never mixed.
"""

import bisect
from functools import lru_cache

from studio.core.shape import ModelShape
from studio.core.vram.frozen import FrozenForm, held_linears, parts_of, streamed_bytes
from studio.core.vram.report import Range
from studio.core.vram.stages import MIB, Stages

_SMALL, _SEGMENT, _WHOLE, _ROUND = MIB, 20 * MIB, 10 * MIB, 2 * MIB
"""kSmallSize, kLargeBuffer, kMinLargeAlloc and kRoundLarge of PyTorch's caching allocator
(c10/core/AllocatorConfig.h, c10/cuda/CUDACachingAllocator.cpp)."""

FRAGMENTATION = 0.10
"""Share of what is allocated and freed within a step that lies in blocks too small for what comes next.

One number in place of a replay of the allocator, which sliders have no time for: for 81 set-ups of this program's loop
the two differ by 2.7 % in the median and by 8.7 % at the 90th percentile. The number was chosen on two of three sources
of measurements; on the third it is off by 2.5 and 8 %, 12 % at worst (`python -m tests.bench.bench_estimate`).
"""

MOST_FRAGMENTATION = 0.30
"""The same share at the high end. Of the nine rows measured on an A100 one needs 0.37; all other rows need less."""

MOST_KEPT_FRAGMENTATION = 0.15
"""At the high end, what lies unused beside activations that are kept without checkpointing, as a share of them. It is
10 % in a replay of a model of 135 M parameters, whose blocks are small, and 3 to 7 % in replays of eleven larger
models. It is more where rows of odd lengths leave blocks that nothing else fits into."""

MOST_TRAINED_FRAGMENTATION = 0.15
MOST_HALF_EMPTY_BYTES = 2 * _SEGMENT
"""At the high end, what lies unused beside adapter, gradients and optimizer state, as a share of them, and segments
that hold next to nothing. States come at the end of the first step, into blocks that the next step's activations then
lack.

Chosen so that the high end covers replays (`python -m tests.bench.bench_estimate` repeats it): of 3558 random set-ups
of this program's own loop (25 models, ranks 1 to 256, 1 to 8 rows of 64 to 4096 tokens) three reserved more, by 36 MiB
at worst, which the doubt about the context covers on a card; of 616 of the stock loop one, by 1.2 %. Without these two
margins, 40 and 8 set-ups reserved more, by 12 % at worst.
"""

CONTEXT_BYTES = 450 * MIB
"""CUDA context, kernels and library handles outside the allocator on Ampere and newer: 0.3 to 0.6 GiB seen."""

LEAST_CONTEXT_BYTES, MOST_CONTEXT_BYTES = 130 * MIB, 700 * MIB
"""A T4 was measured at 140.9 MiB; newer cards with more libraries loaded come near the upper number."""


@lru_cache(maxsize=256)
def unused_in_segments(shape: ModelShape, form: FrozenForm) -> int:
    """Return the bytes of segments that the frozen weights leave free, in blocks that activations seldom fit.

    Weights of 1 to 10 MiB share segments of 20 MiB; larger ones get their own, rounded up to 2 MiB. Loaded layer by
    layer.
    """
    free: list[int] = []
    unused = 0
    for size in _weight_sizes(shape, form):
        if size >= _WHOLE:
            unused += -size % _ROUND
        elif size > _SMALL:
            index = bisect.bisect_left(free, size)
            room = free.pop(index) if index < len(free) else _SEGMENT
            bisect.insort(free, room - size)
    return unused + sum(free)


def _weight_sizes(shape: ModelShape, form: FrozenForm) -> list[int]:
    embedding = shape.embedding_parameters * form.embedding_itemsize
    streamed = streamed_bytes(shape, form)
    sizes = [embedding] if shape.tied or streamed.layers else [embedding, embedding]
    for held in held_linears(shape, form, streamed.layers):
        sizes += [*parts_of(held, form)] * held.layers * held.linear.copies
    return sizes


def reserved_range(stages: Stages, low: int, high: int, unused: int, *, fragmentation: float = FRAGMENTATION) -> Range:
    """Return what the allocator takes from the driver, in closed form.

    Args:
        stages: Allocated bytes.
        low: Lowest peak of allocated bytes.
        high: Highest peak of allocated bytes.
        unused: Free remainder of the weights' segments.
        fragmentation: Share of the turnover that lies in blocks too small for what comes next.
    """
    kept = max(0, stages.at_work - stages.fixed - stages.turnover)
    stand = stages.standing
    trained = 2 * stand.adapter + stand.resident + stand.paged + stand.spared
    most = MOST_FRAGMENTATION * stages.turnover + MOST_KEPT_FRAGMENTATION * kept
    most += MOST_TRAINED_FRAGMENTATION * trained + MOST_HALF_EMPTY_BYTES
    expected = expected_reserved(stages, unused, fragmentation=fragmentation)
    return Range(low, expected, max(expected, int(high + unused + int(stages.work.layer_blocks) + most)))


def expected_reserved(stages: Stages, unused: int, more: int = 0, *, fragmentation: float = FRAGMENTATION) -> int:
    """Return what the allocator is expected to take from the driver.

    At work these are, beside the live tensors, the blocks that layers used on their way forward, too small for the
    logits, the rest of the weights' segments, and fragments of what is allocated and freed again. Loading is over by
    then: it leaves the rest of the weights' segments, and as much again as it held beside them.

    Args:
        stages: Allocated bytes.
        unused: Free remainder of the weights' segments.
        more: Bytes that are alive at work beside those.
        fragmentation: Share of the turnover that lies in blocks too small for what comes next.
    """
    load = stages.peaks.load
    at_work = stages.at_work + more + unused + int(stages.work.layer_blocks) + fragmentation * stages.turnover
    return max(2 * load - stages.standing.base + unused, int(at_work))


def device_range(reserved: Range, state: Range, context: int, most_context: int) -> Range:
    """Return what nvidia-smi shows for this process alone.

    Args:
        reserved: What the allocator takes.
        state: Optimizer state that it does not hold: the least, on the card as expected, and the most.
        context: Expected bytes of the CUDA context.
        most_context: Most bytes of it.
    """
    return Range(
        reserved.low + state.low + min(context, LEAST_CONTEXT_BYTES),
        reserved.expected + state.expected + context,
        reserved.high + state.high + most_context,
    )
