"""The slider under keys, mouse and typing."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from textual import events
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from widgets.scale import stops_scale
from widgets.slider import Slider

RANKS = stops_scale((1, 2, 4, 8, 16, 32, 64, 128, 256), 1, 1024)
Story = Callable[[Pilot[None], "Host"], Awaitable[None]]


class Host(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.turns: list[float] = []

    def compose(self) -> ComposeResult:
        yield Slider("Rank", RANKS, 16, whole=True)
        yield Slider("Other", RANKS, 1, id="other")

    def on_slider_changed(self, message: Slider.Changed) -> None:
        assert message.control is message.slider
        self.turns.append(message.value)

    @property
    def slider(self) -> Slider:
        return self.query(Slider).first()


def play(story: Story, size: tuple[int, int] = (80, 4)) -> None:
    async def run() -> None:
        app = Host()
        async with app.run_test(size=size) as pilot:
            app.slider.focus()
            await pilot.pause()
            await story(pilot, app)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("keys", "turns"),
    [
        (["right"], [32]),
        (["left", "left"], [8, 4]),
        (["shift+right"], [64]),
        (["pageup"], [64]),
        (["pagedown"], [4]),
        (["home"], [1]),
        (["end", "right"], [256]),
        (["2", "4", "enter"], [24]),
        (["enter", "4", "8", "enter"], [48]),
        (["2", "4", "escape", "right"], [32]),
        (["2", "4", "backspace", "enter"], [2]),
        (["1", "6", "enter"], []),
        (["enter", "enter"], []),
        (["2", "4", "enter", "right"], [24, 32]),
    ],
)
def test_keys(keys: list[str], turns: list[float]) -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        await pilot.press(*keys)
        await pilot.pause()
        assert app.turns == turns
        assert app.slider.value == ([16, *turns][-1])

    play(story)


@pytest.mark.parametrize("text", ["2000", "0", "1.5", "1e", "e", "1-2"])
def test_a_typed_value_that_is_none_stays_with_the_limits(text: str) -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        await pilot.press("enter", *text, "enter")
        await pilot.pause()
        assert app.turns == []
        row = app.slider.render_line(0).text
        assert f"{text}▏" in row
        assert "1 to 1024" in row
        await pilot.press("escape")
        assert "16" in app.slider.render_line(0).text

    play(story)


def test_setting_the_value_posts_nothing_but_shows_it() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        app.slider.value = 64
        app.slider.note = "(= 128)"
        await pilot.pause()
        assert app.turns == []
        assert "64" in app.slider.render_line(0).text
        assert "(= 128)" in app.slider.render_line(0).text

    play(story)


def test_click_and_drag() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        begin, length = app.slider._track()
        await pilot.click(Slider, offset=(begin, 0))
        assert app.turns == [1]
        await pilot.mouse_down(Slider, offset=(begin, 0))
        await pilot.hover(Slider, offset=(begin + length // 2, 0))
        await pilot.hover(Slider, offset=(begin + length - 1, 0))
        await pilot.mouse_up(Slider, offset=(begin + length - 1, 0))
        assert app.turns == [1, 16, 256]
        await pilot.hover(Slider, offset=(begin, 0))
        assert app.turns == [1, 16, 256], "a move without a button turns nothing"

    play(story)


def test_a_click_beside_the_track_takes_the_focus_and_turns_nothing() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        begin, length = app.slider._track()
        for cell in (0, begin - 1, begin + length, begin + length + 2, app.slider.size.width - 1):
            app.query_one("#other", Slider).focus()
            await pilot.click(Slider, offset=(cell, 0))
            assert app.slider.has_focus
            assert (app.turns, app.slider.value) == ([], 16), f"cell {cell}"
        await pilot.mouse_down(Slider, offset=(2, 0))
        await pilot.hover(Slider, offset=(begin + 3, 0))
        await pilot.mouse_up(Slider, offset=(begin + 3, 0))
        assert app.turns == [], "nor does a drag that began there"
        await pilot.click(Slider, offset=(begin + length - 1, 0))
        assert app.turns == [256], "the last cell of the track is the last stop"
        await pilot.click(Slider, offset=(begin, 0), button=3)
        assert app.turns == [256]

    play(story)


def test_while_a_value_is_typed_letters_start_nothing_and_the_keys_below_are_those_of_typing() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        heard: list[str] = []
        app.bind("r", "run_it", description="Run")
        app.action_run_it = lambda: heard.append("r")  # type: ignore[attr-defined]

        def keys() -> list[str]:
            return [key.binding.description for key in app.screen.active_bindings.values() if key.binding.show]

        assert "Run" in keys()
        assert "Accept" not in keys()
        await pilot.press("4", "8", "r")
        assert heard == []
        assert keys()[:2] == ["Accept", "Cancel"]
        assert "Run" not in keys()
        await pilot.press("enter", "r")
        assert (heard, app.turns) == (["r"], [48])
        assert "Accept" not in keys()

    play(story)


def test_the_wheel_turns_only_what_is_edited() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        await pilot._post_mouse_events([events.MouseScrollUp], Slider, offset=(30, 0))
        await pilot.pause()
        assert app.turns == [], "the focus alone may have come in passing"
        await pilot.press("enter")
        await pilot._post_mouse_events([events.MouseScrollUp], Slider, offset=(30, 0))
        await pilot.pause()
        assert app.turns == [32]
        app.query_one("#other", Slider).focus()
        await pilot.pause()
        await pilot._post_mouse_events([events.MouseScrollUp], Slider, offset=(30, 0))
        await pilot.pause()
        assert app.turns == [32]

    play(story)


def test_escape_brings_back_what_arrows_and_digits_changed_in_an_edit() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        await pilot.press("right", "enter", "right", "right")
        assert (app.turns, app.slider.value) == ([32, 64, 128], 128)
        assert "128▏" in app.slider.render_line(0).text
        await pilot.press("4", "right", "escape")
        assert (app.turns, app.slider.value) == ([32, 64, 128, 32], 32)
        await pilot.press("enter", "right", "enter", "escape", "4", "escape")
        assert (app.turns[4:], app.slider.value) == ([64], 64)

    play(story)


def test_keys_of_a_burst_keep_their_order() -> None:
    """As a slow line delivers them: all in one read, handled before the app has seen the first."""

    async def story(pilot: Pilot[None], app: Host) -> None:
        keys = ("right", "right", "2", "4", "enter", "left", "tab", "right", "3", "enter", "shift+tab", "home")
        for key in keys:
            app.post_message(events.Key(key, key if len(key) == 1 else None))
        await pilot.pause()
        await pilot.pause()
        other = app.query_one("#other", Slider)
        assert [turn for turn in app.turns if turn not in (2, 3)] == [32, 64, 24, 16, 1]
        assert [turn for turn in app.turns if turn in (2, 3)] == [2, 3]
        assert (app.slider.value, other.value) == (1, 3)

    play(story)


def test_letters_of_numbers_are_left_to_others_unless_typing() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        heard: list[str] = []
        app.bind("e", "note")
        app.action_note = lambda: heard.append("e")  # type: ignore[attr-defined]
        await pilot.press("e")
        assert heard == ["e"]
        await pilot.press("2", "e", "1", "enter")
        assert heard == ["e"]
        assert app.turns == [20]

    play(story)


def test_leaving_drops_a_half_typed_value() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        await pilot.press("5", "tab")
        await pilot.pause()
        assert app.slider.typed is None
        assert app.turns == []

    play(story)


@pytest.mark.parametrize("width", [1, 8, 20, 30, 40, 200])
def test_any_width_and_no_color(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def story(pilot: Pilot[None], app: Host) -> None:
        await pilot.press("right")
        row = app.slider.render_line(0)
        assert row.cell_length == app.slider.size.width
        assert None not in [segment.style for segment in row]

    play(story, (width, 4))
