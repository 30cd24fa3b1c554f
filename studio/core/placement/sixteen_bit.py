"""The 16-bit base on a card that cannot hold it: what that takes, and what a step then costs beside 4 bits."""

from dataclasses import dataclass
from typing import Any

from studio.core.gpu_catalogue import GIB, Gpu
from studio.core.placement.auto import settled, with_fewest
from studio.core.placement.streaming import HOST_SHARE
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.throughput import time_factor
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup, setup_of


@dataclass(frozen=True, slots=True)
class StreamedWay:
    """The 16-bit base on a card that cannot hold it: layers wait in main memory, and time is the price.

    Attributes:
        settings: What to change in the recommended recipe.
        words: Two sentences: what it takes where, and what a step then costs.
    """

    settings: tuple[tuple[str, Any], ...]
    words: str


def streamed_way(
    recipe: Recipe, shape: ModelShape, gpu: Gpu | None, budget_bytes: int | None, ram_bytes: int | None
) -> StreamedWay | None:
    """Return how the 16-bit base could be trained where 4 bits were chosen for want of room, and at what price.

    The largest micro-batch that fits with all layers streamed is taken, because more tokens hide more of the copies;
    then as few layers as fit.

    Args:
        recipe: The recipe in 4 bits.
        shape: The model.
        gpu: The card; None for none.
        budget_bytes: What is free on it.
        ram_bytes: Main memory of the computer; None where it is not known.
    """
    if recipe.method != "qlora" or shape.quantised or gpu is None or budget_bytes is None:
        return None

    def needs(setup: Setup) -> VramEstimate:
        return estimate_vram(shape, setup, gpu)

    rows, plain = recipe.rows_per_step, recipe.with_("method", "lora").with_("train.recompute", "all")
    for size in (size for size in range(rows, 0, -1) if rows % size == 0):
        tried = plain.with_("train.micro_batch", size).with_("train.accumulation", rows // size)
        if needs(setup_of(tried.with_("model.stream", shape.layers), gpu)).device.high <= budget_bytes:
            break
    else:
        return None
    setup = with_fewest(setup_of(tried.with_("model.stream", "auto"), gpu), shape.layers, budget_bytes, needs)
    estimate, factor = needs(setup), time_factor(shape, setup_of(recipe, gpu), setup, gpu)
    if setup.streamed == 0 or factor is None:
        return None
    where = f"{estimate.host.total / GIB:.1f} GiB of main memory"
    if ram_bytes is not None and estimate.host.total > HOST_SHARE * ram_bytes:
        where += f" (this computer has {ram_bytes / GIB:.1f})"
    words = (
        f"Or keep the base in 16 bit: {setup.streamed} of its {shape.layers} layers wait in {where}, and the card "
        f"takes {estimate.device.expected / GIB:.1f} GiB. By estimate a step lasts {_times(*factor)} as long as in 4 "
        f"bit; no card has run it yet (method lora, model.stream {setup.streamed})."
    )
    changed = ("method", "model.stream", "train.micro_batch", "train.accumulation", "train.recompute")
    settled_recipe = settled(tried.with_("model.stream", "auto"), setup)
    return StreamedWay(tuple((path, settled_recipe.get(path)) for path in changed), words)


def _times(least: float, most: float) -> str:
    return f"about {most:.1f} times" if f"{least:.1f}" == f"{most:.1f}" else f"{least:.1f} to {most:.1f} times"
