"""What would make a recipe fit its card, gentlest first, each priced by estimating it. Knows no screen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from studio.core.knobs import KNOBS
from studio.core.recipe import Recipe
from studio.tui.forecast import Forecaster, Outlook
from studio.tui.readable import setting

Changes = tuple[tuple[str, Any], ...]

_WORTH_BYTES = 2**24


@dataclass(frozen=True, slots=True)
class Option:
    """A change of the recipe: what it is in words, and what it costs besides memory."""

    words: str
    changes: Changes
    price: str


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
        """What it costs besides memory."""
        return "; ".join(dict.fromkeys(option.price for option in self.options))

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
    found = []
    for kind in _KINDS:
        fix = _enough_of(recipe, forecaster, kind(recipe))
        if fix is not None:
            found.append(fix)
    return found


def fix_that_fits(recipe: Recipe, forecaster: Forecaster) -> Fix | None:
    """Return the gentlest fix that makes a recipe fit: one kind alone, else several together; None where none does.

    Raises:
        BadInput: The recipe cannot be estimated.
    """
    singles = single_fixes(recipe, forecaster)
    alone = next((fix for fix in singles if fix.outlook.verdict == "fits"), None)
    return alone or _together(recipe, forecaster)


def _together(recipe: Recipe, forecaster: Forecaster) -> Fix | None:
    """Add one kind after another until it fits, then drop what was not needed."""
    options: tuple[Option, ...] = ()
    for kind in _KINDS:
        now = _changed(recipe, options)
        fix = _enough_of(now, forecaster, kind(now))
        options += fix.options if fix else ()
        if fix and fix.outlook.verdict == "fits":
            break
    for option in options:
        fewer = tuple(other for other in options if other is not option)
        if fewer and forecaster.outlook(_changed(recipe, fewer)).verdict == "fits":
            options = fewer
    if not options:
        return None
    fix = _fix(recipe, forecaster, options)
    return fix if fix.outlook.verdict != "does not fit" else None


def _changed(recipe: Recipe, options: tuple[Option, ...]) -> Recipe:
    return applied(recipe, tuple(change for option in options for change in option.changes))


def _enough_of(recipe: Recipe, forecaster: Forecaster, kind: list[Option]) -> Fix | None:
    """Return the first of a kind that fits, else its last; None where that saves nothing."""
    best = None
    for option in kind:
        fix = _fix(recipe, forecaster, (option,))
        if fix.saved_bytes >= _WORTH_BYTES:
            best = fix
            if fix.outlook.verdict == "fits":
                break
    return best


def _fix(recipe: Recipe, forecaster: Forecaster, options: tuple[Option, ...]) -> Fix:
    outlook = forecaster.outlook(_changed(recipe, options))
    before = forecaster.outlook(recipe).estimate.device.expected
    return Fix(options, before - outlook.estimate.device.expected, outlook)


def _fewer_rows_at_once(recipe: Recipe) -> Iterator[Option]:
    """Yield smaller micro-batches with as much more accumulation: a step sees the same rows."""
    rows, steps = recipe.train.micro_batch, recipe.train.accumulation
    for fewer in (number for number in range(rows - 1, 0, -1) if rows % number == 0):
        more = steps * rows // fewer
        if more <= KNOBS["train.accumulation"].high:
            words = f"micro-batch {rows} -> {fewer}, accumulation {steps} -> {more}"
            yield Option(words, (("train.micro_batch", fewer), ("train.accumulation", more)), "same rows a step")


def _shorter_rows(recipe: Recipe) -> Iterator[Option]:
    length = recipe.train.seq_len
    for stop in reversed(KNOBS["train.seq_len"].stops):
        if stop < length:
            words = f"length {setting(length)} -> {setting(stop)}"
            yield Option(words, (("train.seq_len", int(stop)),), "longer rows are cut")


def _chunks(recipe: Recipe) -> list[Option]:
    change = (("train.loss", "chunked"),)
    return [Option("loss in chunks", change, "same result")] if recipe.train.loss == "full" else []


def _checkpointing(recipe: Recipe) -> list[Option]:
    change = (("train.grad_checkpointing", True),)
    return [] if recipe.train.grad_checkpointing else [Option("checkpointing on", change, "about a third slower")]


def _small_states(recipe: Recipe) -> list[Option]:
    change = (("train.optimizer", "adamw_8bit"),)
    return [] if "8bit" in recipe.train.optimizer else [Option("8-bit optimizer", change, "nearly the same result")]


def _double_quant(recipe: Recipe) -> list[Option]:
    change = (("model.double_quant", True),)
    off = recipe.method == "qlora" and not recipe.model.double_quant
    return [Option("double quantisation on", change, "nearly the same result")] if off else []


def _four_bits(recipe: Recipe) -> list[Option]:
    change = (("method", "qlora"),)
    return [Option("QLoRA 4-bit", change, "slower, the base loses a little")] if recipe.method == "lora" else []


_KINDS: tuple[Callable[[Recipe], list[Option]], ...] = (
    lambda recipe: list(_fewer_rows_at_once(recipe)),
    _chunks,
    _checkpointing,
    _small_states,
    _double_quant,
    lambda recipe: list(_shorter_rows(recipe)),
    _four_bits,
)
"""The kinds of change, gentlest first; within a kind the smallest change first. A kind may have nothing to offer."""
