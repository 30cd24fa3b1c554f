"""plotext gives exact cells back, survives any size, and one plot never shows in another."""

import math

import plotext
import pytest

from widgets.line_picture import framed
from widgets.plot_canvas import FRAME, CellRow, Frame, Trace, draw, level

RISING = Trace(([(float(x), float(x)) for x in range(11)],), 1)


def frame(width: int = 40, height: int = 12) -> Frame:
    return framed(width, height, (0.0, 10.0), (0.0, 10.0), x_label="step")


def looks(rows: list[CellRow]) -> set[int]:
    return {look for row in rows for look in row.looks}


@pytest.mark.parametrize("width", [*range(1, 16), 72, 200])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 8, 40])
def test_any_size_gives_exactly_its_cells(width: int, height: int) -> None:
    rows = draw(frame(width, height), [RISING, Trace(([(5.0, 5.0)],), 2, "dots"), level(frame(width, height), 3, 9)])
    assert len(rows) == height
    assert all(len(row.text) == len(row.looks) == width for row in rows)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_no_room_gives_no_rows(width: int, height: int) -> None:
    assert draw(frame(width, height), [RISING]) == []


def test_curve_axes_and_ticks_are_there() -> None:
    rows = draw(frame(), [RISING])
    text = "\n".join(row.text for row in rows)
    assert looks(rows) == {FRAME, 1}
    assert "10 step" in rows[-1].text
    assert rows[0].text.startswith("10┤")
    assert "└" in text
    top, bottom = (row.looks.index(1) for row in (rows[0], rows[-3]))
    assert top > bottom, "a rising line stands further right at the top"


def test_a_later_trace_takes_the_cell() -> None:
    dots = Trace(([(5.0, 5.0)],), 2, "dots")
    over, under = draw(frame(), [RISING, dots]), draw(frame(), [dots])
    assert sum(row.looks.count(2) for row in over) == sum(row.looks.count(2) for row in under) == 1
    assert sum(row.text.count("●") for row in over) == 1


def test_pieces_are_not_joined() -> None:
    apart = Trace(([(0.0, 5.0), (3.0, 5.0)], [(7.0, 5.0), (10.0, 5.0)]), 1)
    joined = Trace(([(0.0, 5.0), (3.0, 5.0), (7.0, 5.0), (10.0, 5.0)],), 1)
    cells = [sum(row.looks.count(1) for row in draw(frame(), [trace])) for trace in (apart, joined)]
    assert cells[0] < cells[1] - 5


def test_two_plots_do_not_see_each_other() -> None:
    small = framed(20, 6, (0.0, 3.0), (0.0, 1.0))
    alone, small_alone = draw(frame(), [RISING]), draw(small, [Trace(([(1.0, 0.5)],), 3, "dots")])
    for _ in range(3):
        assert draw(frame(), [RISING]) == alone
        assert draw(small, [Trace(([(1.0, 0.5)],), 3, "dots")]) == small_alone


def test_the_global_figure_is_left_clean_even_when_drawing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = draw(frame(), [RISING])
    with monkeypatch.context() as patch:
        patch.setattr(plotext, "build", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(frame(), [RISING, level(frame(), 2, 9)])
    assert draw(frame(), [RISING]) == alone


def test_huge_and_non_finite_values_cost_no_time_and_no_crash() -> None:
    wild = Trace(([(0.0, 1.0), (5.0, 1e300), (6.0, math.nan), (7.0, -1e300), (8.0, math.inf), (10.0, 1.0)],), 1)
    assert len(draw(frame(), [wild])) == 12


def test_without_points_the_axes_stay() -> None:
    assert "10 step" in draw(frame(), [])[-1].text


def test_changed_span_is_tight() -> None:
    before, after = CellRow("abcdef", bytes(6)), CellRow("abXdeY", bytes(6))
    assert after.changed_span(before) == (2, 6)
    assert CellRow("abcdef", bytes([0, 0, 0, 1, 0, 0])).changed_span(before) == (3, 4)
    assert before.changed_span(CellRow("abcdef", bytes(6))) is None
    assert before.changed_span(CellRow("abc", bytes(3))) == (0, 6)


def test_runs_join_equal_looks() -> None:
    assert list(CellRow("aabbc", bytes([1, 1, 2, 2, 0])).runs()) == [("aa", 1), ("bb", 2), ("c", 0)]
    assert list(CellRow("", b"").runs()) == []
