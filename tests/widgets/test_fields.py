"""Choices, text fields and the row of views under keys and mouse."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from textual import events
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from widgets.choice import Choice
from widgets.tab_row import TabRow
from widgets.text_field import TextField

METHODS = (("lora", "LoRA 16-bit"), ("qlora", "QLoRA NF4"))
Story = Callable[[Pilot[None], "Host"], Awaitable[None]]


class Host(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, str]] = []
        self.pressed: list[str] = []

    def action_note(self, key: str) -> None:
        self.pressed.append(key)

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
        (["space", "space"], ["lora", "qlora"]),
        (["enter"], []),
        (["enter", "right", "escape"], ["lora", "qlora"]),
        (["enter", "right", "enter", "escape"], ["lora"]),
        (["enter", "right", "tab", "shift+tab", "escape"], ["lora"]),
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
        assert app.heard == [("choice", "lora")], "beside the options nothing is chosen"
        assert app.query_one(Choice).has_focus

    play(story)


def test_the_arrows_of_a_narrow_choice_lead_both_ways() -> None:
    class Three(App[None]):
        def compose(self) -> ComposeResult:
            self.heard: list[str] = []
            yield Choice("Of three", [(word, word) for word in ("one", "two", "three")], "two")

        def on_choice_changed(self, message: Choice.Changed) -> None:
            self.heard.append(message.value)

    async def story(pilot: Pilot[None], app: Three) -> None:
        assert "◂ two ▸" in app.query_one(Choice).render_line(0).text
        await pilot.click(Choice, offset=(17, 0))
        await pilot.click(Choice, offset=(17, 0))
        assert app.heard == ["one", "three"]
        await pilot.click(Choice, offset=(16 + len("◂ three "), 0))
        assert app.heard[2:] == ["one"]
        app.query_one(Choice).note = "default two"
        assert app.query_one(Choice).render_line(0).text == "Of three        ◂ one ▸  defa…", (
            "a note that is cut says so"
        )

    async def run() -> None:
        app = Three()
        async with app.run_test(size=(30, 3)) as pilot:
            await pilot.pause()
            await story(pilot, app)

    asyncio.run(run())


def test_a_choice_needs_options() -> None:
    with pytest.raises(ValueError, match="wanted at least one"):
        Choice("Method", (), "")


def keys_below(app: App[None]) -> list[str]:
    return [key.binding.description for key in app.screen.active_bindings.values() if key.binding.show]


def test_text_is_taken_on_enter_and_on_leaving_only() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        field = app.query_one(TextField)
        field.line.focus()
        await pilot.press("enter", "x")
        assert app.heard == []
        await pilot.press("enter")
        assert app.heard == [("text", "embeddedx")]
        await pilot.press("f2", "y", "tab")
        await pilot.pause()
        assert app.heard[1:] == [("text", "embeddedxy")]
        field.value = "[red]set[/red]"
        await pilot.pause()
        assert field.line.value == "[red]set[/red]"
        assert len(app.heard) == 2

    play(story)


def test_a_line_that_is_passed_leaves_every_key_to_others() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        keys = ("f", "q", "5", "left", "home", "end", "delete", "backspace", "ctrl+u", "ctrl+k", "ctrl+w", "escape")
        for key in keys:
            app.bind(key, f"note('{key}')", description=f"key {key}")
        app.query_one(Choice).focus()
        await pilot.press("tab")
        assert app.focused is app.query_one(TextField).line
        assert "key f" in keys_below(app)
        assert "Edit" in keys_below(app)
        assert "Accept" not in keys_below(app)
        await pilot.press(*keys)
        assert app.pressed == list(keys)
        assert app.query_one(TextField).line.value == "embedded"
        await pilot.press("enter")
        assert keys_below(app)[:2] == ["Accept", "Cancel"], "the editing keys"
        assert not {"key f", "key q", "key escape", "Edit"} & set(keys_below(app))
        await pilot.press(*"fq5", "left", "delete", "home", "backspace")
        assert app.pressed == list(keys)
        assert app.query_one(TextField).line.value == "embeddedfq"

    play(story)


def test_escape_brings_the_text_of_before_back() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        line = app.query_one(TextField).line
        line.focus()
        await pilot.press("enter", *"xyz", "escape")
        assert (line.value, line.editing, line.has_focus) == ("embedded", False, True)
        await pilot.press("x", "tab")
        await pilot.pause()
        assert line.value == "embedded"
        assert app.heard == []

    play(story)


def test_the_mouse_edits_the_text_and_only_focuses_on_the_label() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        field = app.query_one(TextField)
        await pilot.click(TextField, offset=(2, 0))
        assert field.line.has_focus
        assert not field.line.editing
        await pilot.click(TextField, offset=(16 + len("embed"), 0))
        await pilot.press("X", "enter")
        assert app.heard == [("text", "embedXded")]

    play(story)


def test_what_is_pasted_into_a_passed_line_replaces_it_and_escape_undoes_that() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        line = app.query_one(TextField).line
        line.focus()
        await pilot.pause()
        for _ in range(2):
            app.post_message(events.Paste("/a/model"))
            await pilot.pause()
            await pilot.pause()
            assert (line.value, line.editing) == ("/a/model", True)
            await pilot.press("escape")
            assert line.value == "embedded"
        await pilot.press("enter")
        app.post_message(events.Paste("/a"))
        await pilot.pause()
        await pilot.press("enter")
        assert app.heard == [("text", "embedded/a")]

    play(story)


def test_another_window_of_the_desktop_does_not_end_the_editing() -> None:
    async def story(pilot: Pilot[None], app: Host) -> None:
        line = app.query_one(TextField).line
        line.focus()
        await pilot.press("enter", "x")
        app.post_message(events.AppBlur())
        await pilot.pause()
        assert app.heard == []
        app.post_message(events.AppFocus())
        await pilot.pause()
        await pilot.press("y", "enter")
        assert app.heard == [("text", "embeddedxy")]

    play(story)


def test_a_burst_of_keys_is_edited_in_its_order() -> None:
    """As a slow line delivers them: all in one read."""

    async def story(pilot: Pilot[None], app: Host) -> None:
        app.bind("r", "note('r')")
        app.query_one(TextField).line.focus()
        await pilot.pause()
        for key in ("r", "enter", "a", "r", "enter", "r", "enter", "z", "escape", "r"):
            app.post_message(events.Key(key, key if len(key) == 1 else None))
        await pilot.pause()
        await pilot.pause()
        assert app.heard == [("text", "embeddedar")]
        assert app.pressed == ["r", "r", "r"]

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
