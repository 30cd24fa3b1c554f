"""What a recipe needs on a card, quickly enough to follow a slider. No driver, no disk, no screen."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from studio.core.errors import BadInput
from studio.core.fit import Fix, Search
from studio.core.gpu_catalogue import Gpu
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.trainable import check_adapted
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import Verdict, VramEstimate
from studio.core.vram.setup import Setup, setup_of
from studio.probe.plan import PlanDevice

ADAPTER_BYTES_PER_PARAMETER = 4
"""Adapters are trained and saved in fp32 (peft's autocast_adapter_dtype)."""

Correction = Callable[[VramEstimate, Setup, Gpu | None], VramEstimate]

_MOST_ROWS = 4096
_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Outlook:
    """An estimate and the bytes that it may take; None without a card."""

    estimate: VramEstimate
    budget_bytes: int | None

    @property
    def verdict(self) -> Verdict | None:
        """Whether it fits; None without a card."""
        return None if self.budget_bytes is None else self.estimate.verdict(self.budget_bytes)

    @property
    def over_bytes(self) -> int:
        """What the expected peak has beyond the budget, 0 where it has nothing."""
        return 0 if self.budget_bytes is None else max(0, -self.estimate.headroom_bytes(self.budget_bytes))


class Forecaster:
    """Estimates recipes for one model and one card and remembers what it has worked out."""

    def __init__(self, shape: ModelShape, device: PlanDevice, correct: Correction | None = None) -> None:
        """Estimate for a model on a device.

        Args:
            shape: The model.
            device: Its card, or the CPU.
            correct: What this machine's own runs make of an estimate.
        """
        self.shape, self.device, self._correct = shape, device, correct
        self._estimate = lru_cache(maxsize=_REMEMBERED)(self._worked_out)
        self._largest = lru_cache(maxsize=_REMEMBERED)(self._searched)

    def outlook(self, recipe: Recipe) -> Outlook:
        """Return what a sound recipe needs and may take.

        Raises:
            BadInput: Its targets or its rank do not suit the model.
        """
        return Outlook(self._estimate(setup_of(recipe, self.device.gpu)), self.device.budget_bytes(recipe))

    def largest_batch(self, recipe: Recipe) -> int | None:
        """Return the largest micro-batch that fits at the high end of its range; 0 for none, None without a budget.

        Raises:
            BadInput: Targets or rank do not suit the model.
        """
        budget = self.device.budget_bytes(recipe)
        setup = replace(setup_of(recipe, self.device.gpu), micro_batch=1)
        return None if budget is None else self._largest(setup, budget)

    def fix_that_fits(self, recipe: Recipe) -> Fix | None:
        """Return the gentlest changes that make a recipe fit, or nearly fit; None where nothing does.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        fix = self._search(recipe).together(recipe)
        return fix if fix.changes and fix.verdict != "does not fit" else None

    def single_fixes(self, recipe: Recipe) -> list[Fix]:
        """Return one fix of each kind that saves something, the gentlest kind first.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        return self._search(recipe).alone(recipe)

    def _search(self, recipe: Recipe) -> Search:
        def taken(candidate: Recipe) -> VramEstimate:
            return self.outlook(candidate).estimate

        return Search(self.shape, taken, self.device.budget_bytes(recipe) or 0, self.device.gpu)

    def _worked_out(self, setup: Setup) -> VramEstimate:
        check_adapted(self.shape, setup.adapted)
        estimate = estimate_vram(self.shape, setup, self.device.gpu)
        return self._correct(estimate, setup, self.device.gpu) if self._correct else estimate

    def _searched(self, setup: Setup, budget: int) -> int:
        """Double until it is too much, then halve the gap."""
        fitting, too_much = 0, 1
        while too_much <= _MOST_ROWS and self._fits(setup, too_much, budget):
            fitting, too_much = too_much, 2 * too_much
        while too_much - fitting > 1 and fitting < _MOST_ROWS:
            middle = (fitting + too_much) // 2
            fitting, too_much = (middle, too_much) if self._fits(setup, middle, budget) else (fitting, middle)
        return fitting

    def _fits(self, setup: Setup, rows: int, budget: int) -> bool:
        return self._estimate(replace(setup, micro_batch=rows)).device.high <= budget


def outlook_or_reason(forecaster: Forecaster, recipe: Recipe) -> Outlook | str:
    """Return the outlook of a recipe, or why there is none."""
    if recipe.problems():
        return "no estimate: the recipe has problems"
    try:
        return forecaster.outlook(recipe)
    except BadInput as error:
        return str(error)
