"""The plan of a run on this machine: the estimate for a recipe and the card it will use."""

from dataclasses import dataclass, replace
from typing import Any

from studio.core.errors import StudioError
from studio.core.gpu_catalogue import GIB, Gpu, find_gpu
from studio.core.placement.auto import with_fewest
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import as_it_lies, setup_of
from studio.probe.cards import Card
from studio.probe.device import Place, place_of
from studio.probe.models import BaseFound
from studio.probe.pace import calibrated_estimate, pace_of, pace_to_dict
from studio.probe.setting import CARD_USED
from studio.probe.shape import shape_of_base


@dataclass(frozen=True, slots=True)
class PlanDevice:
    """The device that a plan is for: a card of this machine, a GPU of the catalogue, or the CPU.

    Attributes:
        gpu: What is known of the card or GPU; None for the CPU, and for a card that does not tell its size.
        free_bytes: What a run can get of it now; None where that is not known.
        card: The card of this machine as it is now; None for a GPU of the catalogue, and for the CPU.
        refusal: Why a run could not start on it here; empty where it could, and for a GPU of the catalogue.
    """

    gpu: Gpu | None = None
    free_bytes: int | None = None
    card: Card | None = None
    refusal: str = ""

    def budget_bytes(self, recipe: Recipe) -> int | None:
        """Return what a run may use of it: what is free, at most the recipe's own budget; None without either."""
        wanted = int(recipe.device.budget_gib * GIB) or None
        return min((limit for limit in (self.free_bytes, wanted) if limit is not None), default=None)


def device_of(place: Place) -> PlanDevice:
    """Return the device of this machine on which a job would run."""
    card = place.card
    if card is None:
        return PlanDevice(refusal=place.refusal)
    free = card.total_bytes if card.free_bytes is None else card.free_bytes
    return PlanDevice(known_gpu(card), free, card, place.refusal)


def device_from_catalogue(gpu: Gpu) -> PlanDevice:
    """Return the device of a plan for a GPU of the catalogue, with nothing else on it."""
    return PlanDevice(gpu, gpu.total_bytes)


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
        device = device_of(place_of(recipe.device.device) if place is None else place)
        gpu, card = device.gpu, device.card
        setup = replace(setup_of(recipe, gpu), device="cuda" if card else "cpu")
        setup = as_it_lies(setup, shape.quantised)
        budget = device.budget_bytes(recipe)
        setup = with_fewest(setup, shape.layers, budget, lambda tried: calibrated_estimate(shape, tried, gpu))
        estimate = calibrated_estimate(shape, setup, gpu)
        plan = plan_to_dict(estimate, shape, setup, gpu=gpu, budget_bytes=budget)
        pace = pace_to_dict(pace_of(recipe, shape, setup, gpu))
        return {**plan, **pace, CARD_USED: card.used_bytes if card else None, "card": _named(card)}
    except StudioError as error:
        return {"estimate": None, "why": plain(str(error))}
    except Exception as error:  # noqa: BLE001  an odd model must never keep a run from starting
        return {"estimate": None, "why": plain(f"{type(error).__name__}: {error}", one_line=True, limit=300)}


def _named(card: Card | None) -> dict[str, Any] | None:
    """Return what identifies a card, as the run records the card that it used."""
    return None if card is None else {"name": card.name, "uuid": card.uuid, "pci": card.pci}


def known_gpu(card: Card) -> Gpu | None:
    """Return what is known of a real card: its own total and capability, the rest from the catalogue.

    An instance of a divided card (MIG) is taken to have the same share of its speed and bandwidth as of its memory.
    """
    if card.total_bytes is None:
        return None
    # A card that the catalogue does not know has its own size and no speed: memory is planned, time is not.
    try:
        listed = find_gpu(card.name)
    except StudioError:
        listed = Gpu(card.name, card.total_bytes)
    return replace(
        listed,
        name=card.name,
        share=min(1.0, card.total_bytes / listed.total_bytes) if card.mig else 1.0,
        total_bytes=card.total_bytes,
        compute_capability=card.capability or listed.compute_capability,
    )
