"""The guided set-up by keys alone: enter while looks are under way, bursts of keys, arrows that go round a page."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from textual import events
from textual.content import Content
from textual.pilot import Pilot
from textual.widgets import OptionList

from studio.core.errors import StudioError
from studio.core.recipe import EMBEDDED
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.runs.show import ShowProcess, ShowRequest
from studio.tui.app import StudioApp
from studio.tui.panels.setup_step import SetupStep
from studio.tui.screens.cards import CardScreen
from studio.tui.screens.help import HelpScreen
from studio.tui.screens.setup import SetupScreen
from tests.tui.stories import (
    EIGHT_B,
    NARROW,
    given,
    settle,
    shown,
    until,
)
from tests.tui.test_setup_screen import Told, finding, play_setup, step_of, through
from widgets.text_field import TextLine


def test_enter_goes_on_though_the_look_that_follows_the_cursor_takes_the_place_of_its_own(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model", "data")
        screen = app.screen
        assert isinstance(screen, SetupScreen)
        lit = screen.query_one("#step-data", SetupStep).lit
        screen.on_setup_step_chosen(SetupStep.Chosen("data", lit))
        screen._look("data", screen.answers)  # what its timer does; the look of enter has not begun and never will
        await until(pilot, lambda: step_of(app) == "goal")

    play_setup(story, tmp_path, finding(Told()))


def test_enter_goes_on_though_files_are_found_meanwhile_for_the_next_step(tmp_path: Path) -> None:
    known = threading.Event()

    def shape(base: str, _: str) -> ModelShape:
        assert base == EMBEDDED or known.wait(60)
        return shape_from_config(EIGHT_B)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model")
        app.screen.query_one("#step-model", SetupStep).offer_first("owner/slow")
        await pilot.pause()
        await pilot.press("enter")
        app.screen.query_one("#step-data", SetupStep).offer([("found.jsonl", Content("found.jsonl"))], "found.jsonl")
        await pilot.pause()
        known.set()
        await until(pilot, lambda: step_of(app) == "data")

    play_setup(story, tmp_path, given(finding(Told()), shape=shape))


def test_a_look_from_before_an_earlier_answer_changed_does_not_go_on(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model", "data")
        screen = app.screen
        assert isinstance(screen, SetupScreen)
        screen.on_setup_step_chosen(SetupStep.Chosen("data", screen.answers.data))
        screen._look("data", replace(screen.answers, base="owner/before"))
        await settle(pilot)
        assert (step_of(app), screen.answers.base) == ("data", EMBEDDED)
        await through(pilot, app, "goal")
        assert screen.answers.base == EMBEDDED

    play_setup(story, tmp_path, finding(Told()))


@pytest.mark.parametrize(("steps", "then"), [((), "model"), (("model", "data", "goal"), "recipe")])
def test_enters_in_a_burst_take_one_step(tmp_path: Path, steps: tuple[str, ...], then: str) -> None:
    """The last ones reached a step that had been left; after the goal the studio ended with an error."""

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, *steps)
        for _ in range(3):
            app.post_message(events.Key("enter", None))
        await settle(pilot)
        assert step_of(app) == then

    play_setup(story, tmp_path, finding(Told()))


def test_enters_in_a_burst_open_the_list_of_cards_once(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        for key in ("down", "enter", "enter"):
            app.post_message(events.Key(key, None))
        await until(pilot, lambda: isinstance(app.screen, CardScreen))
        await pilot.press("escape")
        await settle(pilot)
        assert step_of(app) == "machine"

    play_setup(story, tmp_path, finding(Told()))


def test_enter_in_a_burst_opens_the_line_that_the_arrow_before_it_reached(tmp_path: Path) -> None:
    """As a slow line delivers them: all in one read. Enter took the option above instead, and the step was gone."""

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model")
        line = app.screen.query_one("#step-model TextLine", TextLine)
        for key in ("down", "down", "enter"):
            app.post_message(events.Key(key, None))
        await settle(pilot)
        assert (step_of(app), line.has_focus, line.editing) == ("model", True, True)

    play_setup(story, tmp_path, finding(Told()))


@pytest.mark.slow
def test_the_arrows_go_round_the_models_page_and_a_passed_line_types_nothing(tmp_path: Path) -> None:
    """They went into the line and not out of it, and there q, ? and all others were letters."""

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model")
        step = app.screen.query_one("#step-model", SetupStep)
        options, line = step.query_one(OptionList), step.query_one(TextLine)

        async def at(key: str) -> tuple[bool, int | None]:
            await pilot.press(key)
            return line.has_focus, options.highlighted

        assert [await at("down") for _ in range(4)] == [(False, 1), (True, 1), (False, 0), (False, 1)]
        assert [await at("up") for _ in range(3)] == [(False, 0), (True, 0), (False, 1)]
        assert await at("down") == (True, 1)
        assert "? Help" in shown(app)
        await pilot.press(*"abc", "question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpScreen))
        await pilot.press("escape")
        assert line.value == ""
        await pilot.press("enter", *"q?", "escape")
        assert (line.value, step_of(app)) == ("", "model"), "escape leaves the line first"
        await pilot.press("enter", "enter")
        assert options.has_focus, "with nothing typed enter goes back to the list"
        await pilot.press("down", "escape")
        assert step_of(app) == "machine"

    play_setup(story, tmp_path, finding(Told()), size=NARROW)


@pytest.mark.slow
def test_words_that_no_longer_fill_their_place_give_the_keys_back(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model")
        step = app.screen.query_one("#step-model", SetupStep)
        step.tell(Content("word\n" * 50))
        await pilot.pause()
        await pilot.press("tab", "tab")
        assert app.focused is step.query_one("_Words")
        await pilot.press("end", "up", "home", "up")
        assert app.focused is step.query_one(TextLine), "at its end the arrow leaves it"
        await pilot.press("down")
        assert app.focused is step.query_one("_Words")
        step.tell(Content("a word"))
        await pilot.pause()
        await pilot.pause()
        assert step.query_one(OptionList).has_focus

    play_setup(story, tmp_path, finding(Told()), size=NARROW)


def test_the_rows_of_a_file_of_pairs_can_be_seen_before_it_is_taken(tmp_path: Path) -> None:
    """The set-up recommends what learns from pairs, so that its look at the rows must not refuse them."""
    asked: list[ShowRequest] = []

    def show(request: ShowRequest) -> ShowProcess:
        asked.append(request)
        raise StudioError("not now")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model", "data")
        await pilot.press("d")
        await until(pilot, lambda: "not now" in shown(app))
        assert [request.pairs for request in asked] == [True]

    play_setup(story, tmp_path, given(finding(Told()), show_data=show))
