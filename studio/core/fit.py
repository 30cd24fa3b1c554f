"""What makes a recipe fit: the search for the gentlest changes, each with its price in bytes and in time.

What turns out not to be needed is taken back. The screens and the command line search through here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from studio.core.changes import AS_FAST, Change, applied, kinds
from studio.core.gpu_catalogue import CATALOGUE, Gpu
from studio.core.placement.streaming import HOST_SHARE
from studio.core.recipe import Recipe, number_of
from studio.core.shape import ModelShape
from studio.core.throughput import time_factor
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import Verdict, VramEstimate
from studio.core.vram.setup import Setup, setup_of

Estimator = Callable[[Recipe], VramEstimate]

_WORTH_BYTES, _WORTH_SHARE = 2**24, 0.05
"""A change is offered only if it saves at least so many bytes, and at least this share of what is too much."""

_SAME_TIME = 0.02
"""How far a change may move the time of a step without the time being mentioned."""


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
class Fix:
    """A recipe with one or more changes, and where they lead.

    Attributes:
        recipe: The changed recipe.
        changes: What was changed, in order, with the price of each.
        estimate: What the changed recipe takes.
        budget_bytes: What it may take.
    """

    recipe: Recipe
    changes: tuple[Priced, ...]
    estimate: VramEstimate
    budget_bytes: int

    @property
    def fits(self) -> bool:
        """Whether it fits at the high end of its range."""
        return self.estimate.device.high <= self.budget_bytes

    @property
    def verdict(self) -> Verdict:
        """Whether it fits, does nearly, or does not."""
        return self.estimate.verdict(self.budget_bytes)

    @property
    def saved_bytes(self) -> int:
        """What the changes take off the expected peak together."""
        return sum(item.saves_bytes for item in self.changes)

    @property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        """The changed fields with their new values."""
        return tuple(setting for item in self.changes for setting in item.change.settings)

    def made_to(self, recipe: Recipe) -> Recipe:
        """Return a recipe with the changes, which may have been worked out for one that differs elsewhere."""
        return applied(recipe, [item.change for item in self.changes])

    @property
    def words(self) -> str:
        """What is changed, on one line."""
        return "; ".join(item.change.words for item in self.changes)

    @property
    def price(self) -> str:
        """What it costs besides memory, time first; no time where a step takes about as long as before."""
        low = high = 1.0
        for item in self.changes:
            low, high = low * item.time[0], high * item.time[1]
        prices = "; ".join(dict.fromkeys(item.change.price for item in self.changes))
        if max(abs(low - 1), abs(high - 1)) < _SAME_TIME:
            return prices
        ends = [f"{value:.2f}" if value < 1.95 else f"{value:.1f}" for value in (low, high)]
        return f"step x{ends[0] if ends[0] == ends[1] else '-'.join(ends)}; {prices}"


@dataclass(frozen=True, slots=True)
class Fit:
    """The recipe nearest to a given one that fits, and the room that it leaves.

    Attributes:
        fix: What was changed and what came of it; no changes where it fits as it is.
        largest: The largest micro-batch, length and rank that still fit, each alone; None where nothing fits.
        cards: The smallest known cards on which the recipe fits.
        most_parameters: About the most parameters that a model of this build may have to fit so; None where it fits.
    """

    fix: Fix
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
        longest_tokens: Tokens of the longest row of the data, where it is known: a length beyond it buys nothing.
        ram_bytes: Main memory of the computer; None where it is not known, so that no layer is streamed from there.
    """

    shape: ModelShape
    estimate: Estimator
    budget_bytes: int
    gpu: Gpu | None = None
    longest_tokens: int | None = None
    ram_bytes: int | None = None

    def for_nothing(self, recipe: Recipe) -> Fix | None:
        """Return the change that loses nothing, from a length that no row needs; None where there is none.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        if self.longest_tokens is None:
            return None
        change = next(iter(kinds(self.longest_tokens)[0](recipe, self.shape)), None)
        return None if change is None else self._fix(recipe, [change])

    def together(self, recipe: Recipe) -> Fix:
        """Return the gentlest changes that make a recipe fit, or all that help where nothing does.

        Layers are streamed only where nothing else is enough.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        changes, streams = self._needed(recipe), False
        if self.ram_bytes and self.estimate(applied(recipe, changes)).device.expected > self.budget_bytes:
            streamed = self._needed(recipe, streams=True)
            if self._fits(recipe, streamed):
                changes, streams = streamed, True
        return self._fix(recipe, self._gentlest(recipe, changes, streams=streams))

    def alone(self, recipe: Recipe) -> list[Fix]:
        """Return for each kind the smallest change that makes the recipe fit, else the largest that saves enough.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        found = []
        now = self.estimate(recipe).device
        before, worth = now.expected, max(_WORTH_BYTES, _WORTH_SHARE * (now.high - self.budget_bytes))
        for kind in kinds(self.longest_tokens, streams=bool(self.ram_bytes)):
            options = [
                change
                for change in kind(recipe, self.shape)
                if before - self.estimate(applied(recipe, [change])).device.expected >= worth
                and self._host_holds(recipe, [change])
            ]
            enough = next((change for change in options if self._fits(recipe, [change])), None)
            if options:
                found.append(self._fix(recipe, [enough or options[-1]]))
        return found

    def _fix(self, recipe: Recipe, changes: Sequence[Change]) -> Fix:
        """Return the recipe with the changes; the price of each is that beside those before it."""
        before, prices = self.estimate(recipe), []
        for change in changes:
            changed = applied(recipe, [change])
            after = self.estimate(changed)
            time = None
            if change.time != AS_FAST:
                time = time_factor(self.shape, setup_of(recipe, self.gpu), setup_of(changed, self.gpu), self.gpu)
            prices.append(Priced(change, before.device.expected - after.device.expected, time or change.time))
            recipe, before = changed, after
        return Fix(recipe, tuple(prices), before, self.budget_bytes)

    def _host_holds(self, recipe: Recipe, changes: Sequence[Change]) -> bool:
        """Return whether main memory holds the layers that would wait there, where it is known."""
        changed = applied(recipe, changes)
        if not self.ram_bytes or changed.model.stream == recipe.model.stream:
            return True
        return self.estimate(changed).host.total <= HOST_SHARE * self.ram_bytes

    def _needed(self, recipe: Recipe, *, streams: bool = False) -> list[Change]:
        """Return changes, gentle ones first, none of which can be left out; all that help where nothing fits."""
        changes: list[Change] = []
        while not self._fits(recipe, changes):
            found = self._next(recipe, changes, streams=streams)
            if found is None:
                return changes
            changes = [*changes, found]
        for change in reversed(changes):
            without = [other for other in changes if other is not change]
            if self._fits(recipe, without):
                changes = without
        return changes

    def _fits(self, recipe: Recipe, changes: Sequence[Change]) -> bool:
        return self.estimate(applied(recipe, changes)).device.high <= self.budget_bytes

    def _next(self, recipe: Recipe, changes: Sequence[Change], *, streams: bool) -> Change | None:
        """Return the next change to make: of the gentlest kind that helps at all the smallest that is enough.

        Where none of that kind is enough, it is the largest that helps.
        """
        now = applied(recipe, changes)
        high = self.estimate(now).device.high
        for kind in kinds(self.longest_tokens, streams=streams):
            best = None
            for change in kind(now, self.shape):
                if not self._host_holds(now, [change]):
                    continue
                changed = self.estimate(applied(now, [change])).device.high
                if changed <= self.budget_bytes:
                    return change
                if changed < high:
                    best = change
            if best is not None:
                return best
        return None

    def _gentlest(self, recipe: Recipe, changes: list[Change], *, streams: bool) -> list[Change]:
        """Weaken each change as far as the others allow, which gives back the largest micro-batch and longest rows."""
        for place in reversed(range(len(changes))):
            before, after = applied(recipe, changes[:place]), changes[place + 1 :]
            same_kind = (
                option
                for kind in kinds(self.longest_tokens, streams=streams)
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
    *,
    ram_bytes: int | None = None,
) -> Fit:
    """Return the recipe nearest to the given one that fits a budget on a card.

    Args:
        recipe: What is wanted.
        shape: Its base model.
        gpu: The card.
        budget_bytes: What the run may use of it.
        estimate: Returns what a set-up takes on it, where more is known than the shape, such as this machine's runs.
        ram_bytes: Main memory of the computer; None where it is not known, so that no layer is streamed from there.

    Raises:
        BadInput: A target does not exist in this model.
    """

    def taken(candidate: Recipe) -> VramEstimate:
        setup = setup_of(candidate, gpu)
        return estimate(setup) if estimate else estimate_vram(shape, setup, gpu)

    fix = Search(shape, taken, budget_bytes, gpu, ram_bytes=ram_bytes).together(recipe)
    return Fit(
        fix=fix,
        largest={path: _largest(fix, path, taken) if fix.fits else None for path in _LIMITS},
        cards=_cards(fix.recipe, shape),
        most_parameters=None if fix.fits else _most_parameters(fix, shape),
    )


_LIMITS = ("train.micro_batch", "train.seq_len", "adapter.rank")


def _largest(fix: Fix, path: str, taken: Estimator) -> int:
    """Return the largest value of a whole-number field that fits.

    Bisection is enough, since a larger value never takes less memory.
    """
    low, top = int(fix.recipe.get(path)), int(number_of(path).high)
    while low < top:
        middle = (low + top + 1) // 2
        if taken(fix.recipe.with_(path, middle)).device.high <= fix.budget_bytes:
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


def _most_parameters(fix: Fix, shape: ModelShape) -> int:
    """Return about how many parameters would fit, taking all but the context as growing with the model's size."""
    fixed = min(fix.estimate.components.context, fix.budget_bytes)
    per_parameter = max(1, fix.estimate.device.high - fixed) / shape.parameters
    return int(max(0, fix.budget_bytes - fixed) / per_parameter)
