"""`auto` in a recipe: the fewest streamed layers, and the fewest computed again, with which a training fits its card.

It becomes a plain value when a run starts, and the run's recipe keeps that: a resumed run does not choose again.
Streamed layers are chosen first, with all layers computed again: that costs less time than waiting for copies. What is
left may keep dequantised weights.
"""

from collections.abc import Callable
from dataclasses import replace

from studio.core.recipe import Recipe, Recompute
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup

CHOSEN = ("model.stream", "train.recompute", "train.keep_dequantised")
"""The fields whose `auto` is decided here."""
Estimate = Callable[[Setup], VramEstimate]


def with_fewest(setup: Setup, layers: int, budget_bytes: int | None, estimate: Estimate) -> Setup:
    """Return a set-up whose `auto` have become numbers of layers or words; any other set-up as it is.

    Where nothing fits, all layers are streamed and computed again: that takes the least memory. Where no budget is
    known, none is streamed and all are computed again.

    Args:
        setup: How a model is trained.
        layers: How many layers it has.
        budget_bytes: What the run may use of the card; None where that is not known.
        estimate: Returns what a set-up takes there.

    Raises:
        BadInput: The set-up cannot be estimated.
    """

    def fits(tried: Setup) -> bool:
        return budget_bytes is not None and estimate(tried).device.high <= budget_bytes

    if setup.stream == "auto":
        plain = setup = replace(setup, stream="off")
        if budget_bytes is not None:
            setup = _fewest(0, layers, lambda count: replace(plain, stream=count or "off"), fits)
    if setup.recompute == "auto":
        kept = setup

        def again(count: int) -> Setup:
            word: Recompute = "none" if count == 0 else "all" if count == layers else count
            return replace(kept, recompute=word)

        # Offloaded checkpoints need a layer that has one.
        setup = _fewest(int(setup.offload_checkpoints), layers, again, fits)
    if setup.keep_dequantised == "auto":
        keeping = replace(setup, keep_dequantised=True)
        setup = keeping if keeping.keeps_dequantised and fits(keeping) else replace(setup, keep_dequantised=False)
    return setup


def settled(recipe: Recipe, setup: Setup) -> Recipe:
    """Return a recipe with the values of its set-up in place of `auto`."""
    for path in CHOSEN:
        if recipe.get(path) == "auto":
            recipe = recipe.with_(path, getattr(setup, path.rpartition(".")[2]))
    return recipe


def _fewest(least: int, most: int, with_: Callable[[int], Setup], fits: Callable[[Setup], bool]) -> Setup:
    """Return the set-up with the fewest layers that fits, or with the most where none does."""
    if not fits(with_(most)):
        return with_(most)
    # More layers take no more memory, but for a few MiB that segments of the allocator leave free: halving is enough.
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(with_(middle)) else (middle + 1, most)
    return with_(most)
