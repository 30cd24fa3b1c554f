"""An estimate whose reserved and device bytes come from a replay of the allocator: for a plan that may take longer."""

from dataclasses import replace
from statistics import mean

from studio.core.gpu_catalogue import Gpu
from studio.core.shape import ModelShape
from studio.core.stock.replay import replayed
from studio.core.stock.setup import StockSetup, built, copying_logits, loads_in_threads
from studio.core.vram.report import Range, VramEstimate

_READERS = (2, 3, 4)
"""Threads in which transformers reads weights: as many as cores, up to 4. How far ahead of the quantisation they come
decides what loading leaves behind, so that the mean of what any of them would leave is expected."""

_MORE_FROM = (4, 45)
"""Version of transformers from which foak's whole logits took a block more than the replay finds."""


def refined(estimate: VramEstimate, shape: ModelShape, setup: StockSetup, gpu: Gpu | None = None) -> VramEstimate:
    """Return an estimate with what the caching allocator was found to take, event by event.

    Estimates of what the replay does not follow come back as they are: a CPU, modules trained whole, checkpoints in
    host memory, several cards, whose buckets hold the gradients once more, and experts, whose rows differ from layer to
    layer.

    As the allocator itself, a replay may take less for more: 14 % between neighbouring lengths at worst in 2000 setups.
    The high end is never below the closed form's, and fell by 0.5 % in two of them.

    Args:
        estimate: The estimate of the same model, set-up and card.
        shape: The model.
        setup: How it is trained.
        gpu: The card, where known: before it is full, cached segments are given back.
    """
    followed = setup.device == "cuda" and setup.gpus == 1
    more = setup.modules_to_save or setup.offload_checkpoints
    if not followed or more or any(group.layer.experts for group in shape.groups):
        return estimate
    context = estimate.components.context
    capacity = gpu.total_bytes - context if gpu else None
    found = [_found(estimate, shape, loop, capacity) for loop in _loops(setup)]
    before, expected = estimate.reserved, int(mean(mean(each) for each in found))
    # Of the block that nobody has explained, cards showed up to 1.4.
    highest = max(before.high, *(max(each) for each in found)) + _not_explained(shape, setup)
    reserved = Range(min(before.low, expected), expected, highest)
    device = estimate.device
    device = Range(
        min(device.low, device.expected + expected - before.expected),
        device.expected + expected - before.expected,
        device.high + highest - before.high,
    )
    return replace(estimate, reserved=reserved, device=device)


def _loops(setup: StockSetup) -> tuple[StockSetup, ...]:
    """Return the loops that a set-up may mean: two, where the version decides whether the Trainer's loss copies logits.

    A loop of somebody's own, which holds the outputs, is taken to be a new one.
    """
    if setup.transformers or setup.micro_batch == 1 or setup.loss != "full" or setup.outputs_kept:
        return (setup,)
    return setup, replace(setup, transformers=copying_logits(setup.kind).transformers)


def _found(estimate: VramEstimate, shape: ModelShape, setup: StockSetup, capacity: int | None) -> list[int]:
    threads = _READERS if setup.quantised and loads_in_threads(setup) else (1,)
    workspace, model = estimate.components.workspace, built(shape, setup)
    peaks = [
        replayed(model, setup, estimate.kernel, workspace=workspace, capacity=capacity, readers=readers)
        for readers in threads
    ]
    more = _not_explained(shape, setup)
    return [peak.reserved + (more if capacity is None or peak.reserved + more <= capacity else 0) for peak in peaks]


def _not_explained(shape: ModelShape, setup: StockSetup) -> int:
    """Return bytes that cards showed and the replay does not find: one more block of fp32 logits.

    Seen in all 14 rows of foak's kernels with whole logits of Llama and Mistral from transformers 4.45 on, to 0.0 to
    1.4 blocks; in none of Granite's, and in none of 4.43. It holds no tensor: live bytes of these rows are exact.
    """
    seen = setup.fused_kernels == "foak" and setup.loss == "full" and not shape.scaled_logits
    return 4 * setup.tokens * shape.vocabulary if seen and setup.version >= _MORE_FROM else 0
