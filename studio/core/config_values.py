"""Typed, checked access to the numbers of a config.json."""

from collections.abc import Mapping
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain

_LARGEST = 1 << 26
"""No size of a language model comes near this; a config above it is corrupt or hostile."""


class ConfigValues:
    """A config.json's table with typed, checked access."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table

    def with_(self, settings: Mapping[str, Any]) -> "ConfigValues":
        """Return the table with other values under some keys."""
        return ConfigValues({**self._table, **settings})

    def raw(self, key: str) -> Any:
        """Return what lies under a key, unchecked; None where there is nothing."""
        return self._table.get(key)

    def __contains__(self, key: str) -> bool:
        return self._table.get(key) is not None

    def whole(self, *keys: str, default: int | None = None, low: int = 1, high: int = _LARGEST) -> int:
        """Return the whole number under the first key present.

        Args:
            keys: Names that families use for the same size.
            default: The value where no key is there; None requires a key.
            low: Smallest value that makes sense.
            high: Largest value that makes sense.

        Raises:
            BadInput: No key is there, or the value is no whole number between `low` and `high`.
        """
        for key in keys:
            value = self._table.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
                raise BadInput(f"the model's config has {key} = {_shown(value)}; wanted a whole number")
            if not low <= value <= high:
                raise BadInput(f"the model's config has {key} = {_shown(value)}; wanted {low} to {high}")
            return int(value)
        if default is None:
            raise BadInput(
                f"the model's config has no {' or '.join(keys)}; it does not describe a language model we can size"
            )
        return default

    def real(self, key: str, default: float) -> float:
        """Return the number under a key.

        Raises:
            BadInput: The value is no finite number.
        """
        value = self._table.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
            raise BadInput(f"the model's config has {key} = {_shown(value)}; wanted a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return the truth under a key.

        Raises:
            BadInput: The value is neither true nor false.
        """
        value = self._table.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadInput(f"the model's config has {key} = {_shown(value)}; wanted true or false")
        return value

    def word(self, *keys: str, default: str = "") -> str:
        """Return the text under the first key that holds text."""
        return next((value for key in keys if isinstance(value := self._table.get(key), str)), default)

    def table(self, key: str) -> "ConfigValues | None":
        """Return the table under a key, or None where there is none."""
        value = self._table.get(key)
        return ConfigValues(value) if isinstance(value, Mapping) else None

    def words(self, key: str) -> tuple[str, ...]:
        """Return the list of texts under a key, empty where there is none.

        Raises:
            BadInput: The value is no list of texts.
        """
        value = self._table.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise BadInput(f"the model's config has {key} = {_shown(value)}; wanted a list of words")
        return tuple(value)

    def each(self, key: str) -> int:
        """Return the whole number under a key or, where it has one for each layer, the largest; 0 without any.

        Raises:
            BadInput: The value is neither.
        """
        return (
            max(self.wholes(key), default=0) if isinstance(self._table.get(key), list) else self.whole(key, default=0)
        )

    def wholes(self, key: str) -> tuple[int, ...]:
        """Return the list of whole numbers under a key, empty where there is none.

        Raises:
            BadInput: The value is no list of whole numbers.
        """
        value = self._table.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise BadInput(f"the model's config has {key} = {_shown(value)}; wanted a list of whole numbers")
        return tuple(value)


def _shown(value: Any) -> str:
    return plain(repr(value), one_line=True, limit=60)
