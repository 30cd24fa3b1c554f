"""The estimate of a stock loop: what is expected, and what other loops would need that the set-up may also mean.

`estimate_stock` computes it in closed form. A plan has more time: it lets `refined` replace reserved and device bytes
by those of a replay of the allocator.
"""

from dataclasses import replace
from functools import lru_cache
from statistics import mean

from studio.core.gpu_catalogue import Gpu
from studio.core.shape import ModelShape
from studio.core.stock.loop import stock_kernel, stock_loop
from studio.core.stock.replay import replayed
from studio.core.stock.setup import (
    ALWAYS_FUSED,
    COPIES_LOGITS,
    NEWEST,
    UPCASTS_LOGITS,
    StockSetup,
    as_it_lies_here,
    built,
    copying_logits,
    loads_in_threads,
)
from studio.core.vram.estimate import UNCERTAIN, estimate_of, notes_of, widened, workspace_bytes
from studio.core.vram.loop import is_windowed, runs_plain, trains_layers
from studio.core.vram.micro_batch import activations_of
from studio.core.vram.modules import Kernel
from studio.core.vram.report import Range, VramEstimate
from studio.core.vram.stages import Stages, stages_with, standing

_READERS = (2, 3, 4)
"""Threads in which transformers reads weights: as many as there are cores, up to 4 (core_model_loading.py
GLOBAL_WORKERS). How far they read ahead of the quantisation decides what loading leaves behind. The cores are not known
here: the mean of these three is expected."""

_MORE_FROM = (4, 45)
"""From this version of transformers on, foak with whole logits took one block more than the replay finds."""


def estimate_stock(shape: ModelShape, setup: StockSetup, gpu: Gpu | None = None) -> VramEstimate:
    """Return what a model and a set-up of the stock loop need on one GPU.

    Args:
        shape: The model.
        setup: How it is trained.
        gpu: The card, where known: it decides the attention kernel, workspaces and context.

    Raises:
        BadInput: A target does not exist in this model, or there are no such fused kernels for it.
    """
    setup = as_it_lies_here(setup, shape.quantised)
    shape = built(shape, setup)
    kernel = stock_kernel(shape, setup, gpu)
    workspace = 0 if setup.device == "cpu" else workspace_bytes(gpu)
    stages = stock_stages(shape, setup, kernel, workspace=workspace)
    low, high = float(stages.peak), float(stages.steady_peak)
    for kind in _variants(setup.kind):
        if kind is not setup.kind:
            other_kernel = stock_kernel(shape, kind, gpu, seq_len=setup.seq_len)
            other = _stages(shape, setup, kind, other_kernel, workspace)
            low, high = min(low, other.peak), max(high, other.steady_peak)
    low, high = widened(shape, low, high)
    base, of_loop, of_kernel = stages.standing.base, list[str](), list[str]()
    if shape.expert_parameters and not setup.transformers and shape.family not in ALWAYS_FUSED:
        older = estimate_stock(shape, replace(setup, transformers=COPIES_LOGITS), gpu)
        low, base = min(low, older.allocated.low), older.components.base
        of_loop.append(
            "before transformers 5 experts were linear layers of their own and quantised: say --transformers"
        )
    if shape.expert_parameters:
        low, high = low - UNCERTAIN * stages.turnover, high + UNCERTAIN * stages.turnover
    plain = runs_plain(shape, setup, kernel) or shape.repeats_heads or is_windowed(shape, setup.seq_len)
    if shape.heads != shape.kv_heads and not plain and kernel == "efficient":
        of_kernel.append(
            "without flash attention PyTorch may take its plain kernel for grouped heads, with S x S matrices "
            "(transformers issue 48633): the high end counts them"
        )
        high = max(high, _stages(shape, setup, setup.kind, "eager", workspace).steady_peak)
    held = "fp32 after peft's upcast" if setup.residual_itemsize == 4 else "16-bit"
    notes = notes_of(shape, setup, gpu, kernel, of_loop=of_loop, of_kernel=of_kernel, unquantised=held)
    loop = stock_loop(shape, setup.kind, kernel)
    return estimate_of(shape, stages, loop, gpu, low=max(low, base), high=high, notes=notes)


def stock_stages(shape: ModelShape, setup: StockSetup, kernel: Kernel, *, workspace: int) -> Stages:
    """Return the allocated bytes of every stage.

    Args:
        shape: The model, as the version of transformers builds it.
        setup: How it is trained.
        kernel: Which attention runs.
        workspace: Bytes of cuBLAS workspaces, 0 on a CPU.
    """
    return _stages(shape, setup, setup.kind, kernel, workspace)


