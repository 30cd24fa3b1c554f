"""Kinds of value in a recipe: which are sound, how they are typed on one line, how TOML and JSON hold them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from studio.core.experts import is_of_experts
from studio.core.text import plain

ALL_LINEAR = "all-linear"

MOST_REPEATS = 4
"""A regular expression with more, or with a repeated group, can take hours on the path of one module."""
_LONGEST_FOUND, _MOST_LISTED, _BARE = 100, 20, r"[A-Za-z0-9_-]+"
_MOST_WHOLE = 10**300
"""Larger whole numbers, which TOML and JSON allow, cannot become a float: they are left as they are and refused."""
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class ValueKind(ABC):
    """A kind of value: which values are sound, and how they are spelled."""

    __slots__ = ()

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What is allowed, in words for messages and the reference."""

    def shaped(self, value: Any) -> Any:
        """Return a value in the recipe's own type where it means the same, else the value as it is."""
        return value

    @abstractmethod
    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield what was found and what is allowed, for everything that is wrong with a value."""

    def read(self, text: str) -> Any:
        """Return the value that a person typed on one line; a text that means none is returned as it is."""
        return text

    def written(self, value: Any) -> str:
        """Return a value on one line, such that `read` gives it back where it is sound."""
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def stored(self, value: Any) -> Any:
        """Return a value as TOML and JSON hold it."""
        return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class Number(ValueKind):
    """A number within limits.

    Attributes:
        of: `int` for whole numbers, else `float`.
        low: Smallest value allowed.
        high: Largest value allowed.
        unit: What one of it is.
        stops: The values that a slider stops at; empty for a field that is typed.
    """

    of: type[int] | type[float]
    low: float
    high: float
    unit: str = ""
    stops: tuple[float, ...] = ()

    @property
    def allowed(self) -> str:
        """The limits in words."""
        return f"{_spoken(self.low)} to {_spoken(self.high)} {self.unit}".rstrip()

    def shaped(self, value: Any) -> Any:
        """Return 4 for 4.0 where whole numbers are wanted, and 4.0 for 4 where others are allowed."""
        if self.of is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value) if abs(value) < _MOST_WHOLE else value
        return int(value) if self.of is int and isinstance(value, float) and value.is_integer() else value

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no number of this type, or is outside the limits."""
        number = isinstance(value, (int, self.of)) and not isinstance(value, bool)
        if not (number and self.low <= value <= self.high):
            yield found_value(value), self.allowed

    def read(self, text: str) -> Any:
        """Read a number such as 2e-4 or 1_000."""
        try:
            return self.shaped(float(text.replace("_", "")))
        except ValueError:
            return text


