"""What would make a recipe fit its card, gentlest first, for the screen; `studio.core.fit` does the search."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from studio.core.changes import Change
from studio.core.changes import applied as with_changes
from studio.core.fit import Search
from studio.core.recipe import Recipe
from studio.tui.forecast import Forecaster, Outlook

Changes = tuple[tuple[str, Any], ...]

_SAME_TIME = 0.02


@dataclass(frozen=True, slots=True)
class Option:
    """A change of the recipe.

    Attributes:
        words: What it is.
        changes: Paths and their new values.
        price: What it costs besides memory and time.
        time: Lowest and highest factor on the time of a step.
    """

    words: str
    changes: Changes
    price: str
    time: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Fix:
    """One or more options, with what they save and where that leads.

    Attributes:
        options: What is changed, in order.
        saved_bytes: Expected peak less than before.
        outlook: What the changed recipe needs.
    """

    options: tuple[Option, ...]
    saved_bytes: int
    outlook: Outlook

    @property
    def words(self) -> str:
        """What is changed, on one line."""
        return "; ".join(option.words for option in self.options)

    @property
    def price(self) -> str:
        """What it costs besides memory, time first."""
        prices = "; ".join(dict.fromkeys(option.price for option in self.options))
        return f"{self.time_words}; {prices}" if self.time_words else prices

    @property
    def time_words(self) -> str:
        """What it does to the time of a step, such as `step x1.3-1.4`; nothing where it changes nothing."""
        low = high = 1.0
        for option in self.options:
            low, high = low * option.time[0], high * option.time[1]
        if max(abs(low - 1), abs(high - 1)) < _SAME_TIME:
            return ""
        ends = [f"{value:.2f}" if value < 1.95 else f"{value:.1f}" for value in (low, high)]
        return f"step x{ends[0]}" if ends[0] == ends[1] else f"step x{ends[0]}-{ends[1]}"

    @property
    def changes(self) -> Changes:
        """Paths and their new values."""
        return tuple(change for option in self.options for change in option.changes)


def applied(recipe: Recipe, changes: Changes) -> Recipe:
    """Return the recipe with the changes made."""
    for path, value in changes:
        recipe = recipe.with_(path, value)
    return recipe


def single_fixes(recipe: Recipe, forecaster: Forecaster) -> list[Fix]:
    """Return one fix of each kind that saves something, gentlest kind first; it fits, or is all that kind can do.

    Raises:
        BadInput: The recipe cannot be estimated.
    """
    search = _search(recipe, forecaster)
    return [_fix(recipe, forecaster, search, [change]) for change in search.alone(recipe)]


def fix_that_fits(recipe: Recipe, forecaster: Forecaster) -> Fix | None:
    """Return the gentlest fix that makes a recipe fit, or comes close; None where none does.

    Raises:
        BadInput: The recipe cannot be estimated.
    """
    search = _search(recipe, forecaster)
    changes = search.together(recipe)
    if not changes:
        return None
    fix = _fix(recipe, forecaster, search, changes)
    return fix if fix.outlook.verdict != "does not fit" else None


def _search(recipe: Recipe, forecaster: Forecaster) -> Search:
    budget = forecaster.device.budget_bytes(recipe)
    return Search(
        shape=forecaster.shape,
        estimate=lambda candidate: forecaster.outlook(candidate).estimate,
        budget_bytes=0 if budget is None else budget,
        gpu=forecaster.device.gpu,
    )


def _fix(recipe: Recipe, forecaster: Forecaster, search: Search, changes: Sequence[Change]) -> Fix:
    options = tuple(
        Option(item.change.words, item.change.settings, item.change.price, item.time)
        for item in search.priced(recipe, changes)
    )
    outlook = forecaster.outlook(with_changes(recipe, changes))
    before = forecaster.outlook(recipe).estimate.device.expected
    return Fix(options, before - outlook.estimate.device.expected, outlook)
