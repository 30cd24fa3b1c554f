"""The recipe that fits: what to change so that a run fits a budget, in the order that costs least quality and speed.

Every change is priced in bytes and in time. What turns out not to be needed is taken back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from studio.core.gpu_catalogue import CATALOGUE, Gpu
from studio.core.knobs import KNOBS
from studio.core.recipe import ALL_LINEAR, Recipe
from studio.core.shape import ModelShape
from studio.core.vram.estimate import VramEstimate, estimate_vram
from studio.core.vram.setup import setup_of

_LONGEST_WORTHWHILE = 256
"""Tokens below which rows are not shortened further: most instruction rows would be cut."""

_LEAST_RANK = 8


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a recipe.

    Attributes:
        settings: The fields it changes, with their new values.
        why: What it does and what it costs, for a user.
        time: Lowest and highest factor on the time of a step.
        saves_bytes: What it takes off the high end, beside the changes before it.
    """

    settings: tuple[tuple[str, Any], ...]
    why: str
    time: tuple[float, float]
    saves_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found.

    Attributes:
        recipe: The recipe with all changes; the nearest one where nothing fits.
        changes: What was changed, in order.
        estimate: Its estimate.
        fits: Whether it fits at the high end of its range.
        largest: The largest micro-batch, length and rank that still fit, each alone; None where nothing fits.
        cards: The smallest known cards on which the recipe fits.
    """

    recipe: Recipe
    changes: tuple[Change, ...]
    estimate: VramEstimate
    fits: bool
    largest: dict[str, int | None]
    cards: tuple[Gpu, ...]


def fit(recipe: Recipe, shape: ModelShape, gpu: Gpu, budget_bytes: int) -> Fit:
    """Return the recipe nearest to the given one that fits a budget on a card.

    Args:
        recipe: What is wanted.
        shape: Its base model.
        gpu: The card.
        budget_bytes: What the run may use of it.

    Raises:
        BadInput: A target does not exist in this model.
    """

    def high(candidate: Recipe) -> int:
        return estimate_vram(shape, setup_of(candidate, bf16=gpu.bf16), gpu).device.high

    changes = _needed(recipe, list(_until(recipe, shape, high, budget_bytes)), high, budget_bytes)
    found = _applied(recipe, changes)
    estimate = estimate_vram(shape, setup_of(found, bf16=gpu.bf16), gpu)
    fits = estimate.device.high <= budget_bytes
    limits = {path: _largest(found, path, high, budget_bytes) if fits else None for path in _LIMITS}
    return Fit(found, tuple(_priced(recipe, changes, high)), estimate, fits, limits, _cards(found, shape))


_LIMITS = ("train.micro_batch", "train.seq_len", "adapter.rank")


def _applied(recipe: Recipe, changes: list[Change]) -> Recipe:
    for change in changes:
        for path, value in change.settings:
            recipe = recipe.with_(path, value)
    return recipe


def _until(recipe: Recipe, shape: ModelShape, high: Callable[[Recipe], int], budget: int) -> Iterator[Change]:
    """Yield changes, cheapest first, until the recipe fits or nothing is left to change; skip what saves nothing."""
    bytes_now = high(recipe)
    while bytes_now > budget:
        for change in _candidates(recipe, shape):
            changed = _applied(recipe, [change])
            less = high(changed)
            if less < bytes_now:
                yield change
                recipe, bytes_now = changed, less
                break
        else:
            return


def _needed(recipe: Recipe, changes: list[Change], high: Callable[[Recipe], int], budget: int) -> list[Change]:
    """Take back what a later change has made superfluous, and leave the micro-batch as large as the others allow."""
    if high(_applied(recipe, changes)) > budget:
        return changes
    for change in list(changes):
        without = [other for other in changes if other is not change]
        if high(_applied(recipe, without)) <= budget:
            changes = without
    if not any(_is_smaller_batch(change) for change in changes):
        return changes
    others = [change for change in changes if not _is_smaller_batch(change)]
    sizes = (
        size
        for size in _micro_batches(recipe)
        if high(_applied(recipe, [*others, _micro_batch(recipe, size)])) <= budget
    )
    return [_micro_batch(recipe, next(sizes, 1)), *others]


def _is_smaller_batch(change: Change) -> bool:
    return change.settings[0][0] == "train.micro_batch"


def _micro_batches(recipe: Recipe) -> list[int]:
    """Return the micro-batches below the recipe's own that divide its effective batch, largest first."""
    return [size for size in range(recipe.train.micro_batch - 1, 0, -1) if recipe.rows_per_step % size == 0]


