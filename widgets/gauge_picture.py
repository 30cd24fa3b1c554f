"""What a gauge shows, without a screen: parts stacked against a capacity, as text with looks. Knows no widget."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

PATTERNS = "█▓▒░▚≡◦"
"""One for each part, in order, so that parts differ without colour; after the last the first comes again."""

FREE, LINE, OVER, NOTE, STRONG = "free", "line", "over", "note", "strong"
_BEYOND = 1.04
"""Length of the axis relative to a value above the capacity, so that the value does not touch the end."""

_NOTHING = 0.005
"""Parts below this would be written as 0.00 and are left out of the legend."""

Level = Literal["", "good", "doubtful", "bad"]
Run = tuple[str, str]
"""Text and its look: `part-1` and so on, or one of the names above, or a level."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the whole."""

    label: str
    value: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a gauge shows. All values share one unit.

    Attributes:
        parts: What is stacked, from the left.
        capacity: Where the line is; None without one.
        low: The low end of the whole's range.
        high: The high end of the whole's range.
        measured: The measured whole; None where it was not measured.
        verdict: A few words on the whole against the capacity.
        level: How good the verdict is.
    """

    parts: tuple[Part, ...] = ()
    capacity: float | None = None
    low: float | None = None
    high: float | None = None
    measured: float | None = None
    verdict: str = ""
    level: Level = ""

    @property
    def total(self) -> float:
        """The whole."""
        return sum(part.value for part in self.parts)

    @property
    def end(self) -> float:
        """The value at the right end: the capacity, or somewhat more than the largest value beyond it."""
        most = max(self.total, self.high or 0.0, self.measured or 0.0)
        if self.capacity is not None and most <= self.capacity:
            return self.capacity
        return most * _BEYOND or 1.0


def figure(value: float) -> str:
    """Return a value with about three digits: 0.08, 5.31, 24.0, 131."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def bar(reading: Reading, width: int) -> list[Run]:
    """Return the stack over `width` cells, with a line at the capacity; cells beyond the line look `over`."""
    edges = [_cells(reading, value, width) for value in accumulate(part.value for part in reading.parts)]
    line = None if reading.capacity is None else min(width - 1, _cells(reading, reading.capacity, width))
    runs: list[Run] = []
    part = 0
    for cell in range(width):
        while part < len(edges) and cell >= edges[part]:
            part += 1
        if cell == line:
            runs.append(("┃", LINE))
        elif part == len(edges):
            runs.append(("·", FREE))
        else:
            beyond = line is not None and cell > line
            runs.append((PATTERNS[part % len(PATTERNS)], OVER if beyond else f"part-{part % len(PATTERNS) + 1}"))
    return _joined(runs)


def whisker(reading: Reading, width: int) -> list[Run]:
    """Return the range for the row below the stack, from low to high, with a mark at the measured value."""
    cells = [" "] * width
    if reading.low is not None and reading.high is not None:
        low, high = (_cell(reading, value, width) for value in (reading.low, reading.high))
        cells[low : high + 1] = "─" * (high - low + 1)
        cells[low], cells[high] = "├", "┤"
        cells[_cell(reading, reading.total, width)] = "┼"
    if reading.measured is not None:
        cells[_cell(reading, reading.measured, width)] = "▲"
    return _joined([(cell, STRONG if cell == "▲" else NOTE) for cell in cells])


def legend(reading: Reading, width: int) -> list[list[Run]]:
    """Return rows that name every part above zero, with pattern and value; a row holds as many as fit."""
    rows: list[list[Run]] = [[]]
    used = 0
    for index, part in enumerate(reading.parts):
        if part.value < _NOTHING:
            continue
        number = index % len(PATTERNS)
        text = f" {part.label} {figure(part.value)}"
        if used and used + 3 + len(text) > width:
            rows.append([])
            used = 0
        gap = "  " if used else ""
        rows[-1] += [(gap, NOTE), (PATTERNS[number], f"part-{number + 1}"), (text, NOTE)]
        used += len(gap) + 1 + len(text)
    return [[run for run in row if run[0]] for row in rows]


def headline(reading: Reading, unit: str, width: int) -> list[Run]:
    """Return the whole in figures, as fully as the width allows; the verdict goes last."""
    if not reading.parts:
        cut = len(reading.verdict) > width > 0
        told = f"{reading.verdict[: width - 1]}…" if cut else reading.verdict
        return _clipped([(told, reading.level or NOTE)], width)
    whole = figure(reading.total)
    of = "" if reading.capacity is None else f" of {figure(reading.capacity)}"
    spread = "" if reading.low is None or reading.high is None else f" ({figure(reading.low)}-{figure(reading.high)})"
    seen = "" if reading.measured is None else f", measured {figure(reading.measured)}"
    verdict = (reading.verdict, reading.level or NOTE)
    for rest in (f"{of} {unit}{spread}{seen}  ", f"{of} {unit}{seen}  ", f"{of} {unit}  ", f"{of}  "):
        runs = [(whole, STRONG), (rest, NOTE), verdict]
        if _length(runs) <= width:
            return runs
    return _clipped([(f"{whole} ", STRONG), verdict], width)


def _cells(reading: Reading, value: float, width: int) -> int:
    return round(min(max(value / reading.end, 0.0), 1.0) * width)


def _cell(reading: Reading, value: float, width: int) -> int:
    return min(width - 1, _cells(reading, value, width))


def _length(runs: Sequence[Run]) -> int:
    return sum(len(text) for text, _ in runs)


def _clipped(runs: Sequence[Run], width: int) -> list[Run]:
    kept: list[Run] = []
    for text, look in runs:
        kept.append((text[: max(0, width - _length(kept))], look))
    return kept


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with neighbours of the same look joined."""
    joined: list[Run] = []
    for text, look in runs:
        if joined and joined[-1][1] == look:
            joined[-1] = (joined[-1][0] + text, look)
        else:
            joined.append((text, look))
    return joined
