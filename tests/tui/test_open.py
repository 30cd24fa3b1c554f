"""Opening a recipe: files, runs and shipped recipes in one list, with what is in the one under the cursor."""

import os
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList, Static

from studio.core.events import Evaluated, Finished, Started
from studio.core.recipe import Recipe
from studio.runs.found_recipes import found_recipes
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe
from studio.tui.app import StudioApp
from studio.tui.readable import age
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.open import OpenScreen
from studio.tui.screens.run import RunScreen
from tests.fakes.runs import LiveWorker, make_run, write_log
from tests.tui.stories import BOTH, HOSTILE, WIDE, assert_harmless, play, settle, shown, train, until


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of many kinds, and two runs, of which one is a merge."""
    here = tmp_path / "here"
    (here / "recipes").mkdir(parents=True)
    monkeypatch.chdir(here)
    (here / "mine.toml").write_text("# For my shell.\n" + dump_recipe(Recipe(name="mine").with_("adapter.rank", 64)))
    (here / "recipes" / "older.toml").write_text('name = "older"\n[train]\nepochs = 3\n')
    (here / "wrong.toml").write_text("[adapter]\nrang = 3\n")
    (here / "pyproject.toml").write_text('[project]\nname = "mine"\n')
    (here / "broken.toml").write_text("[train\n")
    for number, name in enumerate(("recipes/older.toml", "wrong.toml", "mine.toml")):
        os.utime(here / name, (5000.0 + number, 5000.0 + number))
    return here


def trained(root: Path) -> RunPaths:
    paths = make_run(root, "taught", Recipe(name="taught").with_("adapter.rank", 48))
    with LiveWorker(paths) as worker:
        train(worker, range(1, 61))
        worker.emit(Evaluated, step=60, loss=1.24, loss_tokens=100, rows=10, seconds=1.0)
        worker.emit(Finished, outcome="done")
    write_log(make_run(root, "merged"), Started(at=9000.0, job="merge"))
    return paths


def told(app: StudioApp) -> str:
    """What stands beside the list, however its lines are broken."""
    return str(app.screen.query_one("#preview", Static).content)


def recipe_of(app: StudioApp) -> Recipe:
    assert isinstance(app.screen, ConfigureScreen)
    return app.screen.recipe


def test_files_and_trainings_come_by_time_and_the_shipped_behind_them(place: Path, tmp_path: Path) -> None:
    run = trained(tmp_path)
    found = found_recipes(tmp_path / "runs", (place, place / "recipes", place / "none"))
    assert [(each.kind, each.name) for each in found[:5]] == [
        ("run", run.name),
        ("file", "mine.toml"),
        ("file", "wrong.toml"),
        ("file", "older.toml"),
        ("shipped", "demo"),
    ], "no merge, and no file that is no recipe"
    assert [age(seconds) for seconds in (-5, 59, 60, 7300, 90_000, 200_000)] == [
        "just now", "just now", "1 min ago", "2 h ago", "25 h ago", "2 days ago"
    ]  # fmt: skip


@BOTH
def test_a_recipe_is_found_looked_into_and_opened(place: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    run = trained(tmp_path)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("O")
        await until(pilot, lambda: run.name in shown(app) and "mine.toml" in shown(app))
        assert "60 of 100 steps, loss 1.149, held-out 1.240" in told(app), "the newest is under the cursor, and told of"
        assert "SHIPPED WITH THE PROGRAM" in shown(app)
        await pilot.press("down")
        await settle(pilot)
        assert "Rank 16 -> 64" in shown(app)
        assert "For my shell." in told(app)
        await pilot.press(*"wro", "enter")
        await settle(pilot)
        assert "It cannot be opened" in told(app)
        assert "perhaps adapter.rank" in told(app)
        assert isinstance(app.screen, OpenScreen)
        await pilot.press("ctrl+u", *"no.toml", "enter")
        await settle(pilot)
        assert "there is no recipe file no.toml" in told(app)
        assert_harmless(app)
        await pilot.press("escape")
        await settle(pilot)
        assert recipe_of(app) == Recipe(name="try"), "escape changes nothing"
        await pilot.press("O")
        await until(pilot, lambda: run.name in shown(app))
        await pilot.press(*"fin", "enter")
        await settle(pilot)
        assert recipe_of(app).adapter.rank == 48, "the recipe of a run, found by how it stands"
        await pilot.press("u")
        assert recipe_of(app).adapter.rank == 16
        await pilot.press("O")
        await until(pilot, lambda: run.name in shown(app) and "show the run" in shown(app))
        await pilot.press("ctrl+o")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))

    play(story, tmp_path, size=size)


def test_another_tools_configuration_is_imported(place: Path, tmp_path: Path) -> None:
    (place / "theirs.yml").write_text(
        "base_model: owner/model\nadapter: lora\nlora_r: 48\nlora_alpha: 96\nneftune_noise_alpha: 5\n"
    )
    (place / "package.json").write_text('{"name": "mine", "base_model_name_or_path": "x"}')
    (place / "app.py").write_text("print('no training')\n")
    assert "theirs.yml" in [each.name for each in found_recipes(tmp_path / "runs", (place,)) if each.kind == "import"]
    assert not {"package.json", "app.py"} & {each.name for each in found_recipes(tmp_path / "runs", (place,))}

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("O")
        await until(pilot, lambda: "theirs.yml" in shown(app))
        await pilot.press(*"import")
        await until(pilot, lambda: "Imported from axolotl" in told(app))
        assert "not carried: neftune_noise_alpha = 5" in told(app)
        assert "it names no data: embedded stays" in told(app)
        assert "Rank 16 -> 48" in told(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ConfigureScreen))
        assert (recipe_of(app).method, recipe_of(app).adapter.rank) == ("lora", 48)
        assert (recipe_of(app).model.base, recipe_of(app).data.path) == ("owner/model", "embedded")
        assert "1 setting was not carried over" in shown(app)
        await pilot.press("u")
        assert recipe_of(app).adapter.rank == 16, "opening can be undone"

    play(story, tmp_path, size=WIDE)


@pytest.mark.slow
def test_a_path_is_typed_and_the_mouse_looks_before_it_opens(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "o"
    other.mkdir()
    (other / "far.toml").write_text('name = "far"\n[adapter]\nrank = 24\n')
    (other / "near.toml").write_text(f'name = "{HOSTILE.encode("unicode_escape").decode()}"\n')

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("O")
        await until(pilot, lambda: "mine.toml" in shown(app))
        await pilot.press(*"../o/")
        await until(pilot, lambda: "far.toml" in shown(app) and "near.toml" in shown(app))
        await pilot.press("down")
        await settle(pilot)
        assert_harmless(app)
        await pilot.press("f")
        await until(pilot, lambda: "near.toml" not in shown(app) and "Rank 16 -> 24" in shown(app))
        await pilot.press("ctrl+u")
        await until(pilot, lambda: "mine.toml" in shown(app))
        offers = app.screen.query_one("#offers", OptionList)
        for row in (2, 1):  # another, then the first
            await pilot.click("#offers", offset=(2, row))
            await settle(pilot)
            assert offers.highlighted == row
            assert isinstance(app.screen, OpenScreen), "one click only looks"
        await pilot.click("#offers", offset=(2, 1))
        await settle(pilot)
        assert recipe_of(app).adapter.rank == 64

    play(story, tmp_path, size=WIDE)
