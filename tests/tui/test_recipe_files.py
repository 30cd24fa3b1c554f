"""Saving and opening recipes from the configure screen."""

import asyncio
from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.cli import main
from studio.commands import open_studio
from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.runs.last_recipe import LastRecipe, keep_last_recipe, source_of
from studio.runs.recipe_file import find_recipe, load_recipe
from studio.tui import changes
from studio.tui.app import StudioApp
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.dialogs import AskLine, Confirm
from studio.tui.screens.recipe_dialogs import save_recipe, target_of
from tests.tui.stories import HOSTILE, Asked, assert_harmless, given, play, services_that, settle, shown, until


def recipe_of(app: StudioApp) -> Recipe:
    assert isinstance(app.screen, ConfigureScreen)
    return app.screen.recipe


@pytest.mark.slow
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


def test_what_is_turned_is_kept_after_a_moment_and_when_the_studio_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_KEEP_AFTER_SECONDS", 0.02)
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        assert asked.kept == [], "what is only looked at is not turned"
        await pilot.press("right")
        await until(pilot, lambda: asked.kept)
        assert asked.kept[-1].recipe.adapter.rank == 32
        monkeypatch.setattr(changes, "_KEEP_AFTER_SECONDS", 600.0)
        await pilot.press("right", "m")
        assert len(asked.kept) == 1

    play(story, tmp_path, services=services_that(asked))
    assert len(asked.kept) == 2
    assert (asked.kept[-1].recipe.adapter.rank, asked.kept[-1].recipe.method) == (64, "lora")


def test_the_file_that_a_recipe_is_saved_to_or_opened_from_is_kept_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(changes, "_KEEP_AFTER_SECONDS", 0.02)
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("s", "enter")
        await until(pilot, lambda: asked.kept and asked.kept[-1].source == source_of(tmp_path / "try.toml"))
        await pilot.press("O", *"demo", "enter")
        await until(pilot, lambda: asked.kept[-1].source is None)  # a shipped one changes with the program
        await pilot.press("O", *"try.toml", "enter")
        await until(pilot, lambda: asked.kept[-1].source == source_of(tmp_path / "try.toml"))

    play(story, tmp_path, services=services_that(asked))


def test_a_recipe_that_cannot_be_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "_KEEP_AFTER_SECONDS", 0.02)

    def refuse(last: LastRecipe) -> None:
        raise OSError(28, "No space left on device")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("right")
        await until(pilot, lambda: "not kept for the next" in shown(app))

    play(story, tmp_path, services=given(services_that(Asked()), keep_recipe=refuse))


def test_the_studio_opens_on_the_recipe_turned_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Recipe, str]] = []
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(open_studio, "why_no_studio", lambda: "")
    monkeypatch.setattr("studio.tui.app.run_studio", lambda recipe, *, note, **_: opened.append((recipe, note)) or 0)
    file = tmp_path / "mine.toml"
    save_recipe(Recipe(name="mine"), file)

    def start(*words: str) -> tuple[Recipe, str]:
        assert main(words) == 0
        return opened[-1]

    assert start() == (load_recipe(find_recipe("demo")), "")
    turned = Recipe(name="turned").with_("adapter.rank", 48)
    keep_last_recipe(LastRecipe(turned, source_of(file)))
    assert start() == (turned, "")
    assert start("--recipe", str(file)) == (Recipe(name="mine"), ""), "what is asked for wins"
    save_recipe(Recipe(name="edited"), file)
    recipe, note = start()
    assert recipe == turned
    assert "has changed since your last visit" in note
    (tmp_path / "home" / "last_recipe.json").write_text("{")
    recipe, note = start()
    assert recipe == load_recipe(find_recipe("demo"))
    assert "damaged" in note


def test_the_note_on_the_recipe_is_shown(tmp_path: Path) -> None:
    note = f"the file has changed {HOSTILE}"

    async def run() -> None:
        app = StudioApp(Recipe(), runs_root=tmp_path, services=services_that(Asked()), note=note, poll_seconds=3600)
        async with app.run_test(size=(120, 40), notifications=True) as pilot:
            await until(pilot, lambda: "the file has changed" in shown(app))
            assert_harmless(app)

    asyncio.run(run())
