"""In how many bits each linear layer of a QLoRA base is held: what `model.precision` says, and of which layers.

A name is `*`, for all, or dotted parts of a module's path: `self_attn` or `down_proj` in every layer, `layers.3` for
all of a layer, `layers.0-3.mlp` for a part of four of them. What stands before a layer's number does not count, since
families call it differently. Where several names fit, the first one counts. What no name fits is in 4 bits.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast, get_args

from studio.core.layer_count import MOST_LAYERS
from studio.core.value_kinds import ByModule, Choice, ValueKind

LayerPrecision = Literal["nf4", "int8", "16bit"]
PRECISIONS: tuple[LayerPrecision, ...] = get_args(LayerPrecision)
FOUR_BIT, INT8, SIXTEEN_BIT = PRECISIONS

Table = tuple[tuple[str, str], ...]
"""Names and precisions, in their order."""

EVERYTHING = "*"
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


_WORDS = Choice(PRECISIONS)


@dataclass(frozen=True, slots=True)
class Precisions(ByModule):
    """Precisions by parts of a module's path, in order."""

    of_one: ValueKind = _WORDS

    @property
    def allowed(self) -> str:
        """The table."""
        table = '{ "layers.0-3" = "16bit", down_proj = "int8" }'
        words = ", ".join(PRECISIONS)
        return f"a table from parts of the model to {words}, such as {table}; on one line: layers.0-3=16bit"

    def is_name(self, name: object) -> bool:
        """Whether modules may be named so."""
        return isinstance(name, str) and part_of(name) is not None

    @property
    def rule(self) -> str:
        """What a name must be."""
        return f"{EVERYTHING}, or dotted names, in which layers have numbers or ranges: layers.0-3.mlp"


@dataclass(frozen=True, slots=True)
class Part:
    """What a name stands for.

    Attributes:
        layers: Numbers of layers; None for all, and for what is outside of layers.
        inside: Parts of the path that must stand one behind the other in it; empty for any.
    """

    layers: range | None
    inside: tuple[str, ...]

    def fits(self, layer: int | None, path: tuple[str, ...]) -> bool:
        """Whether a module is meant, or stands inside of one that is."""
        if self.layers is not None and (layer is None or layer not in self.layers):
            return False
        width = len(self.inside)
        return not width or any(path[at : at + width] == self.inside for at in range(len(path) - width + 1))


@lru_cache(maxsize=4096)
def part_of(name: str) -> Part | None:
    """Return what a name stands for; None where it is no name."""
    if name == EVERYTHING:
        return Part(None, ())
    parts = tuple(name.split("."))
    for at, part in enumerate(parts):
        # Experts are numbered too.
        match = _RANGE.fullmatch(part) if "experts" not in parts[:at] else None
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
            rest = parts[at + 1 :]
            sound = all(re.fullmatch(r"\w+", one) for one in (*parts[:at], *rest)) and first <= last <= MOST_LAYERS
            return Part(range(first, last + 1), rest) if sound else None
    return Part(None, parts) if all(re.fullmatch(r"\w+", part) for part in parts) else None


def place_of(path: str) -> tuple[int | None, tuple[str, ...]]:
    """Return the layer of a module, None outside of layers, and the parts of its path after the layer's number."""
    found = part_of(path)
    if found is None or found.layers is None:
        return None, tuple(path.split("."))
    return found.layers.start, found.inside


@lru_cache(maxsize=1024)
def _by_layer(table: Table, layer: int | None) -> tuple[tuple[Part, LayerPrecision], ...]:
    """Return the names that may mean something in a layer."""
    parts = ((part_of(name), word) for name, word in table)
    return tuple(
        (part, cast(LayerPrecision, word))
        for part, word in parts
        if part is not None and (part.layers is None or (layer is not None and layer in part.layers))
    )


def precision_of(table: Table, layer: int | None, *paths: tuple[str, ...]) -> LayerPrecision:
    """Return the precision of a linear layer.

    Args:
        table: What a recipe says.
        layer: Its decoder layer; None outside of them.
        paths: Its path behind the layer's number, or several that it may have.
    """
    found = (word for part, word in _by_layer(table, layer) if any(part.fits(layer, path) for path in paths))
    return next(found, FOUR_BIT)


def precision_at(table: Table, path: str) -> LayerPrecision:
    """Return the precision of the linear layer at a path of a model."""
    layer, inside = place_of(path)
    return precision_of(table, layer, inside)


def unmatched(table: Table, paths: Iterable[str]) -> tuple[str, ...]:
    """Return the names that mean none of a model's linear layers, each of which is given by its path."""
    places = [place_of(path) for path in paths]
    return tuple(
        name
        for name, _ in table
        if (part := part_of(name)) is not None and not any(part.fits(*place) for place in places)
    )


NO_INT8_EXPERTS = "Routed experts are held in 4 bits or in 16: put experts=nf4 or experts=16bit before that name"


def contradicted(table: Table, skipped: Sequence[str], paths: Iterable[str]) -> str:
    """Return why a prequantised base cannot be held as a recipe says; empty where it is.

    Args:
        table: What the recipe says.
        skipped: Modules that its files hold in 16 bit.
        paths: Of its linear layers.
    """
    laid = in_sixteen_bit(skipped)
    for path in paths:
        place = place_of(path)
        asked = next((word for part, word in _by_layer(table, place[0]) if part.fits(*place)), None)
        held = precision_of(laid, *place)
        if asked is not None and asked != held:
            return (
                f"model.precision asks for {path} in {asked}, but the base's files hold it in {_SAID[held]}: name the "
                "16-bit original, or leave that out"
            )
    return ""


_SAID = {FOUR_BIT: "4 bits already", SIXTEEN_BIT: "16 bit"}


def in_sixteen_bit(names: Iterable[str]) -> Table:
    """Return the table that keeps some modules in 16 bit."""
    return tuple((name, SIXTEEN_BIT) for name in names)


def layers_held_in(precision: LayerPrecision, numbers: Iterable[int]) -> Table:
    """Return the table with which whole layers are held in so many bits, neighbours as a range.

    Args:
        precision: In how many bits.
        numbers: Of the layers.
    """
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return tuple((f"layers.{a}-{b}" if a < b else f"layers.{a}", precision) for a, b in ranges)
