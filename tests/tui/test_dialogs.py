"""What all dialogs share: a box as tall as its words, in the middle, and a way out that answers nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.content import Content
from textual.pilot import Pilot

from studio.core.recipe import Recipe
from studio.tui.app import StudioApp
from studio.tui.screens.ask_audit import AskAudit, base_wishes
from studio.tui.screens.cards import CardScreen
from studio.tui.screens.dialogs import AskLine, Confirm, Dialog
from studio.tui.screens.help import HelpScreen
from studio.tui.screens.open import OpenScreen
from tests.tui.stories import BOTH, play, settle, shown, until

DIALOGS: list[tuple[Callable[[], Dialog[Any]], int]] = [
    (lambda: AskLine("Which?", "x", check=str), 9),
    (lambda: AskAudit("Audit", base_wishes(), {}), 12),
    (lambda: Confirm(Content("Sure?"), "do it"), 8),
    (lambda: CardScreen(""), 90),
    (lambda: OpenScreen(Recipe(), list, lambda recipe, source: None), 90),
    (lambda: HelpScreen([("x", "Stop")], fields=False), 90),
]


@BOTH
@pytest.mark.parametrize(("make", "tallest"), DIALOGS)
def test_a_box_in_the_middle_that_escape_leaves(
    tmp_path: Path, make: Callable[[], Dialog[Any]], tallest: int, size: tuple[int, int]
) -> None:
    answers: list[object] = []

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        app.push_screen(make(), answers.append)
        await settle(pilot)
        (box,) = (child for child in app.screen.children if child.display)
        left, right = box.region.x, app.size.width - box.region.right
        assert abs(left - right) <= 1
        assert left >= 2
        assert box.region.height <= min(tallest, app.size.height)
        await pilot.press("escape")
        await settle(pilot)
        assert answers == [None]

    play(story, tmp_path, size=size)


def test_a_yes_can_be_clicked_and_f1_tells_the_keys(tmp_path: Path) -> None:
    answers: list[object] = []

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        app.push_screen(Confirm(Content("Delete it?"), "delete it"), answers.append)
        await settle(pilot)
        await pilot.press("f1")
        await until(pilot, lambda: isinstance(app.screen, HelpScreen) and "Yes" in shown(app))
        await pilot.press("f1")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        row, line = next((row, line) for row, line in enumerate(shown(app).splitlines()) if " y  delete it" in line)
        await pilot.click(offset=(line.index("delete it"), row))
        await until(pilot, lambda: answers == [True])

    play(story, tmp_path)


@pytest.mark.parametrize(("keys", "answer"), [(("enter", "n"), None), (("enter", "space", "y"), True)])
def test_only_y_is_a_yes(tmp_path: Path, keys: tuple[str, ...], answer: bool | None) -> None:
    answers: list[object] = []

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        app.push_screen(Confirm(Content("Delete it?"), "delete it"), answers.append)
        await settle(pilot)
        for key in keys[:-1]:
            await pilot.press(key)
        await settle(pilot)
        assert answers == [], "enter is pressed from habit, and the box does not offer it"
        await pilot.press(keys[-1])
        await settle(pilot)
        assert answers == [answer]

    play(story, tmp_path)
