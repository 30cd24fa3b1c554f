"""Estimates of either engine's set-ups, for tests that compare or mix the two."""

from studio.core.gpu_catalogue import Gpu
from studio.core.shape import ModelShape
from studio.core.stock.estimate import estimate_stock, stock_stages
from studio.core.stock.loop import stock_kernel
from studio.core.stock.setup import StockSetup
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.loop import attention_kernel, own_loop
from studio.core.vram.modules import Kernel
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup
from studio.core.vram.stages import CUBLAS_WORKSPACE_BYTES, Stages, stages_of


def estimated(shape: ModelShape, setup: Setup, gpu: Gpu | None = None) -> VramEstimate:
    """Return the estimate of a set-up's own engine."""
    return (estimate_stock if isinstance(setup, StockSetup) else estimate_vram)(shape, setup, gpu)


def kernel_of(shape: ModelShape, setup: Setup, gpu: Gpu | None = None) -> Kernel:
    """Return which attention runs in a set-up's own engine."""
    return (stock_kernel if isinstance(setup, StockSetup) else attention_kernel)(shape, setup, gpu)


def staged(shape: ModelShape, setup: Setup, kernel: Kernel, *, workspace: int = CUBLAS_WORKSPACE_BYTES) -> Stages:
    """Return live tensors by stage in a set-up's own engine."""
    if isinstance(setup, StockSetup):
        return stock_stages(shape, setup, kernel, workspace=workspace)
    return stages_of(shape, setup, own_loop(shape, setup.kind, kernel), workspace=workspace)
