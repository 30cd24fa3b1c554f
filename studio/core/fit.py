"""What makes a recipe fit: everything that can be changed about it, and the search for the gentlest changes.

Gentle means: first what costs nothing, then what costs time, then what costs quality, then what costs data. Every
change has a price in bytes and in time. What turns out not to be needed is taken back. The screens and the command line
search through here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from studio.core.gpu_catalogue import CATALOGUE, Gpu
from studio.core.recipe import Recipe, number_of
from studio.core.shape import ModelShape
from studio.core.throughput import time_factor
from studio.core.value_kinds import ALL_LINEAR
from studio.core.vram.estimate import Verdict, VramEstimate, estimate_vram
from studio.core.vram.setup import Setup, setup_of

Estimator = Callable[[Recipe], VramEstimate]

_SHORTEST_WORTHWHILE = 256
"""Tokens below which rows are not shortened further: most instruction rows would be cut."""

_LEAST_RANK = 8

_SAME, _NEARLY = "same result", "nearly the same result"

_MOST_ACCUMULATION = int(number_of("train.accumulation").high)

_WORTH_BYTES, _WORTH_SHARE = 2**24, 0.05
"""A change is offered only if it takes off so many bytes, and such a share of what the recipe takes too much."""

_SAME_TIME = 0.02
"""What the time of a step may change by without being worth a word."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a recipe.

    Attributes:
        settings: The fields it changes, with their new values.
        words: What is changed, for a user.
        price: What it costs besides memory and time, in a few words.
        why: The same in a sentence.
        time: Lowest and highest factor on the time of a step where nobody can compute it.
    """

    settings: tuple[tuple[str, Any], ...]
    words: str
    price: str
    why: str
    time: tuple[float, float]


Kind = Callable[[Recipe, ModelShape], Iterable[Change]]


def applied(recipe: Recipe, changes: Iterable[Change]) -> Recipe:
    """Return the recipe with the changes made."""
    for change in changes:
        for path, value in change.settings:
            recipe = recipe.with_(path, value)
    return recipe


def _chunked_loss(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.train.loss == "full":
        settings = (("train.loss", "chunked"),)
        yield Change(settings, "loss in chunks", _SAME, "the same result: whole logits never exist", (0.95, 1.05))


def _fused_attention(recipe: Recipe, shape: ModelShape) -> Iterator[Change]:
    if recipe.train.attention == "eager" and shape.fused_attention:
        settings = (("train.attention", "sdpa"),)
        yield Change(settings, "fused attention", _SAME, "the same result without S x S matrices", (0.5, 1.0))


def _fewer_rows_at_once(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    """Yield smaller micro-batches with as much more accumulation: a step sees the same rows."""
    rows, steps = recipe.train.micro_batch, recipe.train.accumulation
    for fewer in range(rows - 1, 0, -1):
        more, rest = divmod(rows * steps, fewer)
        if rest == 0 and more <= _MOST_ACCUMULATION:
            settings = (("train.micro_batch", fewer), ("train.accumulation", more))
            words = f"micro-batch {rows} -> {fewer}, accumulation {steps} -> {more}"
            yield Change(settings, words, "same rows a step", "a step sees the same rows", (1.0, 1.3))


def _checkpointing(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if not recipe.train.grad_checkpointing:
        settings = (("train.grad_checkpointing", True),)
        yield Change(settings, "checkpointing on", _SAME, "the same result: layers are computed once more", (1.3, 1.5))


def _small_states(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if "8bit" not in recipe.train.optimizer:
        settings = (("train.optimizer", "paged_adamw_8bit"),)
        yield Change(settings, "8-bit optimizer", _NEARLY, "its state in 8 bits: nearly the same result", (1.0, 1.1))


def _half_weights(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.model.dtype == "fp32":
        yield Change(
            (("model.dtype", "auto"),), "16-bit weights", _NEARLY, "products in 16 bit, as is usual", (0.4, 1.0)
        )


def _offloading(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.train.grad_checkpointing and not recipe.train.offload_checkpoints:
        settings = (("train.offload_checkpoints", True),)
        why = "the same result: layer inputs wait in main memory"
        yield Change(settings, "checkpoints in main memory", _SAME, why, (1.0, 1.3))


def _double_quant(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.method == "qlora" and not recipe.model.double_quant:
        settings = (("model.double_quant", True),)
        yield Change(settings, "double quantisation on", _NEARLY, "no loss that was ever measured", (1.0, 1.05))


def _four_bits(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.method == "lora":
        settings = (("method", "qlora"), ("model.double_quant", True))
        why = "4-bit weights: the base loses a little, models below 4 B more"
        yield Change(settings, "QLoRA 4-bit", "the base loses a little", why, (1.05, 2.0))


def _narrower(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    rank = recipe.adapter.rank
    while rank > _LEAST_RANK:
        rank = max(_LEAST_RANK, rank // 2)
        words = f"rank {recipe.adapter.rank} -> {rank}"
        yield Change(
            (("adapter.rank", rank),), words, "it can learn less", "a narrower adapter: it can learn less", (0.97, 1.0)
        )


def _shorter_rows(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    length = recipe.train.seq_len
    for stop in reversed(number_of("train.seq_len").stops):
        if _SHORTEST_WORTHWHILE <= stop < length:
            words = f"length {length} -> {int(stop)}"
            yield Change(
                (("train.seq_len", int(stop)),),
                words,
                "longer rows are cut",
                "longer rows are cut: their ends are not learnt",
                (stop / length * 0.8, 1.0),
            )


def _fewer_targets(recipe: Recipe, shape: ModelShape) -> Iterator[Change]:
    if recipe.adapter.targets == ALL_LINEAR:
        projections = shape.groups[0].layer.qkv
        names = tuple(dict.fromkeys((projections[0].name, projections[-1].name)))
        words = f"adapters on {' and '.join(names)} alone"
        yield Change(
            (("adapter.targets", names),),
            words,
            "it can learn less",
            "adapters on attention alone learn less",
            (0.7, 0.9),
        )


KINDS: tuple[Kind, ...] = (
    _chunked_loss,
    _fused_attention,
    _fewer_rows_at_once,
    _checkpointing,
    _small_states,
    _half_weights,
    _offloading,
    _double_quant,
    _four_bits,
    _narrower,
    _shorter_rows,
    _fewer_targets,
)
"""The kinds of change, gentlest first."""


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
    """

    shape: ModelShape
    estimate: Estimator
    budget_bytes: int
    gpu: Gpu | None = None

    def together(self, recipe: Recipe) -> Fix:
        """Return the gentlest changes that make a recipe fit, or all that help where nothing does.

        Raises:
            BadInput: The recipe cannot be estimated.
        """
        return self._fix(recipe, self._gentlest(recipe, self._needed(recipe)))

    def alone(self, recipe: Recipe) -> list[Fix]:
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
                found.append(self._fix(recipe, [enough or options[-1]]))
        return found

    def _fix(self, recipe: Recipe, changes: Sequence[Change]) -> Fix:
        """Return the recipe with the changes; the price of each is that beside those before it."""
        before, prices = self.estimate(recipe), []
        for change in changes:
            changed = applied(recipe, [change])
            after = self.estimate(changed)
            time = time_factor(self.shape, setup_of(recipe, self.gpu), setup_of(changed, self.gpu), self.gpu)
            prices.append(Priced(change, before.device.expected - after.device.expected, time or change.time))
            recipe, before = changed, after
        return Fix(recipe, tuple(prices), before, self.budget_bytes)

    def _needed(self, recipe: Recipe) -> list[Change]:
        """Return changes, gentle ones first, none of which can be left out; all that help where nothing fits."""
        changes: list[Change] = []
        while not self._fits(recipe, changes):
            found = self._next(recipe, changes)
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

    fix = Search(shape, taken, budget_bytes, gpu).together(recipe)
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
