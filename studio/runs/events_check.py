"""Whether an event read from a file has the types that its class declares, so that no reader trips over a forged line.

A dataclass does not check; checking a line here costs about a microsecond.
"""

import math
import types
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from studio.core.events import KINDS, RunEvent, Unknown

_LARGEST = 2**53
_LATEST_SECONDS = 2.5e11
"""Unix seconds in the year 9892: later moments have no date, and asking for one ends the program that asks."""


def well_typed(event: RunEvent) -> bool:
    """Return whether every field holds its declared type and every whole number fits a 64-bit float exactly."""
    if not is_moment(event.at):
        return False
    if isinstance(event, Unknown):
        return True
    for name, allowed in _ALLOWED[event.kind]:
        value = getattr(event, name)
        kind = type(value)
        if kind not in allowed or (kind is int and not -_LARGEST <= value <= _LARGEST):
            return False
    return True


def is_moment(at: float) -> bool:
    """Return whether unix seconds have a date."""
    return math.isfinite(at) and abs(at) <= _LATEST_SECONDS


def _types(hint: Any) -> set[type]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return set().union(*(_types(part) for part in get_args(hint)))
    plain_type = origin or hint
    return {int, float} if plain_type is float else {plain_type}


_ALLOWED = {
    name: tuple((item.name, frozenset(_types(get_type_hints(kind)[item.name]))) for item in fields(kind))
    for name, kind in KINDS.items()
}
