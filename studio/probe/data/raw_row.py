"""A row as its file has it: what its columns hold, how it is written, and where findings about it go."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from studio.probe.data.findings import Findings, filled, json_kind
from studio.probe.data.reading import Reading
from studio.probe.data.rows import Conversation, Message, Preference


class Unusable(Exception):
    """A row that cannot be used; the finding is already recorded."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write a row: the format it belongs to, how it is read, the columns it needs and those it may have."""

    format: str
    read: "Callable[[RawRow], list[Message] | str | Preference | Conversation]"
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return self.needed + self.optional

    def __str__(self) -> str:
        return f"{self.format.replace('_', '/')} ({', '.join(self.needed)})"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file has it, and where findings about it go.

    Attributes:
        value: Its columns.
        shape: How it is written.
        number: Its line or place, from 1.
        findings: Gets what is wrong with it.
        how: How the file is read.
    """

    value: Mapping[str, Any]
    shape: Shape
    number: int
    findings: Findings
    how: Reading

    def refuse(self, kind: str, field: str, message: str) -> NoReturn:
        """Record what keeps the file from being used.

        Raises:
            Unusable: Always.
        """
        self.findings.add(kind, self.number, message, field=self.how.in_file(field))
        raise Unusable

    def leave_out(self, kind: str, message: str, field: str = "") -> NoReturn:
        """Record why this row alone is left out.

        Raises:
            Unusable: Always.
        """
        self.findings.add(kind, self.number, message, field=self.how.in_file(field), fatal=False)
        raise Unusable

    def note(self, kind: str, field: str, message: str) -> None:
        """Record what should be known of the row, which is kept."""
        self.findings.add(kind, self.number, message, field=self.how.in_file(field), fatal=False)

    def first(self, columns: Sequence[str]) -> str | None:
        """Return the first of some columns that says anything."""
        for column in columns:
            if column in self.value and filled(self.value[column]):
                return column
        return None

    def text(self, column: str) -> str:
        """Return the text of a column; a row without it cannot be used."""
        return self.checked_text(self.value.get(column), column, there=column in self.value)

    def optional(self, column: str) -> str:
        """Return the text of a column, empty where it is missing or null."""
        return "" if self.value.get(column) is None else self.text(column)

    def checked_text(self, text: object, field: str, *, there: bool = True) -> str:
        """Return a value that must be a text that can be written as UTF-8.

        Args:
            text: The value.
            field: Where it stands.
            there: Whether the field is there at all.

        Raises:
            Unusable: It is no such text.
        """
        if not isinstance(text, str):
            self.refuse("not_text", field, f"found {json_kind(text) if there else 'nothing'}; wanted text")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                found = f"found half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character {error.start}"
                self.refuse("lone_surrogate", field, f"{found}; no tokenizer can read it")
        return text

    def asked(self, prompt: str, answer: str) -> list[Message]:
        """Return the turns of a prompt and its answer."""
        return [Message("user", prompt), Message("assistant", answer)]


def json_of(text: str) -> Any:
    """Return the value that a text holds as JSON.

    Raises:
        ValueError: It is no JSON, is nested too deeply, or holds NaN or an infinity, which JSON does not know.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_text(value: Any) -> str:
    """Return a value as JSON text on one line, in the order of its keys."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
