"""The settings with which a recipe fills a card: for speed, for fidelity to the 16-bit base, or for room.

Chosen are the method, how many layers are computed again and whether these keep what is dequantised for it, the
micro-batch (a step sees the same rows), the optimizer, and whether checkpoints wait in main memory. Layers of the base
wait there too, where that keeps them in 16 bit or where nothing fits otherwise: no card has run that yet, so it is not
chosen for speed. For fidelity layers of a base in 4 bits get more of them. Everything else stays as the recipe has it.
What is chosen fits at the high end of its estimate. No clock and no card is asked, and of quality only what an audit
has measured before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from studio.core.base_form import four_bit_refusal
from studio.core.gpu_catalogue import Gpu
from studio.core.layer_precision import PRECISIONS, Table
from studio.core.placement.fastest import OPTIMIZERS, Placed, Search, last_count
from studio.core.placement.fidelity import Effects, enough, layers_by_precision, left_in, more_bits, table_of
from studio.core.recipe import Method, Optimizer, Recipe, Stream
from studio.core.shape import ModelShape
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup, setup_of

Aim = Literal["speed", "fidelity", "room"]
AIMS: tuple[Aim, ...] = ("speed", "fidelity", "room")

_METHODS: tuple[Method, ...] = ("lora", "qlora")
"""By the bits of the base's weights, most first."""
_EIGHT_BIT = "8bit"
_RESIDENT: tuple[Stream, ...] = ("off",)
_SPOKEN = {"nf4": "4 bit", "int8": "8 bit", "16bit": "16 bit"}
_AS_GOOD = 0.01
"""Share of what 4 bits cost below which nothing counts as left: audits cannot tell it from the 16-bit base, since the
intervals of their figures are several times as wide. A choice."""


