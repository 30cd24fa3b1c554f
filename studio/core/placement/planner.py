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
from studio.core.layer_precision import INT8, PRECISIONS, Table
from studio.core.placement.fidelity import Effects, enough, layers_by_precision, left_in, more_bits, table_of
from studio.core.placement.streaming import HOST_SHARE
from studio.core.recipe import Method, Optimizer, Recipe, Recompute, Stream
from studio.core.shape import ModelShape
from studio.core.step_work import step_work
from studio.core.throughput import careful_speed
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup, setup_of

Aim = Literal["speed", "fidelity", "room"]
AIMS: tuple[Aim, ...] = ("speed", "fidelity", "room")

_METHODS: tuple[Method, ...] = ("lora", "qlora")
"""By the bits of the base's weights, most first."""
_OPTIMIZERS: tuple[Optimizer, ...] = ("adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit")
"""By the bits of its states, most first."""
_EIGHT_BIT = "8bit"
_MOST_ROWS = 64
"""Rows at once beyond which no card is faster."""
_RESIDENT: tuple[Stream, ...] = ("off",)
_SPOKEN = {"nf4": "4 bit", "int8": "8 bit", "16bit": "16 bit"}
_AS_GOOD = 0.01
"""Share of what 4 bits cost below which nothing counts as left: audits cannot tell it from the 16-bit base, since the
intervals of their figures are several times as wide. A choice."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A recipe's settings, and what follows from them.

    Attributes:
        setup: How it is trained.
        estimate: What it takes.
        score: Tokens a second if no checkpoint's copy hides behind the computation; tokens for an operation where the
            card's speed is not known.
    """

    setup: Setup
    estimate: VramEstimate
    score: float

    @property
    def settings(self) -> dict[str, Any]:
        """The planned fields by their paths."""
        setup = self.setup
        return {
            "method": setup.method,
            "train.optimizer": setup.optimizer,
            "train.micro_batch": setup.micro_batch,
            "train.accumulation": setup.accumulation,
            "train.offload_checkpoints": setup.offload_checkpoints,
            "train.recompute": setup.recompute,
            "train.keep_dequantised": setup.keep_dequantised,
            "model.stream": setup.stream,
            "model.precision": dict(setup.precision),
        }

    def on(self, recipe: Recipe) -> Recipe:
        """Return a recipe with these settings."""
        for path, value in self.settings.items():
            recipe = recipe.with_(path, value)
        return recipe


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
        least = self._least(methods, streams)
        if least > self.budget_bytes:
            streams = self._streams
            least = self._least(methods, streams)
        if least > self.budget_bytes:
            return None
        leanest = min(self._bests(methods, streams, least), key=self._rank)
        found = self._bests(methods, streams, least if aim == "room" else self.budget_bytes)
        if aim == "fidelity":
            resident = streams == _RESIDENT and "qlora" in methods
            whole = any(placed.setup.method == "lora" for placed in found)
            # Beside 16 bits everywhere that fit, some bits can be as good and leave more room, but not without figures.
            mixed = self._mixed() if resident and (self.effects or not whole) else ()
            lost = [method for method in methods if all(placed.setup.method != method for placed in found)]
            found = [*self._bests(lost[:1], self._streams, self.budget_bytes), *mixed, *found]
        found.sort(key=lambda placed: (self._bits(placed.setup) if aim == "fidelity" else (), self._rank(placed)))
        return Plan(found[0], leanest, self._bought(leanest, found[0]), tuple(found[1:]))

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
        usual = [name for name in _OPTIMIZERS if name in names]
        eight = tuple(name for name in usual if _EIGHT_BIT in name)
        return tuple(name for name in usual if name not in eight), eight

    @property
    def _streams(self) -> tuple[Stream, ...]:
        """A half of the layers in main memory, or all; none where that is not known."""
        if not self.ram_bytes or self.recipe.train.compile:
            return ()
        return tuple(dict.fromkeys((max(1, self.shape.layers // 2), self.shape.layers)))

    @property
    def _batches(self) -> list[tuple[int, int]]:
        """Micro-batches and accumulations with which a step sees the recipe's rows."""
        rows, own = self.recipe.rows_per_step, self.recipe.train.micro_batch
        return [(size, rows // size) for size in range(1, max(own, _MOST_ROWS) + 1) if rows % size == 0]

    def _ways(self, method: Method, streams: Sequence[Stream]) -> Iterator[Setup]:
        """Yield a set-up for each micro-batch and each place of checkpoints and weights."""
        setup = replace(setup_of(self.recipe, self.gpu), device="cuda", method=method, keep_dequantised=False)
        for size, more in self._batches:
            for offloads in (False, True) if self.ram_bytes else (False,):
                for stream in streams:
                    if stream != "off" and method == "qlora" and INT8 in dict(setup.precision).values():
                        continue
                    yield replace(
                        setup, micro_batch=size, accumulation=more, offload_checkpoints=offloads, stream=stream
                    )

    def _least(self, methods: Sequence[Method], streams: Sequence[Stream]) -> int:
        """Return the least that any settings take at the high end; more than the budget where there are none."""
        optimizers = [optimizer for kind in self._optimizers for optimizer in kind]
        highs = (self.estimate(setup).device.high for setup in self._lean(methods, streams, optimizers))
        return min(highs, default=self.budget_bytes + 1)

    def _lean(
        self, methods: Sequence[Method], streams: Sequence[Stream], optimizers: Sequence[Optimizer]
    ) -> Iterator[Setup]:
        """Yield the settings of which some take the least memory."""
        # More layers computed again never take more on the card; more rows at once may take less, where gradients
        # then need not be added up.
        for method in methods:
            for way in self._ways(method, streams):
                top = self._most_again(way)
                if top >= way.offload_checkpoints:
                    yield from (self._with(replace(way, optimizer=optimizer), top) for optimizer in optimizers)

    def _mixed(self) -> Iterator[Placed]:
        """Yield the fastest settings of each kind of optimizer with which a base in 4 bits gets as many more as fit."""
        if self.shape.quantised is not None:
            return
        plain = self._of(())
        steps = more_bits(self.shape, setup_of(plain.recipe, self.gpu), self.effects)
        if self.effects:
            steps = enough(steps, 1 - _AS_GOOD)
        for optimizers in self._optimizers:
            lean = min(
                plain._lean(("qlora",), _RESIDENT, optimizers), key=lambda setup: self.estimate(setup).device.high
            )
            low, top = 0, len(steps)
            while low < top:
                middle = (low + top + 1) // 2
                fits = self._fits(replace(lean, precision=table_of(steps[:middle])), self.budget_bytes)
                low, top = (middle, top) if fits else (low, middle - 1)
            found = self._of(table_of(steps[:low]))._fastest("qlora", optimizers, _RESIDENT, self.budget_bytes)
            if low and found is not None:
                yield found

    def _of(self, precision: Table) -> "Planner":
        return replace(self, recipe=self.recipe.with_("model.precision", precision))

    def _bests(self, methods: Sequence[Method], streams: Sequence[Stream], budget_bytes: int) -> list[Placed]:
        """Return the best settings of each method and kind of optimizer that fit."""
        found = (
            self._fastest(method, optimizers, streams, budget_bytes)
            for method in methods
            for optimizers in self._optimizers
        )
        return [placed for placed in found if placed is not None]

    def _fastest(
        self, method: Method, optimizers: Sequence[Optimizer], streams: Sequence[Stream], budget_bytes: int
    ) -> Placed | None:
        # No way is faster than with as few layers computed again as it can have.
        hoped = [
            (self._score(self._with(way, int(way.offload_checkpoints))), way) for way in self._ways(method, streams)
        ]
        best: Placed | None = None
        for most, way in sorted(hoped, key=lambda pair: -pair[0]):
            if best is not None and most < best.score:
                break
            found = self._best_of(way, optimizers, budget_bytes, int(way.offload_checkpoints))
            for placed in (found, self._keeping(way, optimizers, budget_bytes, found)):
                if placed is not None and (best is None or self._rank(placed) < self._rank(best)):
                    best = placed
        return best

    def _keeping(
        self, way: Setup, optimizers: Sequence[Optimizer], budget_bytes: int, found: Placed | None
    ) -> Placed | None:
        """Return the best settings of a way that keep dequantised weights; None where they cannot be faster."""
        hoped = None if found is None else replace(found.setup, keep_dequantised=True)
        if found is None or hoped is None or not hoped.keeps_dequantised or self._score(hoped) <= found.score:
            return None
        # Kept weights take memory, so that no fewer layers are computed again than without them.
        least = found.setup.recomputed_of(self.shape.layers)
        return self._best_of(replace(way, keep_dequantised=True), optimizers, budget_bytes, least)

    def _best_of(self, way: Setup, optimizers: Sequence[Optimizer], budget_bytes: int, least: int) -> Placed | None:
        """Return the fewest layers computed again, of no fewer than `least`, and the first optimizer that fits then."""
        best: Setup | None = None
        most = self._most_again(way)
        for optimizer in optimizers:
            setup = replace(way, optimizer=optimizer)
            # Another optimizer must do with fewer layers than those before it.
            low, top = least, most if best is None else most - 1
            if top < low or not self._fits(self._with(setup, top), budget_bytes):
                continue
            while low < top:
                middle = (low + top) // 2
                low, top = (low, middle) if self._fits(self._with(setup, middle), budget_bytes) else (middle + 1, top)
            best, most = self._with(setup, top), top
        return None if best is None else Placed(best, self.estimate(best), self._score(best))

    def _most_again(self, way: Setup) -> int:
        """Return how many layers may be computed again: main memory must hold their inputs, where these wait there.

        It is -1 where main memory does not even hold the weights that wait there.
        """
        low, top = -1, self.shape.layers
        if (not way.offload_checkpoints and way.stream == "off") or self._host_fits(self._with(way, top)):
            return top
        while low < top:
            middle = (low + top + 1) // 2
            low, top = (middle, top) if self._host_fits(self._with(way, middle)) else (low, middle - 1)
        return low

    def _with(self, setup: Setup, count: int) -> Setup:
        word: Recompute = "none" if count == 0 else "all" if count == self.shape.layers else count
        return replace(setup, recompute=word)

    def _fits(self, setup: Setup, budget_bytes: int) -> bool:
        return self.estimate(setup).device.high <= budget_bytes

    def _host_fits(self, setup: Setup) -> bool:
        return self.estimate(setup).host.total <= HOST_SHARE * (self.ram_bytes or 0)

    def _score(self, setup: Setup) -> float:
        speed = careful_speed(self.shape, setup, self.gpu)
        return 1 / step_work(self.shape, setup).operations_per_token if speed is None else speed

    def _bits(self, setup: Setup) -> tuple[float, bool]:
        """Return what the most faithful settings have least of: error of the base, then states in fewer bits."""
        left = self._left(setup)
        return 0.0 if self.effects and left < _AS_GOOD else left, _EIGHT_BIT in setup.optimizer

    def _left(self, setup: Setup) -> float:
        """Return which share of the error of 4 bits is left."""
        return left_in(self.shape, setup, self.effects) if setup.method == "qlora" else 0.0

    def _rank(self, placed: Placed) -> tuple[bool, float, int, int, bool, int]:
        """Return what the best settings have least of: copies, slowness, layers computed again, lost bits, memory."""
        setup = placed.setup
        again, optimizer = setup.recomputed_of(self.shape.layers), _OPTIMIZERS.index(setup.optimizer)
        high = placed.estimate.device.high
        return setup.stream != "off", -placed.score, again, optimizer, setup.offload_checkpoints, high

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
                after = Placed(setup, self.estimate(setup), self._score(setup))
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