@dataclass(frozen=True, slots=True)
class Choice(ValueKind):
    """One of some words."""

    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        """The words."""
        return " or ".join(self.words)

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is none of the words."""
        if value not in self.words:
            yield found_value(value), self.allowed


@dataclass(frozen=True, slots=True)
class Switch(ValueKind):
    """True or false, or a word that lets the program choose."""

    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """Both, and the words."""
        return " or ".join(("true", "false", *self.words))

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is neither."""
        if not (isinstance(value, bool) or (isinstance(value, str) and value in self.words)):
            yield found_value(value), self.allowed

    def read(self, text: str) -> Any:
        """Read a word such as true, off or 1."""
        low = text.lower()
        return True if low in _TRUE else False if low in _FALSE else text

    def written(self, value: Any) -> str:
        """Write on or off."""
        return ("on" if value else "off") if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class Text(ValueKind):
    """A text.

    Attributes:
        needed: Whether it must not be empty.
        place: Whether it may be the path of a file or folder, which counts from the recipe's own folder.
        pattern: A regular expression that it must match.
        form: The same in words.
    """

    needed: bool = False
    place: bool = False
    pattern: str = ""
    form: str = ""

    @property
    def allowed(self) -> str:
        """What it must look like."""
        return self.form or "text"

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no text, is empty though a text is needed, is not storable, or does not match."""
        if not isinstance(value, str):
            yield found_value(value), "text in quotes"
        elif self.needed and not value.strip():
            yield "nothing", "a name or path"
        elif not _storable(value):
            yield found_value(value), "text without NUL characters and lone surrogates"
        elif self.pattern and not re.fullmatch(self.pattern, value):
            yield found_value(value), self.form


class Targets(ValueKind):
    """The word `all-linear`, or module names; a text is one name."""

    __slots__ = ()

    @property
    def allowed(self) -> str:
        """Both forms."""
        return f'"{ALL_LINEAR}" or a list of module names such as ["q_proj", "v_proj"]'

    def shaped(self, value: Any) -> Any:
        """Return names as a tuple, and the list of the one word as that word."""
        if isinstance(value, (list, tuple)):
            return ALL_LINEAR if list(value) == [ALL_LINEAR] else tuple(value)
        return value

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is neither the word nor names."""
        names = (value,) if isinstance(value, str) else value
        sound = isinstance(names, tuple) and names and all(isinstance(name, str) and name.strip() for name in names)
        rest = [name for name in names if name != ALL_LINEAR and not is_of_experts(name)] if sound else []
        if not sound or (ALL_LINEAR in names and rest):
            yield found_value(value), self.allowed

    def read(self, text: str) -> Any:
        """Read names with commas between; one name without a comma is a text."""
        names = tuple(_unquoted(part) for part in parts_between(text, "[]"))
        return names[0] if len(names) == 1 and "," not in text and not text.startswith("[") else names


class Modules(ValueKind):
    """A list of module names, which may be empty."""

    __slots__ = ()

    @property
    def allowed(self) -> str:
        """The list."""
        return 'a list of module names, such as ["lm_head", "embed_tokens"]; on one line: lm_head, embed_tokens'

    def shaped(self, value: Any) -> Any:
        """Return a list as a tuple."""
        return tuple(value) if isinstance(value, list) else value

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no list, or a list in which something is no dotted name or stands twice."""
        if not isinstance(value, tuple):
            yield not_a_list(self, value)
        elif not all(map(is_module, value)) or len(set(value)) < len(value):
            yield found_value(value), self.allowed

    def read(self, text: str) -> Any:
        """Read names with commas between."""
        return tuple(_unquoted(part) for part in parts_between(text, "[]"))


@dataclass(frozen=True, slots=True)
class ByModule(ValueKind):
    """Values by module name, in order. A name is the end of a module's path, or a regular expression for it (peft).

    Attributes:
        of_one: Which values a module may have.
    """

    of_one: ValueKind

    @property
    def allowed(self) -> str:
        """The table."""
        table = '{ down_proj = 32, "layers.0.self_attn.q_proj" = 8 }'
        return f"a table of numbers by module name, such as {table}; on one line: down_proj=32, v_proj=8"

    def shaped(self, value: Any) -> Any:
        """Return a table as pairs. A dotted name without quotes is tables within the table in TOML: they are joined."""
        if not isinstance(value, Mapping):
            return value
        pairs, open_tables = [], [("", value)]
        while open_tables:
            name, inner = open_tables.pop()
            if isinstance(inner, Mapping) and (inner or not name):
                dotted = [(f"{name}.{key}" if name else key, below) for key, below in inner.items()]
                open_tables += reversed(dotted)
            else:
                pairs.append((name, self.of_one.shaped(inner)))
        return tuple(pairs)

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no table, or every pair in it without a usable name or a number within the limits."""
        if not isinstance(value, tuple):
            yield not_a_list(self, value)
            return
        for name, one in value:
            if not self.is_name(name):
                yield found_value(name), f"{self.allowed}; {self.rule}"
            for found, allowed in self.of_one.wrong(one):
                yield plain(f"{name} = {found}", limit=_LONGEST_FOUND), allowed

    def is_name(self, name: object) -> bool:
        """Whether modules may be named so."""
        return _is_pattern(name)

    @property
    def rule(self) -> str:
        """What a name must be."""
        return f"in a regular expression no repeated group and at most {MOST_REPEATS} repeats"

    def read(self, text: str) -> Any:
        """Read `name=value` with commas between, such as `down_proj=32, q_proj=8`."""
        parts = [part.rpartition("=") for part in parts_between(text, "{}")]
        table = {_unquoted(name): self.of_one.read(_unquoted(one)) for name, _, one in parts}
        unread = isinstance(self.of_one, Number) and any(isinstance(one, str) for one in table.values())
        return text if unread or len(table) < len(parts) or "" in table else tuple(table.items())

    def written(self, value: Any) -> str:
        """Write `name=value` with commas between."""
        return ", ".join(f"{n}={_brief(number)}" for n, number in value) if isinstance(value, tuple) else str(value)

    def stored(self, value: Any) -> Any:
        """Return the table."""
        return dict(value) if isinstance(value, tuple) else value


