"""Copies ahead through a few buffers: order proven against queues that delay copies and computation at random."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from studio.jobs.base.streaming.ring import Ring, Way

SCHEDULES, SOME = 10_000, 1000


class FaultError(Exception):
    """A layer was computed without its weights, or a buffer was written to while it was read."""


@dataclass(eq=False)
class Buffer:
    """Memory of which only the content matters: a layer's number, or None while it is written to."""

    content: int | None = None
    readers: int = 0
    belongs_to_others: bool = False


@dataclass(eq=False)
class Mark:
    reached: bool = False


class DelayedQueues:
    """Queues that do what they were given later: how much later, and which of them goes first, is random.

    Copies and computation begin and end, and others may happen in between.
    """

    def __init__(self, chance: random.Random, left_out: int = -1) -> None:
        self._chance = chance
        self._computing: deque[Callable[[], None] | Mark] = deque()
        self._copying: deque[Callable[[], None] | Mark] = deque()
        self._waits: dict[int, Mark] = {}
        self._copies_first = chance.choice((0.02, 0.5, 0.98))
        self._lag = chance.choice((1, 2, 5))
        self.left_out, self.waits = left_out, 0

    def new_buffer(self) -> Buffer:
        """Return memory that something else, given before, still reads."""
        buffer = Buffer()
        self._computing += (lambda: self._reads(buffer), lambda: self._has_read(buffer, None))
        return buffer

    def copy(self, buffer: Buffer, source: int) -> None:
        self._copying += (lambda: self._writes(buffer), lambda: self._writes(buffer, source))
        self._pass_time()

    def compute(self, buffer: Buffer, layer: int) -> None:
        self._computing += (lambda: self._reads(buffer, layer), lambda: self._has_read(buffer, layer))
        self._pass_time()

    def mark_copied(self) -> Mark:
        return self._mark(self._copying)

    def mark_computed(self) -> Mark:
        return self._mark(self._computing)

    def copying_waits(self, mark: Mark) -> None:
        self._wait(self._copying, mark)

    def computing_waits(self, mark: Mark) -> None:
        self._wait(self._computing, mark)

    def free(self, buffer: Buffer) -> None:
        """Let whatever is computed from now on have the memory."""
        self._computing.append(lambda: setattr(buffer, "belongs_to_others", True))

    def finish(self) -> None:
        while self._computing or self._copying:
            assert self._step(), "the queues wait for each other"

    def _mark(self, queue: deque[Any]) -> Mark:
        mark = Mark()
        queue.append(lambda: setattr(mark, "reached", True))
        return mark

    def _wait(self, queue: deque[Any], mark: Mark) -> None:
        if self.waits != self.left_out:
            queue.append(mark)
        self.waits += 1

    def _pass_time(self) -> None:
        for _ in range(self._chance.randrange(2 * self._lag)):
            self._step()

    def _step(self) -> bool:
        """Let one queue do the next thing it was given, and return whether one could."""
        order = [self._computing, self._copying]
        if self._chance.random() < self._copies_first:
            order.reverse()
        for queue in order:
            if queue and not (isinstance(queue[0], Mark) and not queue[0].reached):
                done = queue.popleft()
                if callable(done):
                    done()
                return True
        return False

    @staticmethod
    def _writes(buffer: Buffer, content: int | None = None) -> None:
        if buffer.readers or buffer.belongs_to_others:
            raise FaultError("overwritten while others used it")
        buffer.content = content

    @staticmethod
    def _reads(buffer: Buffer, layer: int | None = None) -> None:
        buffer.readers += 1
        if buffer.content != layer:
            raise FaultError(f"layer {layer} was computed with {buffer.content}")

    @staticmethod
    def _has_read(buffer: Buffer, layer: int | None) -> None:
        buffer.readers -= 1
        if buffer.content != layer:
            raise FaultError(f"layer {layer} was overwritten with {buffer.content}")


