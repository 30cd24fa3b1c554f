"""Help: the keys of the screen that it was asked on, and every field of a recipe on the configure screen."""

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.screen import ModalScreen, Screen

from studio.core.events import Started
from studio.core.recipe import FIELDS
from studio.tui import screens
from studio.tui.app import StudioApp
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.help import HelpScreen, help_text
from studio.tui.screens.runs import RunsScreen
from tests.fakes.runs import make_run, write_log
from tests.tui.stories import BOTH, play, settle, shown, until


def test_every_field_is_explained_with_its_limits() -> None:
    told = help_text((("r", "Run"),), fields=True).plain
    assert "r             Run" in told
    for path in FIELDS:
        assert f"{path}" in told
        assert FIELDS[path].help in told
    assert "1 to 1024" in told
    assert "On a slider" not in help_text((), fields=False).plain


def test_every_screen_says_what_it_is_for() -> None:
    for module in pkgutil.iter_modules(screens.__path__, f"{screens.__name__}."):
        importlib.import_module(module.name)
    kinds: list[type[Screen[Any]]] = [Screen]
    silent = set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        own = kind.__module__.startswith("studio.") and not issubclass(kind, ModalScreen)
        silent |= {kind.__name__} if own and not kind.HELP else set()
    assert silent == {"OfferingScreen", "ConfigureScreen"}, "of which one is none, and the other has its fields"
    assert "what is trained, on what and how" in help_text((), fields=True).plain


def test_a_key_with_control_that_the_foot_shows_is_explained_too(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("S")
        await settle(pilot)
        assert "^l Leave the set-up" in shown(app)
        await pilot.press("question_mark")
        await settle(pilot)
        assert "ctrl+l        Leave the set-up" in shown(app)
        assert "ctrl+c" not in shown(app)

    play(story, tmp_path)


@BOTH
def test_help_is_of_the_screen_it_was_asked_on(tmp_path: Path, size: tuple[int, int]) -> None:
    write_log(make_run(tmp_path), Started(at=1.0, job="train"))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("question_mark")
        await settle(pilot)
        assert isinstance(app.screen, HelpScreen)
        assert "LoRA/QLoRA" in shown(app)
        assert "Next field or part of the screen" in shown(app), "Textual's own keys are named as ours are"
        assert "Focus Next" not in shown(app)
        for _ in range(60):  # how far below it stands depends on the width
            if "On a slider" in shown(app):
                break
            await pilot.press("down")
        await until(pilot, lambda: "On a slider" in shown(app))
        await pilot.press("question_mark")
        await settle(pilot)
        assert isinstance(app.screen, ConfigureScreen)
        await pilot.press("o")
        await until(pilot, lambda: "Compare" in shown(app))
        await pilot.press("question_mark")
        await settle(pilot)
        assert isinstance(app.screen, HelpScreen)
        assert "Compare" in shown(app)
        assert "Open" in shown(app), "the list's own key as well"
        assert "On a slider" not in shown(app)
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(app.screen, RunsScreen)

    play(story, tmp_path, size=size)
