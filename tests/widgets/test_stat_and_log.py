"""The row of a figure, the log, the smoother."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from widgets.log_view import LogView, visible_lines
from widgets.smooth import Smoother
from widgets.stat import Stat

Story = Callable[[Pilot[None], "Host"], Awaitable[None]]


class Host(App[None]):
    def compose(self) -> ComposeResult:
        yield Stat("speed", "tok/s")
        yield LogView(keep=50)

    @property
    def log_view(self) -> LogView:
        return self.query_one(LogView)


def play(story: Story, size: tuple[int, int] = (40, 11)) -> None:
    async def run() -> None:
        app = Host()
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await story(pilot, app)

    asyncio.run(run())


def rows(view: LogView) -> list[str]:
    return [view.render_line(y).text.rstrip() for y in range(view.scrollable_content_region.height)]


def test_stat_shows_label_value_and_unit() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        stat = app.query_one(Stat)
        assert stat.render_line(0).text.rstrip() == "speed - tok/s"
        stat.value = "[b]1 204[/b]"
        await pilot.pause()
        assert stat.render_line(0).text.rstrip() == "speed [b]1 204[/b] tok/s"
        assert stat.render_line(0).cell_length == 40

    play(story)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a\nb", ["a", "b"]),
        ("10%\r50%\r100%", ["100%"]),
        ("done\r\nnext\r", ["done", "next"]),
        ("\x1b[31mred\x1b[0m", ["·[31mred·[0m"]),
        ("\x1b]0;title\x07", ["·]0;title·"]),
        ("\x9b2J", ["·2J"]),
        ("[b]bold[/b]", ["[b]bold[/b]"]),
        ("a\tb", ["a       b"]),
        ("", [""]),
    ],
)
def test_visible_lines(text: str, wanted: list[str]) -> None:
    assert visible_lines(text) == wanted


def test_log_shows_markup_as_it_is_and_follows_the_end() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        view = app.log_view
        view.extend(f"[red]line {i}[/red]" for i in range(80))
        await pilot.pause()
        assert len(view.lines) == 50
        assert rows(view)[-1] == "[red]line 79[/red]"
        view.extend(["newest"])
        await pilot.pause()
        assert rows(view)[-1] == "newest"

    play(story)


def test_log_stays_where_the_user_scrolled() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        view = app.log_view
        view.extend(f"line {i}" for i in range(40))
        await pilot.pause()
        view.focus()
        await pilot.press("home")
        await pilot.wait_for_scheduled_animations()
        top = rows(view)[0]
        view.extend(["newest"])
        await pilot.pause()
        assert rows(view)[0] == top == "line 0"
        await pilot.press("end")
        await pilot.wait_for_scheduled_animations()
        assert rows(view)[-1] == "newest"

    play(story)


def test_long_and_wide_lines_wrap() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        view = app.log_view
        width = view.scrollable_content_region.width
        view.extend(["x" * (2 * width + 3), "漢" * width])
        await pilot.pause()
        shown = [row for row in rows(view) if row]
        assert [len(row) for row in shown[:3]] == [width, width, 3]
        assert "".join(shown[3:]) == "漢" * width
        view.wrap = False
        await pilot.pause()
        assert view.virtual_size.width == 2 * width + 3
        view.clear()
        await pilot.pause()
        assert not any(rows(view))

    play(story)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (40, 3)])
def test_tiny_sizes_and_no_color(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def story(pilot: Pilot[None], app: Host) -> None:
        app.log_view.extend(["some text", "漢字"])
        app.query_one(Stat).value = "5"
        await pilot.pause()

    play(story, size)


def test_smoother_starts_at_the_first_value_and_forgets_no_weight() -> None:
    assert Smoother(0.9).feed([4.0])[0] == pytest.approx(4.0)
    assert Smoother(0.9).feed([2.0] * 50) == pytest.approx([2.0] * 50)
    assert Smoother(0.5).feed([0.0, 1.0]) == pytest.approx([0.0, 2 / 3])
    assert Smoother(0).feed([1, 5]) == [1, 5]


def test_smoother_in_parts_and_over_a_hole() -> None:
    values = [4.0, 3.0, math.nan, 2.0, 1.0]
    parts = Smoother()
    whole = Smoother().feed(values)
    assert math.isnan(whole[2])
    assert [*parts.feed(values[:2]), *parts.feed(values[2:])] == pytest.approx(whole, nan_ok=True)
    assert whole[3] == pytest.approx(Smoother().feed([4, 3, 2])[-1])


@pytest.mark.parametrize("keep", [-0.1, 1, 2])
def test_smoother_needs_a_share(keep: float) -> None:
    with pytest.raises(ValueError, match="wanted at least 0 and below 1"):
        Smoother(keep)
