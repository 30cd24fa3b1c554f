"""A kind of value in a recipe: how many decoder layers, or a word such as all in place of a number."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from studio.core.value_kinds import MOST_LAYERS, ValueKind, found_value


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
