"""What a line plot shows, without a screen: curves, ranges and the rows of cells they make. Knows no widget."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from widgets.axis import StickyRange, log_ticks, nice_ticks, tick_labels
from widgets.columns import Point, Series
from widgets.plot_canvas import CellRow, Frame, Trace, draw, level

Look = Literal["line", "faint", "dots"]
Hue = Literal[1, 2, 3, 4]

REFERENCE_LOOK = 9
"""The look of the dashed line; curves take 1 to 4 bright and 5 to 8 faint."""

_LAYER: dict[Look, int] = {"faint": 0, "line": 1, "dots": 2}


@dataclass(frozen=True, slots=True)
class Curve:
    """One named curve: what the legend says and how it looks."""

    key: str
    label: str
    look: Look = "line"
    hue: Hue = 1

    @property
    def cell_look(self) -> int:
        """Number that marks this curve's cells."""
        return self.hue + (4 if self.look == "faint" else 0)


@dataclass(frozen=True, slots=True)
class Reference:
    """A value worth a dashed line across the plot, such as a limit or a prediction."""

    value: float
    label: str


class LinePicture:
    """Curves over one x range, drawn on demand. A non-finite y is a gap; on a logarithmic axis so is a y of 0 or less.

    Attributes:
        x_total: Last x of the axis; 0 lets the axis grow with the data.
        log_y: Whether the y axis is logarithmic.
        reference: A dashed horizontal line, or None.
    """

    def __init__(self, curves: Sequence[Curve], *, x_label: str = "", from_zero: bool = False) -> None:
        """Start without points; the keys of `curves` are what `extend` and `replace` take."""
        self.x_total = 0.0
        self.log_y = False
        self.reference: Reference | None = None
        self._x_label = x_label
        self._series = {curve.key: Series() for curve in curves}
        self._layers = sorted(curves, key=lambda curve: _LAYER[curve.look])
        self._linear, self._log = StickyRange(from_zero=from_zero), StickyRange(margin=0.0)

    def extend(self, key: str, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Append points to a curve.

        Raises:
            KeyError: No curve has this key.
            ValueError: `xs` and `ys` differ in length.
        """
        self._series[key].extend(xs, ys)

    def clear(self, key: str) -> None:
        """Drop the points of a curve.

        Raises:
            KeyError: No curve has this key.
        """
        self._series[key].clear()

    def has_points(self, key: str) -> bool:
        """Return whether a curve has a finite point.

        Raises:
            KeyError: No curve has this key.
        """
        return self._series[key].highest is not None

    def rows(self, width: int, height: int) -> list[CellRow]:
        """Return the picture as `height` rows of `width` cells."""
        x_range = self._x_range()
        frame = framed(width, height, x_range, self._y_range(), x_label=self._x_label, log_y=self.log_y)
        values = [math.log10(value) if self.log_y else value for value in self._reference_values()]
        traces = [level(frame, value, REFERENCE_LOOK) for value in values]
        for curve in self._layers:
            pieces = self._series[curve.key].decimated(*x_range, frame.columns).segments()
            shown = [piece for whole in pieces for piece in _log_pieces(whole)] if self.log_y else pieces
            traces.append(Trace(shown, curve.cell_look, "dots" if curve.look == "dots" else "line"))
        return draw(frame, traces)

    def _x_range(self) -> tuple[float, float]:
        """Return 0 to the total, or, where points lie beyond it, 0 to 10, 20, 40, 80 ..., which changes rarely."""
        last = max((series.x_last or 0.0 for series in self._series.values()), default=0.0)
        if self.x_total > 0 and last <= self.x_total:
            return 0.0, self.x_total
        return 0.0, 10.0 * 2.0 ** max(0, math.ceil(math.log2(max(last, 10.0) / 10.0)))

    def _y_range(self) -> tuple[float, float]:
        all_series = self._series.values()
        highs = [series.highest for series in all_series if series.highest is not None]
        if self.log_y:
            lows = [series.lowest_positive for series in all_series if series.lowest_positive is not None]
        else:
            lows = [series.lowest for series in all_series if series.lowest is not None]
        lows, highs = [*lows, *self._reference_values()], [*highs, *self._reference_values()]
        if not lows:
            return (0.1, 1.0) if self.log_y else (0.0, 1.0)
        if not self.log_y:
            return self._linear.cover(min(lows), max(highs))
        bottom, top = self._log.cover(math.log10(min(lows)), math.log10(max(highs)))
        return 10.0**bottom, 10.0**top

    def _reference_values(self) -> tuple[float, ...]:
        value = self.reference.value if self.reference is not None else math.nan
        return (value,) if math.isfinite(value) and (value > 0 or not self.log_y) else ()


def _log_pieces(piece: Sequence[Point]) -> Iterator[list[Point]]:
    """Yield a piece with log10 of y, cut where y is 0 or less and has no logarithm."""
    run: list[Point] = []
    for x, y in piece:
        if y > 0:
            run.append((x, math.log10(y)))
        elif run:
            yield run
            run = []
    if run:
        yield run


_ROWS_PER_TICK = 3
_CELLS_PER_TICK = 14


def framed(
    width: int,
    height: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    x_label: str = "",
    log_y: bool = False,
) -> Frame:
    """Return a frame with round ticks; with `log_y` its y range and tick positions are powers of ten (exponents).

    Args:
        width: Cells across, tick labels and axis included.
        height: Rows, tick labels and axis included.
        x_range: First and last x; x counts something, so that its ticks are whole.
        y_range: Lowest and highest y, both positive with `log_y`.
        x_label: Written after the last x tick.
        log_y: Show y on a logarithmic axis; the traces must then hold log10 of their values.
    """
    rows = max(2, (height - 2) // _ROWS_PER_TICK)
    values = log_ticks(*y_range, rows) if log_y else nice_ticks(*y_range, rows)
    positions = [math.log10(value) for value in values] if log_y else values
    names = [tick_labels([value])[0] for value in values] if log_y else tick_labels(values)
    y_ticks = tuple(zip(positions, names, strict=True))
    shown = (math.log10(y_range[0]), math.log10(y_range[1])) if log_y else y_range
    xs = nice_ticks(*x_range, max(1, width // _CELLS_PER_TICK), whole=True)
    labels = tick_labels(xs)
    if x_label and labels:
        labels[-1] = f"{labels[-1]} {x_label}"
    return Frame(width, height, x_range, shown, tuple(zip(xs, labels, strict=True)), y_ticks)
