"""The settings with which a recipe fills a card: for speed, for fidelity to the 16-bit base, or for room.

Chosen are the method, how many layers are computed again and whether these keep what is dequantised for it, the
micro-batch (a step sees the same rows), the optimizer, and whether checkpoints wait in main memory. Layers of the base
wait there too, where that keeps them in 16 bit or where nothing fits otherwise: no card has run that yet, so it is not
chosen for speed. For fidelity layers of a base in 4 bits get more of them. Everything else stays as the recipe has it.
What is chosen fits at the high end of its estimate. No clock and no card is asked, and of quality only what an audit
has measured before.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from operator import attrgetter
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
_BY_A_LINE = 3
"""How often a count of layers is guessed by a straight line before its range is halved. A choice."""
_WAYS = attrgetter("micro_batch", "offload_checkpoints", "stream")
_PLACES = attrgetter("optimizer", "offload_checkpoints", "stream")


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
class _Room:
    """What settings may take, and which were found to take more."""

    bytes: int
    refused: list[Setup] = field(default_factory=list)


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
        least = self._leanest(methods, streams, self._optimizers[-1])
        if least is None or self._high(least) > self.budget_bytes:
            streams = self._streams
            least = self._leanest(methods, streams, self._optimizers[-1])
        if least is None or self._high(least) > self.budget_bytes:
            return None
        lean = self._as_lean(least, methods, streams)
        leanest = min(lean, key=self._rank)
        found = lean if aim == "room" else self._bests(methods, streams, self.budget_bytes)
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
        setup = replace(
            setup_of(self.recipe, self.gpu),
            device="cuda",
            method=method,
            optimizer=_OPTIMIZERS[0],
            keep_dequantised=False,
        )
        for size, more in self._batches:
            for offloads in (False, True) if self.ram_bytes else (False,):
                for stream in streams:
                    if stream != "off" and method == "qlora" and INT8 in dict(setup.precision).values():
                        continue
                    yield replace(
                        setup, micro_batch=size, accumulation=more, offload_checkpoints=offloads, stream=stream
                    )

    def _leanest(
        self, methods: Sequence[Method], streams: Sequence[Stream], optimizers: Sequence[Optimizer]
    ) -> Setup | None:
        """Return the settings that take the least memory; None where main memory does not hold what waits there."""
        # More rows at once take more, but where gradients then need not be added up; so do fewer layers computed again.
        tops = [
            (way, self._most_again(way))
            for method in methods
            for way in self._ways(method, streams)
            if way.micro_batch == 1 or way.accumulation == 1
        ]
        every = [
            (self._with(replace(way, optimizer=optimizer), top), top)
            for way, top in tops
            for optimizer in optimizers
            if top >= way.offload_checkpoints
        ]
        if not every:
            return None
        setup, top = min(every, key=lambda pair: self._high(pair[0]))
        least = max(top - 1, int(setup.offload_checkpoints))
        return min((setup, self._with(setup, least)), key=self._high)

    def _as_lean(self, least: Setup, methods: Sequence[Method], streams: Sequence[Stream]) -> list[Placed]:
        """Return the best settings of each method and kind of optimizer that take no more than the leanest."""
        high = self._high(least)
        as_lean = [method for method in methods if self._high(replace(least, method=method)) <= high]
        kinds = [names for names in self._optimizers if self._high(replace(least, optimizer=names[0])) <= high]
        return self._bests(as_lean, streams, high, kinds or self._optimizers[-1:])

    def _mixed(self) -> Iterator[Placed]:
        """Yield the fastest settings of each kind of optimizer with which a base in 4 bits gets as many more as fit."""
        if self.shape.quantised is not None:
            return
        plain = self._of(())
        steps = more_bits(self.shape, setup_of(plain.recipe, self.gpu), self.effects)
        if self.effects:
            steps = enough(steps, 1 - _AS_GOOD)
        for optimizers in self._optimizers:
            lean = plain._leanest(("qlora",), _RESIDENT, optimizers)
            count = 0 if lean is None else self._most_steps(lean, steps)
            found = self._of(table_of(steps[:count]))._fastest("qlora", optimizers, _RESIDENT, self.budget_bytes)
            if count and found is not None:
                yield found

    def _most_steps(self, lean: Setup, steps: Sequence[Any]) -> int:
        """Return with how many steps of more bits the leanest settings fit."""

        def fits(count: int) -> bool:
            return self._high(replace(lean, precision=table_of(steps[:count]))) <= self.budget_bytes

        return _last(1, len(steps), fits)

    def _of(self, precision: Table) -> "Planner":
        return replace(self, recipe=self.recipe.with_("model.precision", precision))

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
                found = self._fastest(method, optimizers, streams, budget_bytes, like)
                every.append(found)
        return [placed for placed in every if placed is not None]

    def _fastest(
        self,
        method: Method,
        optimizers: Sequence[Optimizer],
        streams: Sequence[Stream],
        budget_bytes: int,
        like: Setup | None = None,
    ) -> Placed | None:
        """Return the best settings that fit.

        Args:
            method: Their method.
            optimizers: Their optimizer is one of these.
            streams: Their place of the weights is one of these.
            budget_bytes: What they may take.
            like: A way that is tried first, as one near it was good: what cannot be faster is then left out unseen.
        """
        # No way is faster than with as few layers computed again as it can have.
        hoped = [
            (self._score(self._with(way, int(way.offload_checkpoints))), way) for way in self._ways(method, streams)
        ]
        hoped.sort(key=lambda pair: not (like and _WAYS(pair[1]) == _WAYS(like)))
        best: Placed | None = None
        room = _Room(budget_bytes)
        for most, way in hoped:
            least = int(way.offload_checkpoints)
            for keeps in (False, True):
                worth = best.score if best else 0.0
                setup = replace(way, keep_dequantised=True) if keeps else way
                if most < worth or (keeps and not self._with(setup, least).keeps_dequantised):
                    continue
                # Kept weights take memory: no fewer layers are computed again than without them.
                least, found = self._best_of(setup, optimizers, room, least, worth)
                if found is not None and (best is None or self._rank(found) < self._rank(best)):
                    best = found
        return best

    def _best_of(
        self, way: Setup, optimizers: Sequence[Optimizer], room: _Room, least: int, worth: float
    ) -> tuple[int, Placed | None]:
        """Return the fewest layers computed again, of no fewer than `least`, and the first optimizer that fits then.

        Args:
            way: All other settings.
            optimizers: Their optimizer is one of these.
            room: What they may take.
            least: The fewest layers that are tried.
            worth: Slower settings are not looked for: if no others fit, the count is the first that was not tried.
        """
        best: Setup | None = None
        whole = self._with(way, self.shape.layers)
        optimizers = [name for name in optimizers if not self._too_much(replace(whole, optimizer=name), room)]
        if not optimizers:
            return self.shape.layers + 1, None
        most = self._most_again(way)
        fast = _last(least, most, lambda count: self._score(self._with(way, count)) >= worth)
        for optimizer in optimizers:
            # Another optimizer must do with fewer layers than those before it.
            top = fast if best is None else most - 1
            count = self._fewest(replace(way, optimizer=optimizer), least, top, room)
            if count is not None:
                best, most = self._with(replace(way, optimizer=optimizer), count), count
        if best is None:
            return fast + 1, None
        return most, Placed(best, self.estimate(best), self._score(best))

    def _fewest(self, setup: Setup, low: int, top: int, room: _Room) -> int | None:
        """Return how few layers computed again are enough, between two counts; None where the larger one is not."""

        def over(count: int) -> int:
            tried = self._with(setup, count)
            excess = self._high(tried) - room.bytes
            if excess > 0:
                room.refused.append(tried)
            return excess

        if top < low or self._too_much(self._with(setup, top), room):
            return None
        under = over(top)
        if under > 0 and low < top == self.shape.layers:
            # The last layer's activations are there in its backward anyway: they may take less than its checkpoint.
            top, under = top - 1, over(top - 1)
        if under > 0:
            return None
        above = over(low)
        if above <= 0:
            return low
        tries = 0
        while top - low > 1:
            # Each layer takes about as much as the others: a straight line is nearly right, and halving is safe.
            share = above / (above - under) if tries < _BY_A_LINE else 0.5
            middle = min(max(low + math.ceil(share * (top - low)), low + 1), top - 1)
            excess, tries = over(middle), tries + 1
            low, above, top, under = (middle, excess, top, under) if excess > 0 else (low, above, middle, excess)
        return top

    def _too_much(self, setup: Setup, room: _Room) -> bool:
        """Return whether something was refused that takes no more: it has no more rows, and fewer layers that keep."""
        layers = self.shape.layers
        places, again, adds_up = _PLACES(setup), setup.recomputed_of(layers), setup.accumulation > 1
        return any(
            setup.micro_batch >= than.micro_batch
            and again <= than.recomputed_of(layers)
            and not (than.keep_dequantised and not setup.keep_dequantised)
            and adds_up == (than.accumulation > 1)
            and places == _PLACES(than)
            for than in room.refused
        )

    def _most_again(self, way: Setup) -> int:
        """Return how many layers may be computed again: main memory must hold their inputs, where these wait there.

        It is -1 where main memory does not even hold the weights that wait there.
        """
        layers = self.shape.layers
        if not way.offload_checkpoints and way.stream == "off":
            return layers
        return _last(0, layers, lambda count: self._host_fits(self._with(way, count)))

    def _with(self, setup: Setup, count: int) -> Setup:
        word: Recompute = "none" if count == 0 else "all" if count == self.shape.layers else count
        return replace(setup, recompute=word)

    def _high(self, setup: Setup) -> int:
        return self.estimate(setup).device.high

    def _host_fits(self, setup: Setup) -> bool:
        return self.estimate(setup).host.total <= HOST_SHARE * (self.ram_bytes or 0)

    def _score(self, setup: Setup) -> float:
        # Optimizers differ in memory alone.
        same = setup if setup.optimizer == _OPTIMIZERS[0] else replace(setup, optimizer=_OPTIMIZERS[0])
        return _score_of(self.shape, same, self.gpu)

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


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the largest count for which something holds, and does for all smaller ones; `low - 1` for none."""
    if low <= high and holds(high):
        return high
    low, high = low - 1, high - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


@lru_cache(maxsize=4096)
def _score_of(shape: ModelShape, setup: Setup, gpu: Gpu) -> float:
    speed = careful_speed(shape, setup, gpu)
    return 1 / step_work(shape, setup).operations_per_token if speed is None else speed
