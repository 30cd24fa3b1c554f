"""The row of keys: built anew when a key changes, not when the focus moves."""

import asyncio
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Input
from textual.widgets._footer import FooterKey

from widgets.key_footer import KeyFooter


class _App(App[None]):
    BINDINGS: ClassVar[list[BindingType]] = [Binding("f2", "fit", "Fit"), Binding("f3", "undo", "Undo")]
    can_undo = False

    def compose(self) -> ComposeResult:
        yield Input(id="a")
        yield Input(id="b")
        yield KeyFooter()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.can_undo if action == "undo" else True


def keys_of(app: App[None]) -> list[FooterKey]:
    return list(app.query(FooterKey))


def test_a_move_of_the_focus_keeps_the_keys_that_are_there() -> None:
    async def run() -> None:
        app = _App()
        async with app.run_test() as pilot:
            await pilot.pause()
            before = keys_of(app)
            assert [key.description for key in before] == ["Fit"]
            await pilot.press("tab", "tab")
            await pilot.pause()
            assert all(new is old for new, old in zip(keys_of(app), before, strict=True))

    asyncio.run(run())


def test_a_key_that_comes_to_mean_something_is_shown() -> None:
    async def run() -> None:
        app = _App()
        async with app.run_test() as pilot:
            await pilot.pause()
            app.can_undo = True
            app.refresh_bindings()
            await pilot.pause()
            await pilot.pause()
            assert [key.description for key in keys_of(app)] == ["Fit", "Undo"]
            app.can_undo = False
            app.refresh_bindings()
            await pilot.pause()
            await pilot.pause()
            assert [key.description for key in keys_of(app)] == ["Fit"]

    asyncio.run(run())


class _Many(App[None]):
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(f"f{number}", f"fit({number})", f"Number {number}") for number in range(1, 9)),
        Binding("question_mark", "explain", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    def compose(self) -> ComposeResult:
        yield KeyFooter()

    def action_fit(self, number: int) -> None: ...

    def action_explain(self) -> None: ...

    def action_leave(self) -> None: ...


def test_help_and_the_way_back_are_in_sight_at_every_width() -> None:
    def row(app: App[None]) -> str:
        return "".join(segment.text for segment in app.screen._compositor.render_strips()[-1])

    async def run() -> None:
        app = _Many()
        async with app.run_test(size=(60, 10)) as pilot:
            await pilot.pause()
            for width in (60, 200, 40, 80):
                await pilot.resize_terminal(width, 10)
                await pilot.pause()
                await pilot.pause()
                assert row(app).rstrip().endswith("? Help  esc Back"), row(app)
                assert ("Number 8" in row(app)) is (width == 200)
                assert "Number 1" in row(app)

    asyncio.run(run())