def _stages(shape: ModelShape, setup: StockSetup, kind: StockSetup, kernel: Kernel, workspace: int) -> Stages:
    """Return the stages of a kind of loop, the set-up's own or another that trains the same."""
    loop = stock_loop(shape, kind, kernel)
    stand = standing(shape, loop, setup.adapted)
    work = activations_of(shape, setup, loop, stand.copies)
    if kind.loss == "full" and not kind.transformers and kind.micro_batch > 1:
        # An unstated version counts as the mean of the newest and of one whose loss copies the logits.
        older = activations_of(shape, setup, stock_loop(shape, copying_logits(kind), kernel), stand.copies)
        loss, evaluation = (work.loss + older.loss) / 2, (work.head_evaluation + older.head_evaluation) / 2
        work = work._replace(loss=loss, head_evaluation=evaluation)
    return stages_with(stand, work, shape, setup, workspace)


@lru_cache(maxsize=256)
def _variants(setup: StockSetup) -> tuple[StockSetup, ...]:
    """Return the kinds of loop that a set-up may mean: they differ in version, autocast and who holds the outputs."""
    unsaid = not setup.transformers and setup.micro_batch > 1
    least = UPCASTS_LOGITS if setup.fused_kernels == "foak" else NEWEST
    # The kinds that hold least and most at the loss and after peft's upcast. Whether a loop holds more with or without
    # autocast depends on the set-up, so both are tried.
    holds = (
        ((False, least), (True, COPIES_LOGITS)) if unsaid else ((kept, setup.transformers) for kept in (False, True))
    )
    return tuple(
        replace(
            setup,
            outputs_kept=kept,
            autocast=autocast,
            transformers=version,
            head_cast_back=setup.head_cast_back or (setup.dtype == "bf16" and setup.kbit_prepare and not kept),
        ).kind
        for kept, version in holds
        for autocast in ((False, True) if setup.compute_itemsize == 2 else (setup.autocast,))
    )


def refined(estimate: VramEstimate, shape: ModelShape, setup: StockSetup, gpu: Gpu | None = None) -> VramEstimate:
    """Return an estimate with what the caching allocator was found to take, event by event.

    The replay does not follow a CPU, modules trained whole, a head trained alone, checkpoints in host memory, several
    cards (their buckets hold the gradients once more) and experts (their rows differ from layer to layer). Estimates
    of these come back unchanged.

    A replay may find less where more is trained, as the allocator itself does: 14 % less between neighbouring lengths
    at worst, in 2000 set-ups. The high end is never below that of the closed form; in two of these set-ups it fell by
    0.5 %.

    Args:
        estimate: The estimate of the same model, set-up and card.
        shape: The model.
        setup: How it is trained.
        gpu: The card, where known: before it is full, cached segments are given back.
    """
    followed = setup.device == "cuda" and setup.gpus == 1
    followed = followed and trains_layers(shape, stock_loop(built(shape, setup), setup.kind, estimate.kernel))
    more = setup.modules_to_save or setup.offload_checkpoints
    if not followed or more or any(group.layer.experts for group in shape.groups):
        return estimate
    context = estimate.components.context
    capacity = gpu.total_bytes - context if gpu else None
    found = [_found(estimate, shape, loop, capacity) for loop in _loops(setup)]
    before, expected = estimate.reserved, int(mean(mean(each) for each in found))
    # Cards showed up to 1.4 times the unexplained block. `found` counts it once, so the high end counts it twice.
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
    """Return the loops that a set-up may mean.

    They are two where the version is unstated and decides whether the Trainer's loss copies logits. A loop that holds
    the outputs is a script of somebody's own, and is taken to run on the newest version.
    """
    if setup.transformers or setup.micro_batch == 1 or setup.loss != "full" or setup.outputs_kept:
        return (setup,)
    return setup, replace(setup, transformers=copying_logits(setup.kind).transformers)


def _found(estimate: VramEstimate, shape: ModelShape, setup: StockSetup, capacity: int | None) -> list[int]:
    """Return the reserved bytes that replays of a loop find, one for each number of reading threads."""
    threads = _READERS if setup.quantised and loads_in_threads(setup) else (1,)
    workspace, model = estimate.components.workspace, built(shape, setup)
    peaks = [
        replayed(model, setup, estimate.kernel, workspace=workspace, capacity=capacity, readers=readers)
        for readers in threads
    ]
    more = _not_explained(shape, setup)
    return [peak.reserved + (more if capacity is None or peak.reserved + more <= capacity else 0) for peak in peaks]


def _not_explained(shape: ModelShape, setup: StockSetup) -> int:
    """Return the bytes that cards showed and the replay does not find: one more block of fp32 logits.

    It was seen in all 14 rows of foak's kernels with whole logits of Llama and Mistral from transformers 4.45 on, which
    showed 0.0 to 1.4 such blocks; in no row of Granite, and in none of transformers 4.43. No tensor lies in it: the
    live bytes of these rows are exact.
    """
    seen = setup.fused_kernels == "foak" and setup.loss == "full" and not shape.scaled_logits
    return 4 * setup.tokens * shape.vocabulary if seen and setup.version >= _MORE_FROM else 0
