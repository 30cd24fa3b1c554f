"""Counts all findings in a file and keeps the first of each kind, since a file may have a million bad rows."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Self

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.rows import Finding, counted

KEPT_PER_KIND = 100
SHOWN = 5
_LISTED_UNUSED = 50


class Findings:
    """Collects findings of one file while it is read.

    Attributes:
        row_word: What the numbers of rows count, for messages: `row` or `line`.
        counts: How many findings there are of each kind.
        fatal_counts: How many of these keep the file from being used.
        skips: Whether rows that would keep the file from being used are left out instead.
        skipped: How many rows are left out for that, by the kind of the first finding in each.
        from_table: Whether the file is a table, which gives each object the keys of all, null where it has none itself.
        rows_before: The rows, or lines, of the files before this one, which numbers of rows include.
        furthest: The highest number of a row in which something was found.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self.row_word = "row"
        self.from_table = False
        self.skips = skips
        self.skipped: Counter[str] = Counter()
        self.rows_before = 0
        self._file = ""
        self._last_skipped = 0
        self.furthest = 0
        self.counts: Counter[str] = Counter()
        self.fatal_counts: Counter[str] = Counter()
        self._kept: list[Finding] = []
        self._unused: dict[str, None] = {}

    @classmethod
    def restored(cls, table: Mapping[str, Any], kept: Iterable[Finding]) -> Self:
        """Return the findings that `table` was made of; `kept` are those that were kept."""
        found = cls()
        found.row_word = table["row_word"]
        found.counts.update(table["counts"])
        found.fatal_counts.update(table["fatal_counts"])
        found._unused = dict.fromkeys(table["unused"])
        found._kept = list(kept)
        return found

    def table(self) -> dict[str, Any]:
        """Return all but the findings that are kept, ready for JSON."""
        return {
            "row_word": self.row_word,
            "counts": dict(self.counts),
            "fatal_counts": dict(self.fatal_counts),
            "unused": list(self._unused),
        }

    def enter(self, file: str, rows_before: int) -> None:
        """Note that the next rows are of another file.

        Args:
            file: Its name; empty where there is one file only.
            rows_before: The number of the last row in the file before.
        """
        self._file, self.rows_before, self.row_word = file, rows_before, "row"

    def add(self, kind: str, row: int, message: str, *, field: str = "", fatal: bool = True) -> None:
        """Count a finding and keep it if few of its kind are kept yet; foreign text in it is made harmless."""
        self.counts[kind] += 1
        self.furthest = max(self.furthest, row)
        if fatal and self.skips:
            fatal = False
            if row != self._last_skipped:
                self.skipped[kind] += 1
                self._last_skipped = row
        if fatal:
            self.fatal_counts[kind] += 1
        if self.counts[kind] <= KEPT_PER_KIND:
            where, said = plain(field, one_line=True), plain(message, one_line=True)
            self._kept.append(Finding(kind, row - self.rows_before, where, said, fatal, self._file))

    def leave(self, columns: Iterable[str]) -> None:
        """Note columns, and fields of messages, that are not used; the first fifty are kept."""
        if len(self._unused) < _LISTED_UNUSED:
            self._unused |= dict.fromkeys(columns)

    @property
    def unused(self) -> tuple[str, ...]:
        """The unused columns and fields, in the order in which they were found."""
        return tuple(plain(name, one_line=True) for name in self._unused)

    @property
    def kept(self) -> tuple[Finding, ...]:
        """The first findings of each kind, by row; files in the order in which they are read."""
        files = {finding.file: place for place, finding in reversed(list(enumerate(self._kept)))}
        return tuple(sorted(self._kept, key=lambda finding: (files[finding.file], finding.row)))

    def refuse(self, name: str) -> None:
        """Raise if anything fatal was found.

        Raises:
            BadInput: With the first five fatal findings, and how many there are of each kind.
        """
        total = self.fatal_counts.total()
        if not total:
            return
        fatal = [finding for finding in self.kept if finding.fatal]
        lines = [self._line(finding) for finding in fatal[:SHOWN]]
        if total == 1:
            raise BadInput(f"{lines[0]}" if fatal[0].file else f"{name}, {lines[0]}")
        kinds = f" ({counted(self.fatal_counts)})" if len(self.fatal_counts) > 1 else ""
        more = f" The first {SHOWN}:" if total > SHOWN else ""
        raise BadInput(f"{name}: {total} problems{kinds}.{more}\n" + "\n".join(f"  {line}" for line in lines))

    def _line(self, finding: Finding) -> str:
        where = f"{self.row_word} {finding.row}" + (f", {finding.field}" if finding.field else "")
        where = f"{finding.file}, {where}" if finding.file else where
        return f"{where}: {finding.message}"


def json_kind(value: object) -> str:
    """Return what a JSON value is, for a message: `text`, `a number`, `an object with the keys a, b` ..."""
    if isinstance(value, dict):
        keys = ", ".join(plain(str(key), one_line=True, limit=40) for key in list(value)[:6])
        return f"an object with the keys {keys}" if keys else "an empty object"
    if value != value:  # noqa: PLR0124 - only NaN differs from itself
        return "NaN, which is not JSON (write null or leave it out)"
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


def filled(value: object, depth: int = 8) -> bool:
    """Return whether a value says anything: null, blank texts, and lists and objects of nothing else do not.

    Args:
        value: As JSON has it.
        depth: What is nested deeper says something, whatever it is.
    """
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return any(not depth or filled(one, depth - 1) for one in inner)
    return bool(value)
