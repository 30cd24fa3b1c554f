"""Counts all that is found in a file and keeps the first of each kind: a file may have a million bad rows."""

from collections import Counter
from collections.abc import Iterable

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.rows import Finding, counted

KEPT_PER_KIND = 100
SHOWN = 5
_LISTED_UNUSED = 50


class Findings:
    """Collects findings of one file while it is read."""

    def __init__(self, *, row_word: str = "row") -> None:
        self.row_word = row_word
        self.counts: Counter[str] = Counter()
        self.fatal_counts: Counter[str] = Counter()
        self._kept: list[Finding] = []
        self._unused: dict[str, None] = {}

    def add(self, kind: str, row: int, message: str, *, field: str = "", fatal: bool = True) -> None:
        """Count a finding and keep it if few of its kind are kept yet; foreign text in it is made harmless."""
        self.counts[kind] += 1
        if fatal:
            self.fatal_counts[kind] += 1
        if self.counts[kind] <= KEPT_PER_KIND:
            self._kept.append(Finding(kind, row, plain(field, one_line=True), plain(message, one_line=True), fatal))

    def leave(self, columns: Iterable[str]) -> None:
        """Note columns, and fields of messages, that are not used; the first fifty are kept."""
        if len(self._unused) < _LISTED_UNUSED:
            self._unused |= dict.fromkeys(columns)

    @property
    def unused(self) -> tuple[str, ...]:
        """What is not used, in the order in which it was met."""
        return tuple(plain(name, one_line=True) for name in self._unused)

    @property
    def kept(self) -> tuple[Finding, ...]:
        """The first findings of each kind, by row."""
        return tuple(sorted(self._kept, key=lambda finding: finding.row))

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
            raise BadInput(f"{name}, {lines[0]}")
        kinds = f" ({counted(self.fatal_counts)})" if len(self.fatal_counts) > 1 else ""
        more = f" The first {SHOWN}:" if total > SHOWN else ""
        raise BadInput(f"{name}: {total} problems{kinds}.{more}\n" + "\n".join(f"  {line}" for line in lines))

    def _line(self, finding: Finding) -> str:
        where = f"{self.row_word} {finding.row}" + (f", {finding.field}" if finding.field else "")
        return f"{where}: {finding.message}"
