"""The plot on a screen: what it shows, what it repaints, and what must not crash it."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest
from textual.app import App, ComposeResult
from textual.geometry import Region
from textual.pilot import Pilot

from widgets.line_plot import Curve, LinePlot, Reference

CURVES = (Curve("raw", "each step", "faint"), Curve("smooth", "smoothed"), Curve("held", "held-out", "dots", 2))
Story = Callable[[Pilot[None], LinePlot], Awaitable[None]]


class Host(App[None]):
    def compose(self) -> ComposeResult:
        yield LinePlot(CURVES, title="loss", x_label="step")


def play(story: Story, size: tuple[int, int] = (80, 20)) -> None:
    async def run() -> None:
        app = Host()
        async with app.run_test(size=size) as pilot:
            plot = app.query_one(LinePlot)
            await pilot.pause()
            await story(pilot, plot)

    asyncio.run(run())


def text_of(plot: LinePlot) -> str:
    return "\n".join(plot.render_line(y).text for y in range(plot.size.height))


def repainted(plot: LinePlot, monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    """Collect the regions of every refresh from now on; a whole repaint counts as the whole size."""
    seen: list[Region] = []
    original = plot.refresh

    def note(*regions: Region, **options: bool) -> LinePlot:
        seen.extend(regions or [plot.size.region])
        return original(*regions, **options)

    monkeypatch.setattr(plot, "refresh", note)
    return seen


def test_names_curves_and_axes_are_shown() -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.x_total = 100
        await pilot.pause()
        assert text_of(plot).split() == ["loss", "Nothing", "yet."], "bare axes could pass for a curve"
        plot.empty = "No point, for a reason."
        await pilot.pause()
        assert text_of(plot).split() == ["loss", *plot.empty.split()]
        plot.extend("raw", range(50), [4 - x / 20 for x in range(50)])
        plot.extend("held", [0, 40], [4, 2])
        await pilot.pause()
        assert text_of(plot).startswith("loss  ── each step  ● held-out  "), "a curve without points is not named"
        plot.extend("smooth", [0, 1], [4, 3.9])
        plot.reference = Reference(3.0, "predicted")
        await pilot.pause()
        shown = text_of(plot)
        assert shown.startswith("loss  ── each step  ━━ smoothed  ● held-out  ╌╌ predicted")
        assert "100 step" in shown
        assert shown.count("●") == 3
        assert "╌" * 10 in shown

    play(story)


def test_a_new_point_repaints_a_few_cells_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.x_total = 1000
        plot.extend("raw", range(500), [2 + math.sin(x / 9) for x in range(500)])
        await pilot.pause()
        seen = repainted(plot, monkeypatch)
        plot.extend("raw", [520], [2.5])
        await pilot.pause()
        assert seen
        assert sum(region.area for region in seen) < 20

    play(story)


def test_nothing_new_repaints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.x_total = 1000
        plot.extend("raw", [1, 2, 3], [2, 3, 2])
        await pilot.pause()
        seen = repainted(plot, monkeypatch)
        plot.extend("raw", [2], [2.5])  # inside what its column shows already
        plot.x_total = 1000
        await pilot.pause()
        assert seen == []

    play(story)


def test_many_points_of_one_moment_are_one_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        drawings = []
        original = plot._picture.rows
        monkeypatch.setattr(
            plot._picture,
            "rows",
            lambda *size: drawings.append(size) or original(*size),  # type: ignore[func-returns-value]
        )
        for x in range(200):
            plot.extend("raw", [x], [x])
        await pilot.pause()
        assert len(drawings) == 1

    play(story)


def test_what_the_screen_holds_is_what_the_plot_holds() -> None:
    """Partial repaints add up: after many of them the screen equals a drawing from scratch."""

    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.x_total = 300
        for start in range(0, 300, 7):
            plot.extend("raw", range(start, start + 7), [5 * 0.99**x for x in range(start, start + 7)])
            await pilot.pause()
        lines = ["".join(s.text for s in strip) for strip in plot.screen._compositor.render_strips()]
        assert "\n".join(lines) == text_of(plot)
        whole = text_of(plot)
        plot._forget_drawing()
        plot._redraw()
        assert text_of(plot) == whole

    play(story)


def test_replace_forgets_the_old_points() -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.extend("held", [1, 5, 9], [1, 2, 3])
        await pilot.pause()
        assert text_of(plot).count("●") == 4
        plot.replace("held", [1], [1])
        await pilot.pause()
        assert text_of(plot).count("●") == 2

    play(story)


def test_log_axis_leaves_out_what_has_no_logarithm() -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.log_y = True
        plot.extend("held", [1, 5, 9], [0.01, 0.0, 10])
        plot.reference = Reference(-1, "below zero")
        await pilot.pause()
        shown = text_of(plot)
        assert shown.count("●") == 3
        assert "0.01" in shown
        assert "\n  10┤" in shown
        assert "log axis" in shown, "a curve may look the same on both axes"
        plot.log_y = False
        await pilot.pause()
        assert "log axis" not in text_of(plot)
        assert text_of(plot).count("●") == 4

    play(story)


def test_the_axis_grows_when_no_total_is_known() -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.extend("raw", [5], [2])
        await pilot.pause()
        assert "10 step" in text_of(plot)
        plot.extend("raw", [15], [1])
        await pilot.pause()
        assert "20 step" in text_of(plot)

    play(story)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 3), (13, 5), (20, 4), (300, 90)])
def test_any_size(size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.extend("raw", range(100), [math.nan if x % 9 == 0 else x for x in range(100)])
        plot.reference = Reference(50, "middle")
        await pilot.pause()
        assert plot.size == size
        for width, height in ((80, 24), size):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
        assert all(plot.render_line(y).cell_length == size[0] for y in range(size[1]))

    play(story, size)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        assert pilot.app.no_color
        plot.extend("raw", range(30), range(30))
        plot.reference = Reference(10, "line")
        await pilot.pause()
        styles = [segment.style for y in range(plot.size.height) for segment in plot.render_line(y)]
        assert None not in styles
        assert "each step" in text_of(plot)

    play(story)


def test_a_new_theme_recolours() -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.extend("raw", range(30), range(30))
        await pilot.pause()
        before = [segment.style for y in range(plot.size.height) for segment in plot.render_line(y)]
        pilot.app.theme = "textual-light"
        await pilot.pause()
        await pilot.pause()
        after = [segment.style for y in range(plot.size.height) for segment in plot.render_line(y)]
        assert before != after

    play(story)


def test_a_plot_out_of_sight_catches_up() -> None:
    async def story(pilot: Pilot[None], plot: LinePlot) -> None:
        plot.display = False
        await pilot.pause()
        plot.extend("held", [1, 5], [1, 2])
        await pilot.pause()
        plot.display = True
        await pilot.pause()
        assert text_of(plot).count("●") == 3

    play(story)


def test_an_unknown_curve_is_an_error() -> None:
    async def story(_: Pilot[None], plot: LinePlot) -> None:
        with pytest.raises(KeyError):
            plot.extend("nothing", [1], [1])

    play(story)
