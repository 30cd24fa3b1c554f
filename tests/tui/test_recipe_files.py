"""Saving and opening recipes from the configure screen."""

from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.runs.recipe_file import load_recipe
from studio.tui.app import StudioApp
from studio.tui.recipe_files import open_recipe, save_recipe, target_of
from studio.tui.screens.ask_line import AskLine
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.confirm import Confirm
from tests.tui.stories import HOSTILE, assert_harmless, play, settle, shown, until


def recipe_of(app: StudioApp) -> Recipe:
    assert isinstance(app.screen, ConfigureScreen)
    return app.screen.recipe


def test_save_again_and_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("right", "s")
        await settle(pilot)
        assert isinstance(app.screen, AskLine)
        await pilot.press("enter")
        await until(pilot, lambda: "Saved as try.toml" in shown(app))
        assert load_recipe(tmp_path / "try.toml").adapter.rank == 32
        await pilot.press("right", "s", "enter")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        assert load_recipe(tmp_path / "try.toml").adapter.rank == 32, "not before a yes"
        await pilot.press("y")
        await until(pilot, lambda: load_recipe(tmp_path / "try.toml").adapter.rank == 64)
        await pilot.press("home")
        assert recipe_of(app).adapter.rank == 1
        await pilot.press("O", *"try.toml", "enter")
        await settle(pilot)
        assert recipe_of(app).adapter.rank == 64
        assert "64" in shown(app)
        await pilot.press("u")
        await settle(pilot)
        assert recipe_of(app).adapter.rank == 1, "what was there before comes back"

    play(story, tmp_path)


def test_what_cannot_be_opened_is_said_and_escape_changes_nothing(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("O")
        await settle(pilot)
        assert "shipped recipe: " in shown(app)
        await pilot.press(*"nothing.toml", "enter")
        await settle(pilot)
        assert "there is no recipe file nothing.toml" in shown(app)
        assert_harmless(app)
        await pilot.press("escape")
        await settle(pilot)
        assert recipe_of(app) == Recipe(name="try")

    play(story, tmp_path)


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("s")
        await settle(pilot)
        assert_harmless(app)

    play(story, tmp_path, recipe=Recipe(name=HOSTILE))


def test_files(tmp_path: Path) -> None:
    assert target_of(" a/b ") == Path("a/b.toml")
    assert target_of("b.toml") == Path("b.toml")
    for word in ("", "  ", "a\0b", str(tmp_path)):
        with pytest.raises(BadInput):
            target_of(word)
    with pytest.raises(BadInput, match="cannot be written"):
        save_recipe(Recipe(), tmp_path / "missing" / "r.toml")
    assert open_recipe("demo").name
