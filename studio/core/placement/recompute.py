"""`train.recompute = "auto"`: the fewest layers computed again with which a training fits its card.

It becomes a number when a run starts, and the run's recipe keeps that number: a resumed run does not choose again.
"""

from collections.abc import Callable
from dataclasses import replace

from studio.core.recipe import Recompute
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup


def with_fewest(
    setup: Setup, layers: int, budget_bytes: int | None, estimate: Callable[[Setup], VramEstimate]
) -> Setup:
    """Return a set-up whose `auto` has become a number of layers or a word; any other set-up as it is.

    Where nothing fits, and where no budget is known, all layers are computed again: that takes the least memory.

    Args:
        setup: How a model is trained.
        layers: How many layers it has.
        budget_bytes: What the run may use of the card; None where that is not known.
        estimate: Returns what a set-up takes there.

    Raises:
        BadInput: The set-up cannot be estimated.
    """
    if setup.recompute != "auto":
        return setup

    def with_(count: int) -> Setup:
        word: Recompute = "none" if count == 0 else "all" if count == layers else count
        return replace(setup, recompute=word)

    def fits(count: int) -> bool:
        return budget_bytes is not None and estimate(with_(count)).device.high <= budget_bytes

    # Offloaded checkpoints need a layer that has one. More layers never take more memory, so that halving is enough.
    least, most = int(setup.offload_checkpoints), layers
    if not fits(most):
        return with_(most)
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle + 1, most)
    return with_(most)