Uses = list[tuple[int, Way]]


def a_pass(layers: int, way: Way) -> Uses:
    order = range(layers)
    return [(layer, way) for layer in (reversed(order) if way == "backward" else order)]


def a_step(layers: int) -> Uses:
    return [*a_pass(layers, "forward"), *a_pass(layers, "backward")]


def some_passes(chance: random.Random, layers: int) -> Iterator[tuple[int, Way]]:
    """Yield steps and evaluations, some of which end early, as an answer or an exception does."""
    for _ in range(chance.randint(1, 2)):
        uses = chance.choice((a_step, lambda count: a_pass(count, "alone")))(layers)
        yield from uses[: chance.randint(1, len(uses))] if chance.random() < 0.2 else uses


def run(queues: DelayedQueues, layers: int, buffers: int, uses: Any, chance: random.Random) -> None:
    made: list[Buffer] = []

    def new_buffer() -> Buffer:
        made.append(queues.new_buffer())
        return made[-1]

    ring = Ring(range(layers), new_buffer, buffers, queues)
    for layer, way in uses:
        buffer = ring.take(layer, way)
        assert ring.buffer_of(layer) is buffer
        queues.compute(buffer, layer)
        if chance.random() < 0.9:  # nothing tells the end of the backward pass of the first layer with an adapter
            ring.give_back(way)
    ring.end()
    for buffer in made:
        queues.free(buffer)
    queues.finish()


@pytest.mark.parametrize("seeds", [range(SOME), pytest.param(range(SOME, SCHEDULES), marks=pytest.mark.slow)], ids=len)
def test_no_schedule_computes_too_early_or_overwrites_what_is_read(seeds: range) -> None:
    for seed in seeds:
        chance = random.Random(seed)  # noqa: S311
        layers = chance.randint(1, 4)
        run(DelayedQueues(chance), layers, min(layers, chance.randint(2, 3)), some_passes(chance, layers), chance)


@pytest.mark.parametrize("buffers", [2, 3])
def test_no_wait_can_be_left_out(buffers: int) -> None:
    uses = [*a_step(4), *a_pass(4, "alone"), *a_step(4), (0, "forward")]

    def fails(left_out: int, seed: int) -> bool:
        chance = random.Random(seed)  # noqa: S311
        try:
            run(DelayedQueues(chance, left_out), 4, buffers, uses, chance)
        except FaultError:
            return True
        return False

    whole = DelayedQueues(random.Random(0))  # noqa: S311
    run(whole, 4, buffers, uses, random.Random(1))  # noqa: S311
    assert whole.waits > 20
    harmless = [wait for wait in range(whole.waits) if not any(fails(wait, seed) for seed in range(300))]
    assert not harmless


def test_what_is_there_at_a_turn_is_not_copied_again() -> None:
    class Counted(DelayedQueues):
        copies: list[int] = []  # noqa: RUF012

        def copy(self, buffer: Buffer, source: int) -> None:
            self.copies.append(source)
            super().copy(buffer, source)

    queues = Counted(random.Random(0))  # noqa: S311
    run(queues, 4, 2, [*a_step(4), *a_step(4), *a_pass(4, "alone")], random.Random(3))  # noqa: S311
    first = [0, 1, 2, 3, 1, 0]
    # After a pass alone the next one is taken to be another: the first layers are copied ahead.
    assert queues.copies == [*first, *first[2:], 2, 3, 0, 1]


def test_weights_outside_of_their_layer_are_refused() -> None:
    queues = DelayedQueues(random.Random(0))  # noqa: S311
    ring = Ring(range(3), queues.new_buffer, 2, queues)
    ring.take(0, "forward")
    with pytest.raises(LookupError, match="layer 1"):
        ring.buffer_of(1)
    ring.give_back("forward")
    with pytest.raises(LookupError, match="layer 0"):
        ring.buffer_of(0)
