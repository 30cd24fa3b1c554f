"""Where a GiB buys the most fidelity to the 16-bit base: which layers of a QLoRA base get more bits, and in what order.

What a layer loses is what `audit base` has measured of it: how far 4 bits in that layer alone move the hidden state.
The squares of these effects are taken to add up, and 8 bits to leave as much of a square as they leave of the weights'
squared rounding error. Both are estimates from what was measured. Where nothing was, bits alone count.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from studio.core.layer_precision import (
    EVERYTHING,
    FOUR_BIT,
    INT8,
    PRECISIONS,
    SIXTEEN_BIT,
    LayerPrecision,
    Table,
    layers_held_in,
    place_of,
)
from studio.core.shape import ModelShape
from studio.core.vram.frozen import frozen_form, held_stacks, layer_bytes, layer_shares, stacks_of
from studio.core.vram.setup import Setup

_OF_BITS = 2 / 3
"""Of what 16 bits have more than 4, what 8 bits still lack."""


@dataclass(frozen=True, slots=True)
class LayerEffect:
    """What rounding costs in one layer.

    Attributes:
        number: The layer's number.
        share: Of the whole squared effect of 4 bits, that of this layer.
        left_by_int8: What 8 bits leave of that share; None where they were not measured.
    """

    number: int
    share: float
    left_by_int8: float | None


@dataclass(frozen=True, slots=True)
class Effects:
    """What rounding costs in each layer of a model.

    Attributes:
        layers: The layers.
        source: Where that was measured, in words; empty where bits alone count.
    """

    layers: tuple[LayerEffect, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One layer that gets more bits.

    Attributes:
        number: The layer's number.
        precision: In how many bits it is held then.
        bytes: What that takes more.
        buys: Which share of the whole squared effect of 4 bits it takes away.
    """

    number: int
    precision: LayerPrecision
    bytes: int
    buys: float

    @property
    def worth(self) -> float:
        """What a byte buys."""
        return self.buys / max(1, self.bytes)


MoreBytes = Callable[[int, LayerPrecision], int]
"""Returns what a layer takes more than in 4 bits."""


Measured = tuple[str, float, float, float | None]
"""Of a block its name, how far 4 bits in it alone move the hidden state, and the relative rounding error of its weights
in 4 bits and in 8, None where that was not measured."""


def effects_of(blocks: Iterable[Measured], source: str) -> Effects | None:
    """Return what rounding costs in each layer; None where nothing is lost, or a block is no layer.

    Args:
        blocks: What an audit of a base has measured.
        source: Where it was measured, in words.
    """
    squares: dict[int, tuple[float, float | None]] = {}
    for name, own, four, eight in blocks:
        number = place_of(name)[0]
        if number is None:
            return None
        squares[number] = own**2, (eight / four) ** 2 if four and eight is not None else None
    whole = sum(square for square, _ in squares.values())
    if not whole:
        return None
    found = (LayerEffect(number, square / whole, left) for number, (square, left) in sorted(squares.items()))
    return Effects(tuple(found), source)


def steps_of(effects: Effects, more_bytes: MoreBytes, *, int8: bool = True) -> tuple[Step, ...]:
    """Return the steps by which layers get more bits, those first that buy the most for a byte.

    Args:
        effects: What rounding costs in each layer.
        more_bytes: What a layer takes more than in 4 bits.
        int8: Whether layers may be held in 8 bits.
    """
    steps: list[Step] = []
    for layer in effects.layers:
        wide, left = more_bytes(layer.number, SIXTEEN_BIT), layer.left_by_int8
        first = Step(layer.number, INT8, more_bytes(layer.number, INT8), layer.share * (1 - (left or 0)))
        second = Step(layer.number, SIXTEEN_BIT, wide - first.bytes, layer.share * (left or 0))
        # Eight bits are a step of their own only where what they buy is cheaper than the rest.
        if not int8 or left is None or first.worth < second.worth * (1 - 1e-9):
            steps.append(Step(layer.number, SIXTEEN_BIT, wide, layer.share))
        else:
            steps += [first, second]
    wanted = (step for step in steps if step.bytes > 0)
    # Equal worth: 8 bits everywhere before 16 anywhere.
    return tuple(sorted(wanted, key=lambda step: (-float(f"{step.worth:.9e}"), step.precision != INT8)))


