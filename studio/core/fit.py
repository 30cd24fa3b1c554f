"""The recipe that fits: what to change so that a run fits a budget, in the order that costs least quality and speed.

Every change is priced in bytes and in time. A change that later ones make needless is taken back. Screen and command
line search with this module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from studio.core.changes import KINDS, Change, applied
from studio.core.gpu_catalogue import CATALOGUE, Gpu
from studio.core.recipe import Recipe, number_of
from studio.core.shape import ModelShape
from studio.core.throughput import time_factor
from studio.core.vram.estimate import VramEstimate, estimate_vram
from studio.core.vram.setup import Setup, setup_of

Estimator = Callable[[Recipe], VramEstimate]

_WORTH_BYTES, _WORTH_SHARE = 2**24, 0.05
"""A change is offered only if it takes off so many bytes, and such a share of what the recipe takes too much."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A change with its price.

    Attributes:
        change: What is changed.
        saves_bytes: What it takes off the expected peak, after the changes before it.
        time: Lowest and highest factor on the time of a step, after the changes before it.
    """

    change: Change
    saves_bytes: int
    time: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found.

    Attributes:
        recipe: The recipe with all changes; the nearest one where nothing fits.
        changes: What was changed, in order.
        estimate: Its estimate.
        fits: Whether it fits at the high end of its range.
        largest: The largest micro-batch, length and rank that still fit, each changed alone; None where nothing fits.
        cards: The smallest known cards on which the recipe fits.
        most_parameters: About how many parameters a model of the same build could have and fit; None where it fits.
    """

    recipe: Recipe
    changes: tuple[Priced, ...]
    estimate: VramEstimate
    fits: bool
    largest: dict[str, int | None]
    cards: tuple[Gpu, ...]
    most_parameters: int | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for the gentlest changes that make a recipe fit.

    Attributes:
        shape: The base model.
        estimate: Returns what a recipe takes.
        budget_bytes: What it may take.
        gpu: The card, for the price in time; None takes the range that each change has for any card.
    """

    shape: ModelShape
    estimate: Estimator
    budget_bytes: int
    gpu: Gpu | None = None

    def together(self, recipe: Recipe) -> list[Change]:
        """Return the gentlest changes that make a recipe fit, or all that help where nothing does.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        changes: list[Change] = []
        while not self._fits(recipe, changes):
            found = self._next(recipe, changes)
            if found is None:
                return changes
            changes = [*changes, found]
        # A strong change at the end may have made weaker ones before it needless.
        for change in reversed(changes):
            without = [other for other in changes if other is not change]
            if self._fits(recipe, without):
                changes = without
        return self._gentlest(recipe, changes)

    def alone(self, recipe: Recipe) -> list[Change]:
        """Return for each kind the smallest change that makes the recipe fit, else the largest that saves enough.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        found = []
        now = self.estimate(recipe).device
        before, worth = now.expected, max(_WORTH_BYTES, _WORTH_SHARE * (now.high - self.budget_bytes))
        for kind in KINDS:
            options = [
                change
                for change in kind(recipe, self.shape)
                if before - self.estimate(applied(recipe, [change])).device.expected >= worth
            ]
            enough = next((change for change in options if self._fits(recipe, [change])), None)
            if options:
                found.append(enough or options[-1])
        return found

    def priced(self, recipe: Recipe, changes: Sequence[Change]) -> tuple[Priced, ...]:
        """Return changes with what each saves and costs after those before it."""
        prices = []
        for change in changes:
            after = applied(recipe, [change])
            saved = self.estimate(recipe).device.expected - self.estimate(after).device.expected
            time = time_factor(self.shape, self._setup(recipe), self._setup(after), self.gpu) or change.time
            prices.append(Priced(change, saved, time))
            recipe = after
        return tuple(prices)

    def _setup(self, recipe: Recipe) -> Setup:
        return setup_of(recipe, self.gpu)

    def _fits(self, recipe: Recipe, changes: Sequence[Change]) -> bool:
        return self.estimate(applied(recipe, changes)).device.high <= self.budget_bytes

    def _next(self, recipe: Recipe, changes: Sequence[Change]) -> Change | None:
        """Return the next change to make: of the gentlest kind that helps at all the smallest that is enough.

        Where none of that kind is enough, it is the largest that helps.
        """
        now = applied(recipe, changes)
        high = self.estimate(now).device.high
        for kind in KINDS:
            best = None
            for change in kind(now, self.shape):
                changed = self.estimate(applied(now, [change])).device.high
                if changed <= self.budget_bytes:
                    return change
                if changed < high:
                    best = change
            if best is not None:
                return best
        return None

    def _gentlest(self, recipe: Recipe, changes: list[Change]) -> list[Change]:
        """Weaken each change as far as the others allow, which gives back the largest micro-batch and longest rows."""
        for place in reversed(range(len(changes))):
            before, after = applied(recipe, changes[:place]), changes[place + 1 :]
            same_kind = (
                option
                for kind in KINDS
                for option in kind(before, self.shape)
                if option.settings[0][0] == changes[place].settings[0][0]
            )
            enough = next((option for option in same_kind if self._fits(before, [option, *after])), changes[place])
            changes = [*changes[:place], enough, *after]
        return changes


def fit(
    recipe: Recipe,
    shape: ModelShape,
    gpu: Gpu,
    budget_bytes: int,
    estimate: Callable[[Setup], VramEstimate] | None = None,
) -> Fit:
    """Return the recipe nearest to the given one that fits a budget on a card.

    Args:
        recipe: What is wanted.
        shape: Its base model.
        gpu: The card.
        budget_bytes: What the run may use of it.
        estimate: Returns what a set-up takes on it, where more is known than the shape, such as this machine's runs.

    Raises:
        BadInput: A target does not exist in this model.
    """

    def taken(candidate: Recipe) -> VramEstimate:
        setup = setup_of(candidate, gpu)
        return estimate(setup) if estimate else estimate_vram(shape, setup, gpu)

    search = Search(shape, taken, budget_bytes, gpu)
    changes = search.together(recipe)
    found = applied(recipe, changes)
    result = taken(found)
    fits = result.device.high <= budget_bytes
    limits = {path: _largest(found, path, taken, budget_bytes) if fits else None for path in _LIMITS}
    return Fit(
        recipe=found,
        changes=search.priced(recipe, changes),
        estimate=result,
        fits=fits,
        largest=limits,
        cards=_cards(found, shape),
        most_parameters=None if fits else _most_parameters(result, shape, budget_bytes),
    )


_LIMITS = ("train.micro_batch", "train.seq_len", "adapter.rank")


def _largest(recipe: Recipe, path: str, taken: Estimator, budget: int) -> int | None:
    """Return the largest value of a whole-number field that fits.

    Bisection is enough, since a larger value never takes less memory.
    """
    low, top = int(recipe.get(path)), int(number_of(path).high)
    while low < top:
        middle = (low + top + 1) // 2
        if taken(recipe.with_(path, middle)).device.high <= budget:
            low = middle
        else:
            top = middle - 1
    return low


def _cards(recipe: Recipe, shape: ModelShape) -> tuple[Gpu, ...]:
    """Return the three smallest known cards on which a recipe fits, one of each size."""
    found: dict[int, Gpu] = {}
    for gpu in sorted(CATALOGUE.values(), key=lambda card: card.total_bytes):
        if gpu.total_bytes not in found:
            needed = estimate_vram(shape, setup_of(recipe, gpu), gpu).device.high
            if needed <= gpu.total_bytes:
                found[gpu.total_bytes] = gpu
        if len(found) == 3:
            break
    return tuple(found.values())


def _most_parameters(estimate: VramEstimate, shape: ModelShape, budget_bytes: int) -> int:
    """Return about how many parameters would fit, taking all but the context as growing with the model's size."""
    fixed = min(estimate.components.context, budget_bytes)
    per_parameter = max(1, estimate.device.high - fixed) / shape.parameters
    return int(max(0, budget_bytes - fixed) / per_parameter)
