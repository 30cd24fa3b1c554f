"""The gauge: its rows as text, its looks, and what it repaints."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.app import App, ComposeResult

from widgets.gauge import Gauge, Part, Reading
from widgets.gauge_picture import LINE, OVER, PATTERNS, bar, figure, headline, legend, whisker

FITS = Reading(
    parts=(Part("base", 5.31), Part("adapter", 0.16), Part("optim", 0.31), Part("activ", 2.2)),
    capacity=24.0,
    low=7.7,
    high=8.6,
    verdict="fits",
    level="good",
)
OVERFLOWS = Reading(
    parts=(Part("base", 15.0), Part("activ", 15.0)),
    capacity=24.0,
    low=29.0,
    high=33.0,
    verdict="does not fit",
    level="bad",
)


def text(runs: list[tuple[str, str]]) -> str:
    return "".join(part for part, _ in runs)


def test_a_bar_stacks_its_parts_in_proportion_and_ends_with_the_line() -> None:
    drawn = text(bar(FITS, 48))
    assert len(drawn) == 48
    assert drawn.endswith("·┃"), "the line stands at the capacity"
    filled = sum(drawn.count(pattern) for pattern in PATTERNS)
    assert filled == round(7.98 / 24 * 48)
    assert drawn.index("█") < drawn.index("░"), "from the left in order"


def test_what_lies_beyond_the_capacity_looks_different_and_passes_the_line() -> None:
    runs = bar(OVERFLOWS, 50)
    looks = [look for _, look in runs]
    assert looks.index(LINE) < looks.index(OVER)
    drawn = text(runs)
    assert drawn.index("┃") == round(24 / (33 * 1.04) * 50)
    assert drawn[drawn.index("┃") + 1] == "▓", "the pattern stays, so that it reads without colour"
    assert not any(look == OVER for _, look in bar(FITS, 50))


def test_the_range_and_the_measured_mark() -> None:
    row = text(whisker(FITS, 240))
    assert (row.index("├"), row.index("┼"), row.index("┤")) == (77, 80, 86)
    marked = Reading(FITS.parts, 24.0, 7.7, 8.6, measured=16.0)
    assert text(whisker(marked, 240)).index("▲") == 160
    assert "measured 16.0" in text(headline(marked, "GiB", 80))
    assert text(whisker(Reading(FITS.parts, 24.0), 20)).strip() == ""


def test_a_legend_wraps_and_carries_every_pattern_and_number() -> None:
    rows = [text(row) for row in legend(FITS, 30)]
    assert rows == ["█ base 5.31  ▓ adapter 0.16", "▒ optim 0.31  ░ activ 2.20"]
    assert all(len(row) <= 30 for row in rows)
    assert len(legend(FITS, 80)) == 1
    without = Reading((Part("base", 5.0), Part("logits", 0.004), Part("other", 0.5)))
    assert [text(row) for row in legend(without, 80)] == ["█ base 5.00  ▒ other 0.50"], "each keeps its pattern"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, "7.98 of 24.0 GiB (7.70-8.60)  fits"),
        (30, "7.98 of 24.0 GiB  fits"),
        (20, "7.98 of 24.0  fits"),
        (9, "7.98 fits"),
        (6, "7.98 f"),
    ],
)
def test_the_figures_shrink_with_the_room(width: int, shown: str) -> None:
    assert text(headline(FITS, "GiB", width)) == shown


def test_figures() -> None:
    assert [figure(value) for value in (0.0, 0.084, 9.994, 9.996, 24, 99.96, 131.4)] == [
        "0.00",
        "0.08",
        "9.99",
        "10.0",
        "24.0",
        "100",
        "131",
    ]


_VALUES = st.floats(0, 200)


@given(
    values=st.lists(_VALUES, max_size=9),
    capacity=st.none() | st.floats(0.1, 80),
    spread=st.none() | st.tuples(_VALUES, _VALUES).map(sorted),
    measured=st.none() | _VALUES,
    width=st.integers(1, 130),
)
def test_any_reading_fills_exactly_the_width(
    values: list[float], capacity: float | None, spread: list[float] | None, measured: float | None, width: int
) -> None:
    low, high = spread or (None, None)
    reading = Reading(tuple(Part("part", value) for value in values), capacity, low, high, measured)
    assert len(text(bar(reading, width))) == width
    assert len(text(whisker(reading, width))) == width
    assert len(text(headline(reading, "GiB", width))) <= width
    assert text(bar(reading, width)).count("┃") == (capacity is not None)


class Host(App[None]):
    def __init__(self, height: int) -> None:
        super().__init__()
        self.gauge = Gauge(unit="GiB", label="VRAM")
        self.gauge.styles.height = height

    def compose(self) -> ComposeResult:
        yield self.gauge


def rows_of(height: int, width: int, reading: Reading) -> list[str]:
    rows: list[str] = []

    async def run() -> None:
        app = Host(height)
        async with app.run_test(size=(width, height)) as pilot:
            app.gauge.reading = reading
            await pilot.pause()
            rows.extend(strip.text.rstrip() for strip in app.gauge.render_lines(app.gauge.size.region))

    asyncio.run(run())
    return rows


@pytest.mark.parametrize("no_color", [False, True])
def test_one_row_and_many(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    (row,) = rows_of(1, 80, FITS)
    assert row.startswith("VRAM █")
    assert row.endswith("┃ 7.98 of 24.0 GiB (7.70-8.60)  fits")
    head, stack, spread, names, *rest = rows_of(6, 60, FITS)
    assert head.endswith("fits")
    assert stack.endswith("┃")
    assert spread.strip().startswith("├")
    assert names == "█ base 5.31  ▓ adapter 0.16  ▒ optim 0.31  ░ activ 2.20"
    assert rest == ["", ""]


def test_thirty_columns_still_tell_stack_figures_and_verdict() -> None:
    head, stack, _, *names = rows_of(6, 30, OVERFLOWS)
    assert head == "30.0 of 24.0 GiB  does not fit"
    assert "█" in stack
    assert "┃▓" in stack
    assert names[0] == "█ base 15.0  ▓ activ 15.0"
    (row,) = rows_of(1, 30, OVERFLOWS)
    assert row.startswith("VRAM █")


def test_without_parts_it_says_why() -> None:
    assert rows_of(1, 40, Reading(verdict="reading the model"))[0] == "VRAM reading the model"
    assert rows_of(4, 40, Reading(verdict="reading the model")) == ["reading the model", "", "", ""]


def test_a_reason_that_finds_no_room_is_seen_to_go_on() -> None:
    reading = Reading(verdict="the model cannot be had")
    assert text(headline(reading, "GiB", 23)) == "the model cannot be had"
    assert text(headline(reading, "GiB", 10)) == "the model…"
    assert text(headline(reading, "GiB", 0)) == ""
