"""Counts all that is found in a file and keeps the first of each kind: a file may have a million bad rows."""

from collections import Counter

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.rows import Finding

KEPT_PER_KIND = 100
SHOWN = 5


class Findings:
    """Collects findings of one file while it is read."""

    def __init__(self, *, row_word: str = "row") -> None:
        self.row_word = row_word
        self.counts: Counter[str] = Counter()
        self.fatal_count = 0
        self._kept: list[Finding] = []

    def add(self, kind: str, row: int, message: str, *, field: str = "", fatal: bool = True) -> None:
        """Count a finding and keep it if few of its kind are kept yet; foreign text in it is made harmless."""
        self.counts[kind] += 1
        self.fatal_count += fatal
        if self.counts[kind] <= KEPT_PER_KIND:
            self._kept.append(Finding(kind, row, plain(field, one_line=True), plain(message, one_line=True), fatal))

    @property
    def kept(self) -> tuple[Finding, ...]:
        """The first findings of each kind, by row."""
        return tuple(sorted(self._kept, key=lambda finding: finding.row))

    def refuse(self, name: str) -> None:
        """Raise if anything fatal was found.

        Raises:
            BadInput: With the first five fatal findings and how many there are.
        """
        if not self.fatal_count:
            return
        fatal = [finding for finding in self.kept if finding.fatal]
        lines = [self._line(finding) for finding in fatal[:SHOWN]]
        if self.fatal_count == 1:
            raise BadInput(f"{name}, {lines[0]}")
        more = f" The first {SHOWN}:" if self.fatal_count > SHOWN else ""
        raise BadInput(f"{name}: {self.fatal_count} problems.{more}\n" + "\n".join(f"  {line}" for line in lines))

    def _line(self, finding: Finding) -> str:
        where = f"{self.row_word} {finding.row}" + (f", {finding.field}" if finding.field else "")
        return f"{where}: {finding.message}"