def found_value(value: Any) -> str:
    """Return a value for a message: written as in a recipe, short enough for a line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return plain(f"[{', '.join(map(found_value, value[:_MOST_LISTED]))}]", limit=_LONGEST_FOUND)
    if isinstance(value, dict):
        return "a table"
    # Dates are written in TOML as Python prints them; texts need their quotes.
    return plain(repr(value) if isinstance(value, str | int | float) else str(value), limit=_LONGEST_FOUND)


def is_module(name: object) -> bool:
    """Whether it is the dotted name of a module."""
    return isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*", name) is not None


def _is_pattern(name: object) -> bool:
    """Whether a name is a regular expression that can be matched with every module's path in a short time."""
    if not isinstance(name, str) or name.split() != [name] or re.search(r"\)[*+{]", name):
        return False
    try:
        re.compile(name)
    except (re.error, OverflowError, RecursionError):
        return False
    return _storable(name) and len(re.findall(r"[*+?{]", name)) <= MOST_REPEATS


def not_a_list(kind: ValueKind, value: Any) -> tuple[str, str]:
    """Return what was found where a list or table is wanted, and what is wanted.

    A text that would be right on the command line is shown as TOML spells it.
    """
    meant = kind.read(value) if isinstance(value, str) else None
    if not isinstance(meant, tuple) or any(kind.wrong(meant)):
        return found_value(value), kind.allowed
    stored = kind.stored(meant)
    if isinstance(stored, dict):
        pairs = (
            f"{key if re.fullmatch(_BARE, key) else repr(key)} = {repr(one) if isinstance(one, str) else _brief(one)}"
            for key, one in stored.items()
        )
        return f"the text {found_value(value)}", f"a table: {{ {', '.join(pairs)} }}"
    listed = ", ".join(f'"{item}"' if isinstance(item, str) else str(item) for item in stored)
    return f"the text {found_value(value)}", f"a list: [{listed}]"


def parts_between(text: str, brackets: str) -> list[str]:
    """Return what stands between commas; a list or table may be typed as it is written in a file."""
    text = text.strip()
    inner = text[1:-1] if text[:1] == brackets[0] and text[-1:] == brackets[1] else text
    # A comma inside of braces is a regular expression's, as in q{1,2}_proj.
    return [part.strip() for part in re.split(r",(?![^{]*\})", inner) if part.strip()]


def _unquoted(part: str) -> str:
    return part.strip().strip("\"'")


def _storable(text: str) -> bool:
    """Return whether a text has no NUL character, which no path takes, and no lone surrogate, which UTF-8 refuses."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _brief(number: object) -> str:
    """Return a number as a person would type it: 64 for 64.0."""
    return f"{number:g}" if isinstance(number, float) and float(f"{number:g}") == number else str(number)


def _spoken(number: float) -> str:
    """Return a number for a reader: a large one with its thousands apart, 1,000,000 and not 1e+06."""
    return f"{number:,.0f}" if number >= 10_000 else f"{number:g}"