def _micro_batch(recipe: Recipe, size: int) -> Change:
    settings = (("train.micro_batch", size), ("train.accumulation", recipe.rows_per_step // size))
    return Change(settings, "fewer rows at once and more accumulation: the same step, a little slower", (1.0, 1.3))


def _priced(recipe: Recipe, changes: list[Change], high: Callable[[Recipe], int]) -> Iterator[Change]:
    before = high(recipe)
    for change in changes:
        recipe = _applied(recipe, [change])
        after = high(recipe)
        yield Change(change.settings, change.why, change.time, before - after)
        before = after


def _candidates(recipe: Recipe, shape: ModelShape) -> Iterator[Change]:
    """Yield what can still be changed: first what costs nothing, then time, then quality, then data."""
    train = recipe.train
    if train.loss == "full":
        yield Change(
            (("train.loss", "chunked"),), "the head in chunks: the same loss, whole logits never exist", (0.95, 1.05)
        )
    if train.attention == "eager":
        yield Change(
            (("train.attention", "sdpa"),), "fused attention: the same result without S x S matrices", (0.5, 1.0)
        )
    if train.micro_batch > 1:
        yield _micro_batch(recipe, next(size for size in _micro_batches(recipe) if 2 * size <= train.micro_batch))
    if not train.grad_checkpointing:
        yield Change(
            (("train.grad_checkpointing", True),),
            "layers are computed again in the backward: the same result, one more forward",
            (1.3, 1.5),
        )
    if train.optimizer == "adamw_torch":
        yield Change(
            (("train.optimizer", "paged_adamw_8bit"),), "optimizer state in 8 bits, paged to the host", (1.0, 1.1)
        )
    if recipe.model.dtype == "fp32":
        yield Change((("model.dtype", "auto"),), "16-bit weights and products", (0.4, 1.0))
    if recipe.method == "lora":
        yield Change((("method", "qlora"),), "4-bit weights: a little quality, more on models below 4 B", (1.2, 2.0))
    elif not recipe.model.double_quant:
        yield Change(
            (("model.double_quant", True),), "scales quantised again: no loss that was ever measured", (1.0, 1.05)
        )
    if recipe.adapter.rank > _LEAST_RANK:
        rank = max(_LEAST_RANK, recipe.adapter.rank // 2)
        yield Change((("adapter.rank", rank),), "a narrower adapter: it can learn less", (0.97, 1.0))
    if train.seq_len > _LONGEST_WORTHWHILE:
        length = max(_LONGEST_WORTHWHILE, train.seq_len // 2)
        yield Change((("train.seq_len", length),), "longer rows are cut: their ends are not learnt", (0.4, 0.6))
    if recipe.adapter.targets == ALL_LINEAR:
        projections = shape.groups[0].layer.qkv
        names = tuple(dict.fromkeys((projections[0].name, projections[-1].name)))
        yield Change((("adapter.targets", names),), "adapters on queries and values alone", (0.7, 0.9))


def _largest(recipe: Recipe, path: str, high: Callable[[Recipe], int], budget: int) -> int | None:
    """Return the largest value of a whole-number field that fits, by halving; a larger value never takes less."""
    low, top = int(recipe.get(path)), int(KNOBS[path].high)
    if high(recipe) > budget:
        return None
    while low < top:
        middle = (low + top + 1) // 2
        if high(recipe.with_(path, middle)) <= budget:
            low = middle
        else:
            top = middle - 1
    return low


def _cards(recipe: Recipe, shape: ModelShape) -> tuple[Gpu, ...]:
    """Return the three smallest known cards on which a recipe fits, one of each size."""
    found: dict[int, Gpu] = {}
    for gpu in sorted(CATALOGUE.values(), key=lambda card: card.total_bytes):
        if gpu.total_bytes not in found:
            needed = estimate_vram(shape, setup_of(recipe, bf16=gpu.bf16), gpu).device.high
            if needed <= gpu.total_bytes:
                found[gpu.total_bytes] = gpu
        if len(found) == 3:
            break
    return tuple(found.values())
