"""What a recipe needs on a card, worked out quickly enough to follow a slider.

Nothing here asks a driver or draws: the model and the card were looked at before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from studio.core.errors import BadInput
from studio.core.fit import Fix, Search
from studio.core.gpu_catalogue import Gpu
from studio.core.placement.auto import with_fewest
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.trainable import check_adapted
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.precision_check import check_precision
from studio.core.vram.report import Verdict, VramEstimate
from studio.core.vram.setup import Setup, setup_of
from studio.probe.plan import PlanDevice

ADAPTER_BYTES_PER_PARAMETER = 4
"""Adapters are trained and saved in fp32 (peft's autocast_adapter_dtype)."""

Correction = Callable[[VramEstimate, Setup, Gpu | None], VramEstimate]
"""Corrects an estimate by what earlier runs measured."""

_MOST_ROWS = 4096
"""The largest micro-batch that is tried."""
_WORTH_SAYING_BYTES = 2**24
_REMEMBERED = 4096
"""Results that a forecaster keeps of each kind."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """The estimate of a recipe, and the bytes that a run of it can get, which are None without a card."""

    estimate: VramEstimate
    budget_bytes: int | None

    @property
    def verdict(self) -> Verdict | None:
        """Whether it fits; None without a card."""
        return None if self.budget_bytes is None else self.estimate.verdict(self.budget_bytes)

    @property
    def over_bytes(self) -> int:
        """By how many bytes the expected peak exceeds the budget; 0 where it does not."""
        return 0 if self.budget_bytes is None else max(0, -self.estimate.headroom_bytes(self.budget_bytes))


class Forecaster:
    """Estimates recipes for one model and one card and remembers what it has worked out."""

    def __init__(
        self,
        shape: ModelShape,
        device: PlanDevice,
        correct: Correction | None = None,
        ram_bytes: int | None = None,
    ) -> None:
        """Estimate for a model on a device.

        Args:
            shape: The model.
            device: Its card, or the CPU.
            correct: Corrects an estimate by the runs of this machine; None leaves it as it is.
            ram_bytes: Main memory of the computer; None where it is not known, so that no layer is streamed from there.
        """
        self.shape, self.device, self._correct, self.ram_bytes = shape, device, correct, ram_bytes
        self.longest_tokens: int | None = None
        """Tokens of the longest row of the recipe's data, once they are known. Estimates take rows as full even so."""
        # Caches of this forecaster, which go with it: those of a decorator would be shared and would keep it alive.
        self._estimate = lru_cache(maxsize=_REMEMBERED)(self._worked_out)
        self._largest = lru_cache(maxsize=_REMEMBERED)(self._searched)

    def outlook(self, recipe: Recipe) -> Outlook:
        """Return what a recipe without problems needs, and its budget.

        Raises:
            BadInput: Its targets or its rank do not suit the model.
        """
        return Outlook(self._estimate(self.setup(recipe)), self.device.budget_bytes(recipe))

    def setup(self, recipe: Recipe) -> Setup:
        """Return how a recipe is trained here, with as many layers computed again as it will be.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        budget = self.device.budget_bytes(recipe)
        return with_fewest(setup_of(recipe, self.device.gpu), self.shape.layers, budget, self._estimate)

    def estimate(self, setup: Setup) -> VramEstimate:
        """Return what a set-up takes.

        Raises:
            BadInput: Its targets or its rank do not suit the model.
        """
        return self._estimate(setup)

    def largest_batch(self, recipe: Recipe) -> int | None:
        """Return the largest micro-batch that fits even at the high end of its estimate; None without a budget.

        It is 0 where not even one row fits.

        Raises:
            BadInput: Targets or rank do not suit the model.
        """
        budget = self.device.budget_bytes(recipe)
        # The micro-batch is what is searched, so recipes that differ in nothing else share one answer.
        setup = replace(setup_of(recipe, self.device.gpu), micro_batch=1)
        return None if budget is None else self._largest(setup, budget)

    def fix_that_fits(self, recipe: Recipe) -> Fix | None:
        """Return the gentlest changes after which a recipe fits or is tight; None where there are none.

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

    def fix_for_nothing(self, recipe: Recipe) -> Fix | None:
        """Return the length that all rows need, with what it saves; None where the length is no longer than that.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        fix = self._search(recipe).for_nothing(recipe)
        return fix if fix and fix.saved_bytes >= _WORTH_SAYING_BYTES else None

    def _search(self, recipe: Recipe) -> Search:
        def taken(candidate: Recipe) -> VramEstimate:
            # With auto the estimate is always as large as the budget; what a fix saves is told for all layers.
            return self._estimate(setup_of(candidate, self.device.gpu))

        budget_bytes = self.device.budget_bytes(recipe) or 0
        return Search(self.shape, taken, budget_bytes, self.device.gpu, self.longest_tokens, self.ram_bytes)

    def _worked_out(self, setup: Setup) -> VramEstimate:
        check_adapted(self.shape, setup.adapted)
        check_precision(self.shape, setup)
        estimate = estimate_vram(self.shape, setup, self.device.gpu)
        return self._correct(estimate, setup, self.device.gpu) if self._correct else estimate

    def _searched(self, setup: Setup, budget: int) -> int:
        """Return the most rows that fit: double their number until they are too many, then halve the gap."""
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
