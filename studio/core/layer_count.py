"""Kinds of value in a recipe: which decoder layers, and how many, or a word such as all in place of a number."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from studio.core.value_kinds import ValueKind, found_value, not_a_list, parts_between

MOST_LAYERS = 10_000
"""A layer number above this is a slip of the finger; no decoder is a tenth as deep."""


@dataclass(frozen=True, slots=True)
class LayerCount(ValueKind):
    """How many decoder layers, or a word in place of a number.

    Attributes:
        words: The words.
        none: Which of them says what 0 would.
        stops: Numbers that a choice on the screen offers beside the words.
    """

    words: tuple[str, ...]
    none: str
    stops: tuple[int, ...] = (2, 4, 8, 12, 16, 20, 24, 32, 48, 64)

    @property
    def allowed(self) -> str:
        """Words and number."""
        return f"{', '.join(self.words)} or a number of layers"

    def shaped(self, value: Any) -> Any:
        """Return 4 for 4.0, and the word for 0."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return self.none if type(value) is int and value == 0 else value

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is neither a word nor a number of layers."""
        if not (value in self.words if isinstance(value, str) else type(value) is int and 0 < value <= MOST_LAYERS):
            yield found_value(value), self.allowed

    def read(self, text: str) -> Any:
        """Read a word or a number."""
        return self.shaped(int(text)) if re.fullmatch(r"\d{1,5}", text, re.ASCII) else text


class Layers(ValueKind):
    """Numbers of decoder layers, ascending; all of them where it is empty."""

    __slots__ = ()

    @property
    def allowed(self) -> str:
        """The list."""
        return f"a list of layer numbers from 0 to {MOST_LAYERS}, such as [0, 1, 12]; on one line: 0-7, 12"

    def shaped(self, value: Any) -> Any:
        """Return a list of numbers in their order, each once, as a tuple."""
        if not isinstance(value, (list, tuple)):
            return value
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in value)
        return tuple(sorted(set(value))) if whole else tuple(value)

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no list, or a list in which something is no layer number."""
        if not isinstance(value, tuple):
            yield not_a_list(self, value)
        elif not all(type(number) is int and 0 <= number <= MOST_LAYERS for number in value):
            yield found_value(value), self.allowed

    def read(self, text: str) -> Any:
        """Read numbers and ranges, such as `0-7, 12`."""
        numbers: list[int] = []
        for part in parts_between(text, "[]"):
            match = re.fullmatch(r"(\d{1,5})(?:\s*-\s*(\d{1,5}))?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not first <= last <= MOST_LAYERS:
                return text
            numbers += range(first, last + 1)
        return self.shaped(numbers)

    def written(self, value: Any) -> str:
        """Write three layers and more in a row as a range."""
        if any(self.wrong(value)):
            return super().written(value)
        ranges: list[list[int]] = []
        for number in value:
            if ranges and number == ranges[-1][-1] + 1:
                ranges[-1].append(number)
            else:
                ranges.append([number])
        return ", ".join(f"{row[0]}-{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)) for row in ranges)
