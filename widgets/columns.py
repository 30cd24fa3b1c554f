"""Decimation: at most two points per terminal column, from any number of points. Knows no widget or plot library."""

import math
from array import array
from collections.abc import Iterable

Point = tuple[float, float]


class ColumnExtremes:
    """The lowest and the highest point of every column of a fixed x range, kept up to date point by point.

    A column of a terminal can show no more than the span of its values, so nothing visible is lost. The cost of a
    redraw depends on the width of the plot, not on the number of points. A non-finite y leaves a gap.
    """

    def __init__(self, x_low: float, x_high: float, columns: int) -> None:
        """Divide `x_low` to `x_high` (both shown) into `columns` columns.

        Raises:
            ValueError: No columns, or an empty or non-finite x range.
        """
        if columns < 1 or not (math.isfinite(x_low) and math.isfinite(x_high) and x_low < x_high):
            raise ValueError(f"found x {x_low} to {x_high} in {columns} columns; wanted a rising range and a column")
        self._x_low = x_low
        self._per_column = (x_high - x_low) / max(1, columns - 1)
        self._columns = columns
        self._lowest: list[Point | None] = [None] * columns
        self._highest: list[Point | None] = [None] * columns
        self._after_gap = bytearray(columns)
        self._gap = False

    def add(self, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Add points in order of time. A point outside the x range is dropped."""
        lowest, highest = self._lowest, self._highest
        for x, y in zip(xs, ys, strict=False):
            if not math.isfinite(y) or not math.isfinite(x):
                self._gap = True
                continue
            column = int((x - self._x_low) / self._per_column + 0.5)
            if not 0 <= column < self._columns:
                continue
            low, high = lowest[column], highest[column]
            if low is None or high is None:
                self._after_gap[column] = self._gap
                lowest[column] = highest[column] = (x, y)
            elif y < low[1]:
                lowest[column] = (x, y)
            elif y > high[1]:
                highest[column] = (x, y)
            self._gap = False

    def segments(self) -> list[list[Point]]:
        """Return the kept points as unbroken pieces, in x order, at most two for each column."""
        pieces: list[list[Point]] = []
        for low, high, after_gap in zip(self._lowest, self._highest, self._after_gap, strict=True):
            if low is None or high is None:
                continue
            if after_gap or not pieces:
                pieces.append([])
            pieces[-1].extend((low,) if low == high else sorted((low, high)))
        return pieces


class Series:
    """All points of one curve, kept so that another width or range can decimate them again.

    Attributes:
        xs: Every x, in the order of arrival.
        ys: Every y.
        x_last: Largest finite x, or None.
        lowest: Smallest finite y, or None.
        lowest_positive: Smallest finite y above zero, or None.
        highest: Largest finite y, or None.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop all points."""
        self.xs, self.ys = array("d"), array("d")
        self.x_last: float | None = None
        self.lowest: float | None = None
        self.lowest_positive: float | None = None
        self.highest: float | None = None
        self._columns: ColumnExtremes | None = None
        self._shape: tuple[float, float, int] | None = None
        self._seen = 0

    def extend(self, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Append points.

        Raises:
            ValueError: `xs` and `ys` differ in length.
        """
        for x, y in zip(xs, ys, strict=True):
            self.xs.append(x)
            self.ys.append(y)
            if math.isfinite(x) and math.isfinite(y):
                self.x_last = x if self.x_last is None else max(self.x_last, x)
                self.lowest = y if self.lowest is None else min(self.lowest, y)
                self.highest = y if self.highest is None else max(self.highest, y)
                if y > 0:
                    self.lowest_positive = y if self.lowest_positive is None else min(self.lowest_positive, y)

    def decimated(self, x_low: float, x_high: float, columns: int) -> ColumnExtremes:
        """Return the extremes for a range; a repeated call with the same range reads only the points that are new."""
        shape = (x_low, x_high, columns)
        if self._columns is None or shape != self._shape:
            self._columns, self._shape, self._seen = ColumnExtremes(*shape), shape, 0
        if self._seen < len(self.xs):
            self._columns.add(self.xs[self._seen :], self.ys[self._seen :])
            self._seen = len(self.xs)
        return self._columns
