"""Where a slider can stand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from widgets.scale import Scale, stops_scale

RANKS = stops_scale((1, 2, 4, 8, 16, 32), 1, 1024)
STOPS = st.lists(st.integers(-1000, 1000), min_size=1, max_size=30, unique=True).map(sorted)


@pytest.mark.parametrize(
    ("value", "stops", "wanted"),
    [(8, 1, 16), (8, -1, 4), (8, 99, 32), (8, -99, 1), (5, 1, 8), (5, -1, 4), (32, 1, 32), (1, -1, 1), (8, 2, 32)],
)
def test_turning(value: float, stops: int, wanted: float) -> None:
    assert RANKS.turned(value, stops) == wanted


def test_a_typed_value_beyond_the_stops_is_not_lost_by_turning_further_out() -> None:
    assert RANKS.turned(500, 1) == 500
    assert RANKS.turned(500, -1) == 32


@given(STOPS, st.floats(-1100, 1100))
def test_up_never_lowers_and_down_never_raises(stops: list[int], value: float) -> None:
    scale = stops_scale(stops, -2000, 2000)
    assert scale.turned(value, 1) >= value or value > stops[-1]
    assert scale.turned(value, -1) <= value or value < stops[0]
    assert 0 <= scale.fraction(value) <= 1


@given(STOPS)
def test_every_stop_can_be_pointed_at(stops: list[int]) -> None:
    scale = stops_scale(stops)
    assert [scale.nearest(scale.fraction(stop)) for stop in stops] == stops


def test_stops_take_equal_room() -> None:
    assert [RANKS.fraction(stop) for stop in RANKS.stops] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert RANKS.fraction(3) == pytest.approx(0.3)
    assert RANKS.fraction(900) == 1


@pytest.mark.parametrize("stops", [(), (1, 1), (2, 1)])
def test_stops_must_rise(stops: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="wanted at least one"):
        stops_scale(stops)


def test_ends_must_hold_the_stops() -> None:
    with pytest.raises(ValueError, match="wanted them to hold the stops"):
        stops_scale((1, 2), 1.5)
    assert Scale((5,), 0, 10).fraction(5) == 0.0