def table_of(steps: Iterable[Step]) -> Table:
    """Return the table that holds layers as some steps, the first ones of all, leave them."""
    held: dict[int, LayerPrecision] = {}
    for step in steps:
        held[step.number] = step.precision
    return tuple(
        pair
        for word in (SIXTEEN_BIT, INT8)
        for pair in layers_held_in(word, (number for number, one in held.items() if one == word))
    )


def more_bits(shape: ModelShape, setup: Setup, effects: Effects | None) -> tuple[Step, ...]:
    """Return the steps by which the layers of a model get more bits, those first that buy the most for a byte.

    Args:
        shape: The model.
        setup: How its base is held in 4 bits everywhere.
        effects: What an audit has measured; None where bits alone count.
    """
    form = frozen_form(replace(setup, method="qlora", precision=()).kind)
    wide = {word: replace(form, precision=((EVERYTHING, word),)) for word in (INT8, SIXTEEN_BIT)}

    @cache
    def more(kind: int, word: LayerPrecision) -> int:
        number = shape.kinds.index(kind)
        return layer_bytes(shape, wide[word], number) - layer_bytes(shape, form, number)

    return steps_of(
        effects or _by_bits(shape),
        lambda number, word: more(shape.kinds[number], word),
        int8=not (setup.compile or held_stacks(shape, form)),
    )


def _by_bits(shape: ModelShape) -> Effects:
    """Return effects by which bits alone count."""
    layers = [shape.groups[kind].layer for kind in shape.kinds]
    sizes = [sum(linear.weights for linear in (*layer.linears, *stacks_of(shape, layer))) for layer in layers]
    return Effects(tuple(LayerEffect(number, size / sum(sizes), _OF_BITS) for number, size in enumerate(sizes)))


def left_in(shape: ModelShape, setup: Setup, effects: Effects | None) -> float:
    """Return which share of the squared effect of 4 bits is left in a base that is held in several precisions.

    Args:
        shape: The model.
        setup: How it is trained, with QLoRA.
        effects: What an audit has measured; None where bits alone count.
    """
    if not setup.precision:
        return 1.0
    form, left = frozen_form(setup.kind), 0.0
    for layer in (effects or _by_bits(shape)).layers:
        shares = layer_shares(shape, form, layer.number)
        left += layer.share * (shares[FOUR_BIT] + shares[INT8] * (layer.left_by_int8 or 0.0))
    return float(f"{left:.9f}")


def layers_by_precision(shape: ModelShape, setup: Setup) -> dict[LayerPrecision, int]:
    """Return how many layers are held in each precision for the most part."""
    form = frozen_form(setup.kind)
    shares = [layer_shares(shape, form, number) for number in range(shape.layers)]
    most = [max(one, key=one.__getitem__) for one in shares]
    return {word: most.count(word) for word in PRECISIONS}


PROPOSED = (0.5, 0.75, 0.9, 0.99)
"""Shares of the squared effect for which an audit says what takes them away."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """The cheapest table that takes away a share of what 4 bits cost, by estimate.

    Attributes:
        precision: The table.
        extra_bytes: What it takes more than 4 bits everywhere.
        buys: The share that it takes away.
    """

    precision: Table
    extra_bytes: int
    buys: float


def enough(steps: Sequence[Step], share: float) -> tuple[Step, ...]:
    """Return the first steps that take away a share of the squared effect; all where that is not enough."""
    bought = 0.0
    for count, step in enumerate(steps, start=1):
        bought += step.buys
        if bought >= share:
            return tuple(steps[:count])
    return tuple(steps)


def proposals(steps: Sequence[Step], shares: Sequence[float] = PROPOSED) -> tuple[Proposal, ...]:
    """Return for each share the first steps that take it away; equal ones once."""
    taken = (enough(steps, share) for share in shares) if steps else ()
    found = (
        Proposal(table_of(some), sum(step.bytes for step in some), sum(step.buys for step in some)) for some in taken
    )
    return tuple(dict.fromkeys(found))
