"""The only module that uses plotext: numbers in, rows of cells out. Knows no widget; imports plotext when it draws.

plotext 5 has one global figure. Each drawing clears it before and after and sets everything that it needs, so that no
plot sees another's settings; all drawing must happen on one thread.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from widgets.columns import Point

Kind = Literal["line", "dots", "dashes"]

FRAME = 0
"""The look of the axes, the ticks and everything empty."""

_SGR = re.compile(r"\x1b\[([0-9;]*)m")
_MARKERS: dict[Kind, str] = {"line": "braille", "dots": "●", "dashes": "╌"}
_LEAST_FOR_AXES = (12, 4)


@dataclass(frozen=True, slots=True)
class Trace:
    """One curve to draw, as unbroken pieces of finite points. `look` is 1 to 255 and comes back in the cells."""

    pieces: Sequence[Sequence[Point]]
    look: int
    kind: Kind = "line"


@dataclass(frozen=True, slots=True)
class Frame:
    """What surrounds the curves: size in cells, ranges, and ticks as (value, label)."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: Sequence[tuple[float, str]] = ()
    y_ticks: Sequence[tuple[float, str]] = ()

    @property
    def has_axes(self) -> bool:
        """Whether there is room for axes and tick labels."""
        return self.width >= _LEAST_FOR_AXES[0] and self.height >= _LEAST_FOR_AXES[1]

    @property
    def columns(self) -> int:
        """Cells across the canvas: the width without tick labels and axis, at least 1."""
        labels = max((len(label) for _, label in self.y_ticks), default=0)
        return max(1, self.width - labels - 1) if self.has_axes else max(1, self.width)


@dataclass(frozen=True, slots=True)
class CellRow:
    """One row of the drawing: as many looks as characters, each character one cell wide."""

    text: str
    looks: bytes

    def changed_span(self, other: "CellRow") -> tuple[int, int] | None:
        """Return first and one past the last cell that differ from `other`; None when equal."""
        if self == other:
            return None
        if len(self.text) != len(other.text):
            return 0, max(len(self.text), len(other.text))
        pairs = zip(self.text, other.text, self.looks, other.looks, strict=True)
        differing = [index for index, (a, b, c, d) in enumerate(pairs) if a != b or c != d]
        return differing[0], differing[-1] + 1

    def runs(self) -> Iterable[tuple[str, int]]:
        """Yield the pieces of equal look, from the left, as (text, look)."""
        start = 0
        for index in range(1, len(self.looks) + 1):
            if index == len(self.looks) or self.looks[index] != self.looks[start]:
                yield self.text[start:index], self.looks[start]
                start = index


def draw(frame: Frame, traces: Sequence[Trace]) -> list[CellRow]:
    """Draw the traces in order, a later one over an earlier one.

    Returns:
        Exactly `frame.height` rows of exactly `frame.width` cells.
    """
    if frame.width < 1 or frame.height < 1:
        return []
    import plotext as plt  # noqa: PLC0415  20 ms that the first frame of a screen need not wait for

    plt.clear_figure()
    try:
        plt.theme("clear")
        plt.limit_size(False, False)
        plt.plot_size(frame.width, frame.height)
        plt.xlim(*frame.x_range)
        plt.ylim(*frame.y_range)
        plt.xaxes(frame.has_axes, False)
        plt.yaxes(frame.has_axes, False)
        plt.xticks(*_ticks(frame.x_ticks if frame.has_axes else ()))
        plt.yticks(*_ticks(frame.y_ticks if frame.has_axes else ()))
        plt.scatter([frame.x_range[0]], [frame.y_range[0]], marker=" ")  # without data plotext leaves the ticks out
        for trace in traces:
            for piece in trace.pieces:
                xs, ys = _within(frame, piece)
                connect = plt.plot if trace.kind == "line" and len(xs) > 1 else plt.scatter
                if xs:
                    connect(xs, ys, marker=_MARKERS[trace.kind], color=trace.look)
        drawn = plt.build()
    finally:
        plt.clear_figure()
    return _rows(drawn, frame.width, frame.height)


def level(frame: Frame, y: float, look: int) -> Trace:
    """Return a dashed horizontal line across the canvas at height `y`."""
    low, high = frame.x_range
    step = (high - low) / max(1, frame.columns - 1)
    points = [(low + index * step, y) for index in range(frame.columns)]
    return Trace((points,), look, "dashes")


def _ticks(ticks: Sequence[tuple[float, str]]) -> tuple[list[float], list[str]]:
    return [value for value, _ in ticks], [label for _, label in ticks]


def _within(frame: Frame, piece: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Return the finite points with y kept near the canvas.

    plotext draws a line dot by dot, outside of the canvas too, and overflows on huge values.
    """
    bottom, top = frame.y_range
    margin = top - bottom
    finite = [(x, y) for x, y in piece if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in finite], [min(max(y, bottom - margin), top + margin) for _, y in finite]


def _rows(drawn: str, width: int, height: int) -> list[CellRow]:
    rows = [_row(line, width) for line in drawn.split("\n")[:height]]
    return rows + [CellRow(" " * width, bytes(width))] * (height - len(rows))


def _row(line: str, width: int) -> CellRow:
    """Return a row of plotext's output as cells: the number of a 256-colour code is the look that was asked for."""
    parts = _SGR.split(line)
    text, looks = parts[0], bytearray(len(parts[0]))
    for code, piece in zip(parts[1::2], parts[2::2], strict=True):
        look = int(code[5:]) if code.startswith("38;5;") else FRAME
        text += piece
        looks += bytes([look]) * len(piece)
    text, looks = text[:width].ljust(width), looks[:width]
    return CellRow(text, bytes(looks) + bytes(width - len(looks)))
