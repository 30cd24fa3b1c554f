"""Where a GiB buys the most fidelity to the 16-bit base: which layers of a QLoRA base get more bits, and in what order.

What a layer loses is what `audit base` has measured of it: how far 4 bits in that layer alone move the hidden state.
The squares of these effects are taken to add up, and 8 bits to leave as much of a square as they leave of the weights'
squared rounding error. Both are estimates from what was measured. Where nothing was, bits alone count.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from studio.core.layer_precision import (
    FOUR_BIT,
    INT8,
    SIXTEEN_BIT,
    LayerPrecision,
    Table,
    layers_held_in,
    place_of,
)

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


def by_bits(weights: Sequence[int]) -> Effects:
    """Return effects by which bits alone count.

    Args:
        weights: The rounded weights of each layer.
    """
    whole = max(1, sum(weights))
    return Effects(tuple(LayerEffect(number, size / whole, _OF_BITS) for number, size in enumerate(weights)))


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


def left_of(effects: Effects, share_in: Callable[[int, LayerPrecision], float]) -> float:
    """Return which share of the squared effect of 4 bits is left.

    Args:
        effects: What rounding costs in each layer.
        share_in: Returns the share of a layer's weights that is held in some bits.
    """
    return sum(
        layer.share
        * (
            share_in(layer.number, FOUR_BIT)
            + share_in(layer.number, INT8) * (0.0 if layer.left_by_int8 is None else layer.left_by_int8)
        )
        for layer in effects.layers
    )


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


def proposals(steps: Sequence[Step], shares: Sequence[float] = PROPOSED) -> tuple[Proposal, ...]:
    """Return for each share the first steps that take it away; equal ones once."""
    found: list[Proposal] = []
    taken: list[Step] = []
    for wanted in shares:
        while sum(step.buys for step in taken) < wanted - 1e-9 and len(taken) < len(steps):
            taken.append(steps[len(taken)])
        bought = sum(step.buys for step in taken)
        if taken and bought >= wanted - 1e-9:
            found.append(Proposal(table_of(taken), sum(step.bytes for step in taken), bought))
    return tuple(dict.fromkeys(found))
