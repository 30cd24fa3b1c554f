"""Decimation keeps what a terminal can show, at a cost that does not grow with the run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from widgets.columns import ColumnExtremes, Series

FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=1, max_size=400), st.integers(1, 60))
def test_at_most_two_points_per_column_and_the_extremes_survive(ys: list[float], columns: int) -> None:
    extremes = ColumnExtremes(0, 399, columns)
    extremes.add(range(len(ys)), ys)
    points = [point for piece in extremes.segments() for point in piece]
    assert len(points) <= 2 * columns
    assert min(y for _, y in points) == min(ys)
    assert max(y for _, y in points) == max(ys)
    assert set(points) <= set(zip(map(float, range(len(ys))), ys, strict=True))
    assert [x for x, _ in points] == sorted(x for x, _ in points)


@given(st.lists(FINITE | st.just(math.nan), max_size=200), st.integers(1, 40), st.integers(0, 200))
def test_adding_in_two_parts_gives_what_adding_at_once_gives(ys: list[float], columns: int, cut: int) -> None:
    whole, parts = ColumnExtremes(0, 199, columns), ColumnExtremes(0, 199, columns)
    whole.add(range(len(ys)), ys)
    parts.add(range(len(ys[:cut])), ys[:cut])
    parts.add(range(len(ys[:cut]), len(ys)), ys[cut:])
    assert whole.segments() == parts.segments()


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_breaks_the_line(hole: float) -> None:
    extremes = ColumnExtremes(0, 4, 5)
    extremes.add(range(5), [1, 2, hole, 4, 5])
    assert extremes.segments() == [[(0, 1), (1, 2)], [(3, 4), (4, 5)]]


def test_only_holes_make_no_segment() -> None:
    extremes = ColumnExtremes(0, 4, 5)
    extremes.add(range(3), [math.nan] * 3)
    assert extremes.segments() == []


def test_points_outside_the_range_are_dropped() -> None:
    extremes = ColumnExtremes(0, 10, 11)
    extremes.add([-5, 3, 50], [1, 2, 3])
    assert extremes.segments() == [[(3, 2)]]


def test_within_a_column_the_points_keep_their_order_in_time() -> None:
    extremes = ColumnExtremes(0, 100, 2)
    extremes.add([0, 1, 2], [5, 9, 1])
    assert extremes.segments() == [[(1, 9), (2, 1)]]


@pytest.mark.parametrize(("low", "high", "columns"), [(0, 1, 0), (1, 1, 5), (2, 1, 5), (0, math.inf, 5)])
def test_a_range_that_is_none_is_refused(low: float, high: float, columns: int) -> None:
    with pytest.raises(ValueError, match="wanted a rising range and a column"):
        ColumnExtremes(low, high, columns)


def test_series_reads_only_new_points_until_the_shape_changes() -> None:
    series = Series()
    series.extend([0, 1], [1, 2])
    first = series.decimated(0, 10, 11)
    series.extend([2], [3])
    assert series.decimated(0, 10, 11) is first
    assert first.segments() == [[(0, 1), (1, 2), (2, 3)]]
    assert series.decimated(0, 20, 11) is not first
    assert series.decimated(0, 20, 11).segments() == [[(0, 1), (1, 2), (2, 3)]]


def test_series_knows_its_ends_and_forgets_them() -> None:
    series = Series()
    series.extend([0, 1, 2, 3], [-1, math.nan, 5, math.inf])
    assert (series.x_last, series.lowest, series.lowest_positive, series.highest) == (2, -1, 5, 5)
    series.clear()
    assert (series.x_last, series.lowest, series.highest, len(series.xs)) == (None, None, None, 0)
    with pytest.raises(ValueError):
        series.extend([1, 2], [1])
