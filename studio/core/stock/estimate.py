"""The estimate of a stock loop: what is expected, and what the other loops that a set-up may mean would need."""

from dataclasses import replace
from functools import lru_cache

from studio.core.gpu_catalogue import Gpu
from studio.core.shape import ModelShape
from studio.core.stock.loop import stock_kernel, stock_loop
from studio.core.stock.setup import (
    ALWAYS_FUSED,
    COPIES_LOGITS,
    NEWEST,
    UPCASTS_LOGITS,
    StockSetup,
    as_it_lies_here,
    built,
    copying_logits,
)
from studio.core.vram.estimate import UNCERTAIN, estimate_of, notes_of, widened, workspace_bytes
from studio.core.vram.loop import is_windowed, runs_plain
from studio.core.vram.micro_batch import activations_of
from studio.core.vram.modules import Kernel
from studio.core.vram.report import VramEstimate
from studio.core.vram.stages import Stages, stages_with, standing


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
        # Where the version is not known: the mean of the newest and of those that copy the logits.
        older = activations_of(shape, setup, stock_loop(shape, copying_logits(kind), kernel), stand.copies)
        loss, evaluation = (work.loss + older.loss) / 2, (work.head_evaluation + older.head_evaluation) / 2
        work = work._replace(loss=loss, head_evaluation=evaluation)
    return stages_with(stand, work, shape, setup, workspace)


@lru_cache(maxsize=256)
def _variants(setup: StockSetup) -> tuple[StockSetup, ...]:
    """Return the kinds of loop that a set-up may mean: they differ in version, autocast and who holds the outputs."""
    unsaid = not setup.transformers and setup.micro_batch > 1
    least = UPCASTS_LOGITS if setup.fused_kernels == "foak" else NEWEST
    # The least and the most of what is held at the loss and of peft's upcast; which of the two autocasts holds more
    # depends.
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
