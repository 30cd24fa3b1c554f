"""Round ticks and a range that rarely moves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from widgets.axis import StickyRange, log_ticks, nice_step, nice_ticks, tick_labels

VALUES = st.floats(-1e9, 1e9)


@given(VALUES, st.floats(1e-6, 1e9), st.integers(1, 12))
def test_ticks_lie_inside_and_are_few(low: float, span: float, count: int) -> None:
    high = low + span
    if not low < high:
        return
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= count + 1
    assert ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("low", "high", "count", "wanted"),
    [
        (0, 1204, 4, [0, 500, 1000]),
        (0, 60, 6, [0, 10, 20, 30, 40, 50, 60]),
        (0.82, 4.1, 4, [1, 2, 3, 4]),
        (0, 0.004, 4, [0, 0.001, 0.002, 0.003, 0.004]),
        (5, 5, 4, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, wanted: list[float]) -> None:
    assert nice_ticks(low, high, count) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("high", "count", "wanted"),
    [(12, 5, [0, 5, 10]), (3, 5, [0, 1, 2, 3]), (1, 9, [0, 1]), (100, 4, [0, 25, 50, 75, 100]), (0.5, 4, [0])],
)
def test_what_counts_has_whole_ticks(high: float, count: int, wanted: list[float]) -> None:
    assert nice_ticks(0, high, count, whole=True) == wanted


@pytest.mark.parametrize(
    ("ticks", "wanted"),
    [
        ([0, 500, 1000], ["0", "500", "1000"]),
        ([0, 0.5, 1, 1.5], ["0.0", "0.5", "1.0", "1.5"]),
        ([0, 5000, 10000], ["0", "5k", "10k"]),
        ([0, 25_000_000, 50_000_000], ["0", "25M", "50M"]),
        ([0, 1e-4, 2e-4], ["0", "0.0001", "0.0002"]),
        ([-2, 0, 2], ["-2", "0", "2"]),
        ([], []),
    ],
)
def test_labels_tell_neighbours_apart(ticks: list[float], wanted: list[str]) -> None:
    assert tick_labels(ticks) == wanted


def test_log_ticks_are_powers_or_their_double_and_fivefold() -> None:
    assert log_ticks(0.5, 20, 6) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert log_ticks(1e-6, 1e3, 5) == pytest.approx([1e-6, 1e-4, 1e-2, 1, 100])
    assert log_ticks(1.1, 1.9, 4) == pytest.approx(nice_ticks(1.1, 1.9, 4))


@pytest.mark.parametrize(("span", "count"), [(0, 3), (-1, 3), (math.nan, 3), (math.inf, 3), (1, 0)])
def test_a_step_needs_a_span(span: float, count: int) -> None:
    with pytest.raises(ValueError, match="wanted a positive finite span"):
        nice_step(span, count)


@given(st.lists(st.tuples(VALUES, st.floats(0, 1e6)), min_size=1, max_size=20), st.booleans())
def test_the_range_always_holds_its_data(spans: list[tuple[float, float]], from_zero: bool) -> None:
    sticky = StickyRange(from_zero=from_zero)
    for low, span in spans:
        bottom, top = sticky.cover(low, low + span)
        assert bottom <= low
        assert low + span <= top
        assert bottom < top
        assert not from_zero or bottom <= 0


def test_the_range_stays_while_data_move_inside_it() -> None:
    sticky = StickyRange()
    first = sticky.cover(0.9, 4.0)
    assert [sticky.cover(0.9 + i / 100, 3.9 - i / 100) for i in range(60)] == [first] * 60
    assert sticky.cover(0.9, 9.0) != first


def test_the_range_shrinks_once_the_data_fill_little_of_it() -> None:
    sticky = StickyRange()
    sticky.cover(0, 100)
    bottom, top = sticky.cover(40, 50)
    assert (bottom, top) != (0, 100)
    assert 35 <= bottom <= 40
    assert 50 <= top <= 55


def test_a_flat_curve_gets_a_range_around_it() -> None:
    bottom, top = StickyRange().cover(2.5, 2.5)
    assert bottom < 2.5 < top
    assert StickyRange(from_zero=True).cover(8, 8)[0] == 0


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1), (0, math.inf), (2, 1)])
def test_a_range_of_nothing_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="wanted two finite values"):
        StickyRange().cover(low, high)
