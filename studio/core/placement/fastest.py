"""The fastest settings of a method with which a recipe fits a budget: few of the many are ever estimated.

How fast settings are is known before their memory and costs less to find out. So whatever cannot be faster than what
was found already is left out, and so is what takes more in every respect than something that did not fit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import attrgetter
from typing import Any

from studio.core.gpu_catalogue import Gpu
from studio.core.layer_precision import INT8
from studio.core.placement.streaming import HOST_SHARE
from studio.core.recipe import Method, Optimizer, Recipe, Recompute, Stream
from studio.core.shape import ModelShape
from studio.core.step_work import step_work
from studio.core.throughput import careful_speed
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup, setup_of

OPTIMIZERS: tuple[Optimizer, ...] = ("adamw_torch", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit")
"""By the bits of its states, most first."""
_MOST_ROWS = 64
"""Rows at once beyond which no card is faster."""
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
class _Room:
    """What settings may take, and which were found to take more."""

    bytes: int
    refused: list[Setup] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for settings of a recipe for one model on one card.

    Attributes:
        recipe: What is wanted; it has no problems.
        shape: Its base model.
        gpu: The card.
        ram_bytes: Main memory of the computer; None where it is not known, so that nothing waits there.
        estimate: Returns what a set-up takes on the card; it is asked for the same one again and again.
    """

    recipe: Recipe
    shape: ModelShape
    gpu: Gpu
    ram_bytes: int | None
    estimate: Callable[[Setup], VramEstimate]

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
            optimizer=OPTIMIZERS[0],
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

    def leanest(
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
        setup, top = min(every, key=lambda pair: self.high(pair[0]))
        least = max(top - 1, int(setup.offload_checkpoints))
        return min((setup, self._with(setup, least)), key=self.high)

    def fastest(
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
            (self.score(self._with(way, int(way.offload_checkpoints))), way) for way in self._ways(method, streams)
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
                if found is not None and (best is None or self.rank(found) < self.rank(best)):
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
        fast = last_count(least, most, lambda count: self.score(self._with(way, count)) >= worth)
        for optimizer in optimizers:
            # Another optimizer must do with fewer layers than those before it.
            top = fast if best is None else most - 1
            count = self._fewest(replace(way, optimizer=optimizer), least, top, room)
            if count is not None:
                best, most = self._with(replace(way, optimizer=optimizer), count), count
        if best is None:
            return fast + 1, None
        return most, Placed(best, self.estimate(best), self.score(best))

    def _fewest(self, setup: Setup, low: int, top: int, room: _Room) -> int | None:
        """Return how few layers computed again are enough, between two counts; None where the larger one is not."""

        def over(count: int) -> int:
            tried = self._with(setup, count)
            excess = self.high(tried) - room.bytes
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
        return last_count(0, layers, lambda count: self._host_fits(self._with(way, count)))

    def _with(self, setup: Setup, count: int) -> Setup:
        word: Recompute = "none" if count == 0 else "all" if count == self.shape.layers else count
        return replace(setup, recompute=word)

    def high(self, setup: Setup) -> int:
        """Return the high end of what a set-up takes on the card, in bytes."""
        return self.estimate(setup).device.high

    def _host_fits(self, setup: Setup) -> bool:
        return self.estimate(setup).host.total <= HOST_SHARE * (self.ram_bytes or 0)

    def score(self, setup: Setup) -> float:
        """Return how fast a set-up is, see `Placed`."""
        # Optimizers differ in memory alone.
        same = setup if setup.optimizer == OPTIMIZERS[0] else replace(setup, optimizer=OPTIMIZERS[0])
        return _score_of(self.shape, same, self.gpu)

    def rank(self, placed: Placed) -> tuple[bool, float, int, int, bool, int]:
        """Return what the best settings have least of: copies, slowness, layers computed again, lost bits, memory."""
        setup = placed.setup
        again, optimizer = setup.recomputed_of(self.shape.layers), OPTIMIZERS.index(setup.optimizer)
        high = placed.estimate.device.high
        return setup.stream != "off", -placed.score, again, optimizer, setup.offload_checkpoints, high


def last_count(low: int, high: int, holds: Callable[[int], bool]) -> int:
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
