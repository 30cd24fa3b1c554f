"""Which smaller form of a training is taken where memory was refused. The result stays the same, but for rounding.

A smaller micro-batch comes first, as it needs nothing to be loaded again. Where the plan says that layers computed
again or streamed free as much and cost less time, they are taken instead.
"""

from collections.abc import Iterator

from studio.core.changes import Change, applied, fewer_rows_at_once, offloading, recomputing, streaming
from studio.core.errors import BadInput
from studio.core.gpu_catalogue import Gpu
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.throughput import speed_of
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of


def smaller(recipe: Recipe, shape: ModelShape | None, gpu: Gpu | None, *, on_card: bool) -> Change | None:
    """Return the change that a training goes on with; None where nothing is left that keeps its result.

    Args:
        recipe: As it runs now.
        shape: Its base model; None where it cannot be sized, so that nothing can be compared.
        gpu: The card, for the time of a step; None where it is not known.
        on_card: Whether the model is on a card: main memory is then another memory.
    """
    fewer = next((change for change in fewer_rows_at_once(recipe, shape) if _halved(recipe, change)), None)
    others = list(_others(recipe, shape, on_card=on_card))
    if fewer is None:
        return others[0] if others else None
    try:
        wanted, fastest = _bytes(recipe, fewer, shape, gpu), _speed(recipe, fewer, shape, gpu)
        best = fewer
        for other in others if wanted and fastest else ():
            needed, speed = _bytes(recipe, other, shape, gpu), _speed(recipe, other, shape, gpu)
            if needed <= wanted and speed > fastest:
                best, fastest = other, speed
    except BadInput:
        return fewer
    return best


def streamed(recipe: Recipe, shape: ModelShape | None, *, on_card: bool) -> Change | None:
    """Return the change after which less of the base lies on the card; None where there is no such change."""
    return next(streaming(recipe, shape), None) if on_card and shape else None


def _halved(recipe: Recipe, change: Change) -> bool:
    return int(dict(change.settings)["train.micro_batch"]) <= (recipe.train.micro_batch + 1) // 2


def _others(recipe: Recipe, shape: ModelShape | None, *, on_card: bool) -> Iterator[Change]:
    """Yield what also makes it smaller: a step at a time, the cheapest first."""
    if shape is not None:
        yield from recomputing(recipe, shape)
        if on_card:
            yield from offloading(recipe, shape)
            yield from streaming(recipe, shape)
    elif recipe.train.recompute not in ("all", "auto"):
        why = "layers are computed once more instead of keeping their activations"
        yield Change((("train.recompute", "all"),), "all layers computed again", "same result", why, (1.0, 1.5))


def _bytes(recipe: Recipe, change: Change, shape: ModelShape | None, gpu: Gpu | None) -> int:
    return estimate_vram(shape, setup_of(applied(recipe, [change]), gpu), gpu).device.expected if shape else 0


def _speed(recipe: Recipe, change: Change, shape: ModelShape | None, gpu: Gpu | None) -> float:
    speed = speed_of(shape, setup_of(applied(recipe, [change]), gpu), gpu) if shape else None
    return speed.expected if speed else 0.0
