"""Every change of a recipe can be taken back and made again; enter edits, escape leaves, and a named key works."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from textual import events
from textual.pilot import Pilot

from studio.core.recipe import FIELDS, Recipe
from studio.runs.recipe_file import dump_recipe
from studio.tui.app import StudioApp
from studio.tui.changes import Change, Changes
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.open import OpenScreen
from tests.tui.stories import (
    BOTH,
    HOSTILE,
    WIDE,
    Asked,
    assert_harmless,
    forecaster_on,
    play,
    services_that,
    settle,
    shown,
    until,
)
from tests.tui.stories import card_of as card
from widgets.choice import Choice
from widgets.slider import Slider
from widgets.text_field import TextField, TextLine

LARGE = Recipe(name="try").with_("train.seq_len", 32768).with_("train.micro_batch", 12)


def screen_of(app: StudioApp) -> ConfigureScreen:
    assert isinstance(app.screen, ConfigureScreen)
    return app.screen


def field_of(app: StudioApp, path: str) -> Slider | Choice | TextField:
    field = app.screen.query_one("#" + path.replace(".", "--"))
    assert isinstance(field, (Slider, Choice, TextField))
    return field


async def go_to(pilot: Pilot[None], app: StudioApp, path: str) -> None:
    screen_of(app)._form.focus_field(path)
    await pilot.pause()


def said(app: StudioApp) -> str:
    """What is on the screen, with its lines put together."""
    return " ".join(shown(app).split())


def notices(app: StudioApp) -> list[str]:
    """The notices that are on the screen."""
    return [notice.message for notice in app._notifications]


@pytest.mark.slow
@BOTH
def test_every_kind_of_change_is_undone_and_redone_in_turn(tmp_path: Path, size: tuple[int, int]) -> None:
    other = tmp_path / "other.toml"
    other.write_text(dump_recipe(replace(LARGE, name="other").with_("adapter.rank", 8)))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        stood = [screen.recipe]

        async def after(*keys: str) -> None:
            await pilot.press(*keys)
            await settle(pilot)
            assert screen.recipe != stood[-1], keys
            stood.append(screen.recipe)

        await until(pilot, lambda: "f Fit" in shown(app))
        assert "u Undo" not in shown(app)
        await after("right")
        await after("4", "8", "enter")
        await after("m")
        await go_to(pilot, app, "adapter.targets")
        await after("enter", "ctrl+u", *"q_proj", "enter")
        await go_to(pilot, app, "adapter.dora")
        await after("space")
        await after("f")
        await pilot.press("O")
        await settle(pilot)
        assert isinstance(app.screen, OpenScreen)
        await pilot.press(*str(other), "enter")
        await settle(pilot)
        stood.append(screen.recipe)
        assert screen.recipe.name == "other"
        assert screen._source is not None

        for before in reversed(stood[:-1]):
            assert "u Undo" in shown(app)
            await pilot.press("u")
            await settle(pilot)
            assert screen.recipe == before
            for path in FIELDS:
                field, value = field_of(app, path), before.get(path)
                assert field.value == (float(value) if isinstance(field, Slider) else FIELDS[path].kind.written(value))
        assert screen._source is None, "it comes from that file no more"
        assert "u Undo" not in shown(app)
        await pilot.press("u")
        assert screen.recipe == stood[0]
        for then in stood[1:]:
            assert "^r Redo" in shown(app)
            await pilot.press("ctrl+r")
            await settle(pilot)
            assert screen.recipe == then
        assert screen._source is not None
        assert "^r Redo" not in shown(app)

    play(story, tmp_path, size=size, recipe=LARGE)


@BOTH
def test_a_line_says_what_was_undone(tmp_path: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("right", "m")
        await pilot.press("u")
        await settle(pilot)
        assert notices(app) == ["Undone: Method LoRA 16-bit -> QLoRA 4-bit."]
        assert "Undone: Method" in shown(app)
        await pilot.press("u")
        await settle(pilot)
        assert notices(app) == ["Undone: Rank 32 -> 16."], "the newer line takes the place of the older"
        assert "Undone: Rank" in shown(app)
        await pilot.press("ctrl+r")
        await settle(pilot)
        assert notices(app) == ["Redone: Rank 16 -> 32."]

    play(story, tmp_path, size=size)


@pytest.mark.slow
def test_steps_on_one_field_are_one_change_and_another_field_begins_a_new_one(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        first = screen.recipe
        await pilot.press("right", "right", "left", "right")
        await pilot.press("down", "right", "right", "up")
        await pilot.press("right")
        await pilot.press("u")
        assert (screen.recipe.adapter.rank, screen.recipe.adapter.alpha) == (64, 128)
        await pilot.press("right", "u")
        assert screen.recipe.adapter.rank == 64, "a step after an undo belongs to no older run"
        await pilot.press("u")
        assert (screen.recipe.adapter.rank, screen.recipe.adapter.alpha) == (64, 32)
        await pilot.press("u")
        assert screen.recipe == first
        await settle(pilot)
        assert "u Undo" not in shown(app)
        assert "^r Redo" in shown(app)
        await pilot.press("right", "left")
        await until(pilot, lambda: "^r Redo" not in shown(app))  # a change after an undo ends what could be redone
        assert "u Undo" not in shown(app), "there and back is no change"

    play(story, tmp_path)


def test_keys_of_one_burst_undo_what_came_before_them(tmp_path: Path) -> None:
    """As a slow line delivers them: all in one read."""

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        await pilot.press("down", "right", "up")
        await settle(pilot)
        for keys, rank in ((("right", "u"), 16), (("right", "ctrl+r", "right"), 64), (("4", "8", "enter", "u"), 64)):
            for key in keys:
                app.post_message(events.Key(key, key if len(key) == 1 else None))
            await settle(pilot)
            assert screen.recipe.adapter.rank == rank, keys
            assert field_of(app, "adapter.rank").value == rank, "and the form shows it"
        assert screen.recipe.adapter.alpha == 64, "what came before them stays"

    play(story, tmp_path)


def test_the_history_is_bounded_and_a_run_of_steps_is_kept_in_one() -> None:
    changes, recipe = Changes(), Recipe()
    for seed in range(1, 501):
        changes.note(Change(recipe, recipe := recipe.with_("train.seed", seed)))
    undone = []
    while (change := changes.undo()) is not None:
        undone.append(change.after.train.seed)
    assert undone == list(range(499, 299, -1))
    assert Change(recipe, recipe.with_("adapter.targets", ()).with_("method", "lora")).words == (
        "Method QLoRA 4-bit -> LoRA 16-bit, Targets all-linear -> nothing"
    )
    assert Change(Recipe(), recipe.with_("name", "x" * 300)).words.count("x") < 40
    many = Change(Recipe(), LARGE.with_("adapter.rank", 1).with_("train.seed", 1).with_("method", "lora"))
    assert many.words.endswith(" and 3 more"), many.words


@pytest.mark.parametrize(
    ("path", "turn"),
    [
        ("adapter.rank", "right"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("method", "right"), ("train.optimizer", "left"), ("name", "x"))
        ),
    ],
)
def test_enter_edits_and_escape_leaves_it_as_it_was(tmp_path: Path, path: str, turn: str) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen, first = screen_of(app), screen_of(app).recipe
        await go_to(pilot, app, path)
        await settle(pilot)
        assert "⏎ Edit" in shown(app)
        await pilot.press("enter")
        await settle(pilot)
        assert screen.recipe == first, "to begin changes nothing"
        assert "⏎ Accept" in shown(app)
        assert "esc Cancel" in shown(app)
        await pilot.press(turn, turn, "escape")
        await settle(pilot)
        assert screen.recipe == first
        assert "⏎ Edit" in shown(app)
        await until(pilot, lambda: "u Undo" not in shown(app))  # there is nothing to undo
        await pilot.press("enter", turn, "enter")
        await settle(pilot)
        changed = screen.recipe
        assert changed != first
        await pilot.press("escape", "enter", "escape", "down", "up")
        await settle(pilot)
        assert screen.recipe == changed, "what was accepted stays"
        await pilot.press("u")
        assert screen.recipe == first

    play(story, tmp_path)


@pytest.mark.slow
def test_a_field_that_is_passed_by_keys_or_wheel_stays_as_it_is(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen, first = screen_of(app), screen_of(app).recipe
        await pilot.press(*["down"] * 45, *["up"] * 45)
        for path in ("adapter.rank", "train.learning_rate"):
            await go_to(pilot, app, path)
            for turn in (events.MouseScrollDown, events.MouseScrollUp):
                await pilot._post_mouse_events([turn], field_of(app, path), offset=(25, 0))
            await pilot.pause()
        assert screen.recipe == first

    play(story, tmp_path)


NAMED = re.compile(
    r"(?<![\w'])([a-zA-Z]) (?:makes it fit|comes close|plans for|changes it|shows the rows|says why|goes here)"
)


@BOTH
@pytest.mark.parametrize("path", ["name", "adapter.rank"])
def test_no_key_is_named_while_it_would_be_typed(tmp_path: Path, size: tuple[int, int], path: str) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        await until(pilot, lambda: "f Fit" in shown(app))
        if size == WIDE:
            await until(pilot, lambda: "f makes it fit" in shown(app))
        await go_to(pilot, app, "method")
        await go_to(pilot, app, path)
        before = set(NAMED.findall(said(app)))
        assert before == ({"f", "g", "d", "x"} if size == WIDE else {"d"})
        await pilot.press("enter")
        await settle(pilot)
        assert not NAMED.findall(said(app)), said(app)
        assert "u Undo" not in shown(app)
        assert "f Fit" not in shown(app)
        await pilot.press("f", "ctrl+r", "u", "d")
        await settle(pilot)
        assert app.screen is screen
        assert screen.recipe == LARGE, "the letters are typed, or go nowhere"
        await pilot.press("escape")
        await settle(pilot)
        assert set(NAMED.findall(said(app))) == before
        assert screen.recipe == LARGE

    play(story, tmp_path, size=size, recipe=LARGE)


@pytest.mark.slow
@BOTH
def test_undo_and_redo_work_wherever_the_focus_is(tmp_path: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        await pilot.press("right")
        for path in ("adapter.rank", "method", "name", "train.seed", "adapter.dora"):
            await go_to(pilot, app, path)
            await pilot.press("u")
            assert screen.recipe.adapter.rank == 16, path
            await pilot.press("ctrl+r")
            assert screen.recipe.adapter.rank == 32, path
        await pilot.press("v", "u")
        assert screen.recipe.adapter.rank == 16, "in the view of the memory"
        app.set_focus(None)
        await pilot.press("ctrl+r")
        assert screen.recipe.adapter.rank == 32, "without any focus"

    play(story, tmp_path, size=size, recipe=LARGE, services=services_that(Asked(), forecaster=forecaster_on(card())))


def test_values_of_strangers_are_said_harmlessly(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await go_to(pilot, app, "name")
        await pilot.press("enter", "ctrl+u", *"mine", "enter", "u")
        await settle(pilot)
        assert "Undone: Name mine ->" in said(app)
        assert_harmless(app)
        assert isinstance(app.focused, TextLine)

    play(story, tmp_path, recipe=Recipe(name=HOSTILE))
