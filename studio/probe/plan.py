"""The plan of a run on this machine: the estimate for a recipe and the card it will use."""

from dataclasses import replace
from typing import Any

from studio.core.errors import StudioError
from studio.core.gpu_catalogue import GIB, Gpu, find_gpu
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.prequantised import as_it_lies
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import setup_of
from studio.probe.device import Place, place_of
from studio.probe.gpus import Gpu as Reading
from studio.probe.models import BaseFound
from studio.probe.pace import calibrated, pace_of, pace_to_dict
from studio.probe.setting import CARD_USED
from studio.probe.shape import shape_of_base


def plan_for(recipe: Recipe, base: BaseFound, *, place: Place | None = None) -> dict[str, Any]:
    """Return the plan of a recipe as `plan.json` holds it.

    A model that cannot be sized gives `{"estimate": None, "why": ...}`; nothing is raised.

    Args:
        recipe: What will run.
        base: Its base model.
        place: Where it will run; None looks.
    """
    try:
        shape = shape_of_base(base)
        reading = (place_of(recipe.device.device) if place is None else place).card
        gpu = known_gpu(reading) if reading else None
        setup = replace(setup_of(recipe, gpu), device="cuda" if reading else "cpu")
        setup = as_it_lies(setup, shape.quantised)
        estimate = calibrated(estimate_vram(shape, setup, gpu), setup, gpu)
        plan = plan_to_dict(estimate, shape, setup, gpu=gpu, budget_bytes=budget_of(recipe, reading))
        pace = pace_to_dict(pace_of(recipe, shape, setup, gpu))
        return {**plan, **pace, CARD_USED: _used(reading), "card": _named(reading)}
    except StudioError as error:
        return {"estimate": None, "why": plain(str(error))}
    except Exception as error:  # noqa: BLE001  an odd model must never keep a run from starting
        return {"estimate": None, "why": plain(f"{type(error).__name__}: {error}", one_line=True, limit=300)}


def _used(reading: Reading | None) -> int | None:
    return reading.used_bytes if reading else None


def _named(reading: Reading | None) -> dict[str, Any] | None:
    """Return what names a card for good, as the run records the one that it used."""
    return None if reading is None else {"name": reading.name, "uuid": reading.uuid, "pci": reading.pci}


def known_gpu(reading: Reading) -> Gpu | None:
    """Return what is known of a real card: its own total and capability, the rest from the catalogue.

    An instance of a card that is cut into some computes and moves about as large a share as it has of the memory.
    """
    if reading.total_bytes is None:
        return None
    try:
        listed = find_gpu(reading.name)
    except StudioError:
        listed = Gpu(reading.name, reading.total_bytes)
    return replace(
        listed,
        name=reading.name,
        share=min(1.0, reading.total_bytes / listed.total_bytes) if reading.mig else 1.0,
        total_bytes=reading.total_bytes,
        compute_capability=reading.capability or listed.compute_capability,
    )


def budget_of(recipe: Recipe, reading: Reading | None) -> int | None:
    """Return the bytes that a run may use: what is free on the card now, and no more than the recipe's budget."""
    free = None if reading is None else reading.free_bytes if reading.free_bytes is not None else reading.total_bytes
    wanted = int(recipe.device.budget_gib * GIB) or None
    limits = [limit for limit in (free, wanted) if limit is not None]
    return min(limits, default=None)