@dataclass(frozen=True, slots=True)
class Bought:
    """One thing that memory was spent on, after those before it.

    Attributes:
        words: What it is.
        bytes: What the high end of the device's memory grew by; negative where it fell.
        factor: How many times as fast a step of the same rows became.
    """

    words: str
    bytes: int
    factor: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What was chosen, what was bought on the way from the leanest settings, and what would be next best."""

    chosen: Placed
    leanest: Placed
    bought: tuple[Bought, ...]
    runners_up: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Planner:
    """Chooses settings of a recipe for one model on one card.

    Attributes:
        recipe: What is wanted; it has no problems.
        shape: Its base model.
        gpu: The card.
        budget_bytes: What the run may use of it.
        ram_bytes: Main memory of the computer; None where it is not known, so that nothing waits there.
        estimate: Returns what a set-up takes on the card.
        effects: What an audit has measured of each layer of the base; None where bits alone count.
    """

    recipe: Recipe
    shape: ModelShape
    gpu: Gpu
    budget_bytes: int
    ram_bytes: int | None
    estimate: Callable[[Setup], VramEstimate]
    effects: Effects | None = None

    def plan(self, aim: Aim) -> Plan | None:
        """Return the plan for an aim; None where nothing fits.

        For speed the fastest settings are taken. For fidelity what is left of the error of 4 bits comes first, as an
        audit has measured it or by bits alone, then the bits of the optimizer's states; among such settings the fastest
        are taken. For room the fastest of those that take the least memory.

        Raises:
            BadInput: The model cannot be estimated with this recipe.
        """
        # The same settings are asked for again and again.
        return replace(self, estimate=cache(self.estimate))._plan(aim)

    def _plan(self, aim: Aim) -> Plan | None:
        methods, streams = self._methods, _RESIDENT
        least = self._search.leanest(methods, streams, self._optimizers[-1])
        if least is None or self._search.high(least) > self.budget_bytes:
            streams = self._streams
            least = self._search.leanest(methods, streams, self._optimizers[-1])
        if least is None or self._search.high(least) > self.budget_bytes:
            return None
        lean = self._as_lean(least, methods, streams)
        leanest = min(lean, key=self._search.rank)
        found = lean if aim == "room" else self._bests(methods, streams, self.budget_bytes)
        if aim == "fidelity":
            resident = streams == _RESIDENT and "qlora" in methods
            whole = any(placed.setup.method == "lora" for placed in found)
            # Beside 16 bits everywhere that fit, some bits can be as good and leave more room, but not without figures.
            mixed = self._mixed() if resident and (self.effects or not whole) else ()
            lost = [method for method in methods if all(placed.setup.method != method for placed in found)]
            found = [*self._bests(lost[:1], self._streams, self.budget_bytes), *mixed, *found]
        found.sort(
            key=lambda placed: (self._bits(placed.setup) if aim == "fidelity" else (), self._search.rank(placed))
        )
        return Plan(found[0], leanest, self._bought(leanest, found[0]), tuple(found[1:]))

    @property
    def _search(self) -> Search:
        return Search(self.recipe, self.shape, self.gpu, self.ram_bytes, self.estimate)

    @property
    def _methods(self) -> tuple[Method, ...]:
        """The methods with which the base can be trained as the recipe says."""
        return tuple(
            method
            for method in _METHODS
            if not (self.shape.quantised is not None and method == "lora")
            and not four_bit_refusal(self.shape.family, method)
            and not self.recipe.with_("method", method).problems()
        )

    @property
    def _optimizers(self) -> tuple[tuple[Optimizer, ...], ...]:
        """The optimizers to choose from, the recipe's own among them: those with 32-bit states, and with 8-bit ones."""
        names = (self.recipe.train.optimizer, "adamw_torch", "adamw_8bit", "paged_adamw_8bit")
        usual = [name for name in OPTIMIZERS if name in names]
        eight = tuple(name for name in usual if _EIGHT_BIT in name)
        return tuple(name for name in usual if name not in eight), eight

    @property
    def _streams(self) -> tuple[Stream, ...]:
        """A half of the layers in main memory, or all; none where that is not known."""
        if not self.ram_bytes or self.recipe.train.compile:
            return ()
        return tuple(dict.fromkeys((max(1, self.shape.layers // 2), self.shape.layers)))

    def _as_lean(self, least: Setup, methods: Sequence[Method], streams: Sequence[Stream]) -> list[Placed]:
        """Return the best settings of each method and kind of optimizer that take no more than the leanest."""
        high = self._search.high(least)
        as_lean = [method for method in methods if self._search.high(replace(least, method=method)) <= high]
        kinds = [names for names in self._optimizers if self._search.high(replace(least, optimizer=names[0])) <= high]
        return self._bests(as_lean, streams, high, kinds or self._optimizers[-1:])

    def _mixed(self) -> Iterator[Placed]:
        """Yield the fastest settings of each kind of optimizer with which a base in 4 bits gets as many more as fit."""
        if self.shape.quantised is not None:
            return
        plain = self._with(())
        steps = more_bits(self.shape, setup_of(plain.recipe, self.gpu), self.effects)
        if self.effects:
            steps = enough(steps, 1 - _AS_GOOD)
        for optimizers in self._optimizers:
            lean = plain.leanest(("qlora",), _RESIDENT, optimizers)
            count = 0 if lean is None else self._most_steps(lean, steps)
            found = self._with(table_of(steps[:count])).fastest("qlora", optimizers, _RESIDENT, self.budget_bytes)
            if count and found is not None:
                yield found

    def _most_steps(self, lean: Setup, steps: Sequence[Any]) -> int:
        """Return with how many steps of more bits the leanest settings fit."""

        def fits(count: int) -> bool:
            return self._search.high(replace(lean, precision=table_of(steps[:count]))) <= self.budget_bytes

        return last_count(1, len(steps), fits)

    def _with(self, precision: Table) -> Search:
        return replace(self._search, recipe=self.recipe.with_("model.precision", precision))

    def _bests(
        self,
        methods: Sequence[Method],
        streams: Sequence[Stream],
        budget_bytes: int,
        kinds: Sequence[Sequence[Optimizer]] | None = None,
    ) -> list[Placed]:
        """Return the best settings of each method and kind of optimizer that fit."""
        every = []
        for method in methods:
            found: Placed | None = None
            for optimizers in kinds or self._optimizers:
                like = found.setup if found else None
                found = self._search.fastest(method, optimizers, streams, budget_bytes, like)
                every.append(found)
        return [placed for placed in every if placed is not None]

    def _bits(self, setup: Setup) -> tuple[float, bool]:
        """Return what the most faithful settings have least of: error of the base, then states in fewer bits."""
        left = self._left(setup)
        return 0.0 if self.effects and left < _AS_GOOD else left, _EIGHT_BIT in setup.optimizer

    def _left(self, setup: Setup) -> float:
        """Return which share of the error of 4 bits is left."""
        return left_in(self.shape, setup, self.effects) if setup.method == "qlora" else 0.0

    def _bought(self, leanest: Placed, chosen: Placed) -> tuple[Bought, ...]:
        """Return what the memory was spent on, one setting after another, from the leanest settings to the chosen."""
        before, found = leanest, []
        for name, beside in (
            ("method", "stream"),
            ("precision", "precision"),
            ("optimizer", "optimizer"),
            ("micro_batch", "accumulation"),
            ("offload_checkpoints", "offload_checkpoints"),
            ("recompute", "keep_dequantised"),
        ):
            changed: dict[str, Any] = {each: getattr(chosen.setup, each) for each in (name, beside)}
            setup = replace(before.setup, **changed)
            if setup != before.setup:
                after = Placed(setup, self.estimate(setup), self._search.score(setup))
                grown = after.estimate.device.high - before.estimate.device.high
                found.append(Bought(self._words(name, setup), grown, after.score / before.score))
                before = after
        return tuple(found)

    def _words(self, name: str, setup: Setup) -> str:
        layers = self.shape.layers
        bits = "16 bit" if setup.method == "lora" else "4 bit"
        where = f", {setup.streamed} of {layers} layers in main memory" if setup.streamed else ""
        place = "main memory" if setup.offload_checkpoints else "the card's memory"
        others = ", the others keep their dequantised weights" if setup.keeps_dequantised else ""
        return {
            "method": f"base in {bits}{where}",
            "precision": self._words_of_bits(setup),
            "optimizer": f"{setup.optimizer}, states in {8 if _EIGHT_BIT in setup.optimizer else 32} bit",
            "micro_batch": f"{setup.micro_batch} x {setup.accumulation} rows a step",
            "offload_checkpoints": f"checkpoints in {place}",
            "recompute": f"{layers - setup.recomputed_of(layers)} of {layers} layers keep their activations{others}",
        }[name]

    def _words_of_bits(self, setup: Setup) -> str:
        counts = layers_by_precision(self.shape, setup)
        held = " and ".join(f"{counts[word]} in {_SPOKEN[word]}" for word in PRECISIONS[1:] if counts[word])
        left = f", {self._left(setup):.1%} of what 4 bits cost is left" if self.effects else ""
        return f"of {self.shape.layers} layers {held or 'none in more than 4 bits'}{left}"
