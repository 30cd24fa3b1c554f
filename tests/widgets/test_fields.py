"""Choices, text fields and the row of views under keys and mouse."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets import Input

from widgets.choice import Choice
from widgets.tab_row import TabRow
from widgets.text_field import TextField

METHODS = (("lora", "LoRA 16-bit"), ("qlora", "QLoRA NF4"))
Story = Callable[[Pilot[None], "Host"], Awaitable[None]]


class Host(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, str]] = []

    def compose(self) -> ComposeResult:
        yield Choice("Method", METHODS, "qlora")
        yield TextField("Base", "embedded")
        yield TabRow((("plots", "Plots"), ("log", "Log [b]3[/b]")), "plots")

    def on_choice_changed(self, message: Choice.Changed) -> None:
        assert message.control is message.choice
        self.heard.append(("choice", message.value))

    def on_text_field_changed(self, message: TextField.Changed) -> None:
        assert message.control is message.field
        self.heard.append(("text", message.value))

    def on_tab_row_wanted(self, message: TabRow.Wanted) -> None:
        assert message.control is message.row
        self.heard.append(("tab", message.key))


def play(story: Story, size: tuple[int, int] = (80, 6)) -> None:
    async def run() -> None:
        app = Host()
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await story(pilot, app)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("keys", "heard"),
    [
        (["right"], ["lora"]),
        (["left"], ["lora"]),
        (["space", "enter"], ["lora", "qlora"]),
        (["home"], ["lora"]),
        (["end"], []),
    ],
)
def test_choice_keys(keys: list[str], heard: list[str]) -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        app.query_one(Choice).focus()
        await pilot.press(*keys)
        assert app.heard == [("choice", value) for value in heard]

    play(story)


def test_choice_shows_all_options_or_the_chosen_one() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        choice = app.query_one(Choice)
        choice.note = "16-bit base"
        assert choice.render_line(0).text.rstrip() == "Method          ( ) LoRA 16-bit  (•) QLoRA NF4    16-bit base"
        await pilot.resize_terminal(40, 6)
        await pilot.pause()
        assert choice.render_line(0).text.startswith("Method          ◂ QLoRA NF4 ▸")
        choice.value = "unknown"
        assert "◂ unknown ▸" in choice.render_line(0).text
        assert app.heard == []

    play(story)


def test_choice_clicks() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        await pilot.click(Choice, offset=(18, 0))
        await pilot.click(Choice, offset=(18, 0))
        await pilot.click(Choice, offset=(2, 0))
        assert app.heard == [("choice", "lora")]
        await pilot.click(Choice, offset=(70, 0))
        assert app.heard[-1] == ("choice", "qlora")

    play(story)


def test_a_choice_needs_options() -> None:
    with pytest.raises(ValueError, match="wanted at least one"):
        Choice("Method", (), "")


def test_text_is_taken_on_enter_and_on_leaving_only() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        field = app.query_one(TextField)
        field.query_one(Input).focus()
        await pilot.press("end", "x")
        assert app.heard == []
        await pilot.press("enter")
        assert app.heard == [("text", "embeddedx")]
        await pilot.press("y", "tab")
        await pilot.pause()
        assert app.heard[1:] == [("text", "embeddedxy")]
        field.value = "[red]set[/red]"
        await pilot.pause()
        assert field.query_one(Input).value == "[red]set[/red]"
        assert len(app.heard) == 2

    play(story)


def test_tabs_are_asked_for_by_click() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        row = app.query_one(TabRow)
        assert row.render_line(0).text.rstrip() == " Plots   Log [b]3[/b]"
        await pilot.click(TabRow, offset=(11, 0))
        await pilot.click(TabRow, offset=(1, 0))
        await pilot.click(TabRow, offset=(60, 0))
        assert app.heard == [("tab", "log"), ("tab", "plots")]
        assert row.current == "plots", "who shows the views decides"

    play(story)


@pytest.mark.parametrize("width", [1, 10, 17, 30])
def test_narrow_and_no_color(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def story(pilot: Pilot[None], app: Host) -> None:
        for widget in (app.query_one(Choice), app.query_one(TabRow)):
            assert widget.render_line(0).cell_length == width
            assert None not in [segment.style for segment in widget.render_line(0)]

    play(story, (width, 6))
