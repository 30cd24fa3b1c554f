"""The Data screen: rows token by token, what they add up to, ways through them, and a process that ends with it."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from studio.core.errors import StudioError
from studio.core.events import Finished
from studio.core.recipe import Recipe
from studio.runs.show import Opened, ShowEvent, ShowProcess, ShowRequest, Summary
from studio.runs.worker import Worker
from studio.tui.app import StudioApp
from studio.tui.panels.data_note import DataNote
from studio.tui.screens.data import DataScreen
from studio.tui.services import Services
from tests.fakes.runs import CHECKOUT
from tests.fakes.tiny_model import make_tiny_model
from tests.pictures.drawn import rows_of
from tests.pictures.findings import EMPTY, empty_share
from tests.tui.stories import (
    BOTH,
    HOSTILE,
    NARROW,
    SELDOM,
    WIDE,
    Asked,
    assert_harmless,
    given,
    make_run,
    play,
    services_that,
    shown,
    train,
)
from widgets.token_view import TokenView


class Processes:
    """Starts the real process, and knows what was started."""

    def __init__(self) -> None:
        self.started: list[ShowProcess] = []

    def show(self, request: ShowRequest) -> ShowProcess:
        self.started.append(ShowProcess(request))
        return self.started[-1]

    def glance(self, recipe: Recipe) -> ShowProcess:
        return self.show(ShowRequest(recipe))

    def services(self) -> Services:
        return given(services_that(Asked()), show_data=self.show)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("show") / "tiny")


@pytest.fixture
def recipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))

    def talk(asked: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}

    rows = [talk(f"what is {number} in words", f"it is {number}") for number in range(1, 21)]
    rows += [talk("tell a long story", "and then " * 60), talk(HOSTILE, HOSTILE)]
    rows += [{"messages": [{"role": "user", "content": "nobody"}]}, rows[4]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Recipe(name="try")
    for path, value in {
        "data.path": str(file),
        "model.base": str(model),
        "train.seq_len": 256,
        "eval.rows": 4,
    }.items():
        made = made.with_(path, value)
    return made


async def until(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    """Wait until something is true; not for the thread that listens to the process, which ends with the screen."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, shown(pilot.app)  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        await pilot.pause()


@pytest.mark.slow
@BOTH
def test_a_walk_through_the_rows(recipe: Recipe, tmp_path: Path, size: tuple[int, int]) -> None:
    processes = Processes()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("d")
        await until(pilot, lambda: isinstance(app.screen, DataScreen) and "▸it is 1<|im_end|>◂⏎" in shown(app))
        text = shown(app)
        assert "rows.jsonl" in text
        assert "row 1  1 of 23" in " ".join(text.split("   "))
        assert "<|im_start|>user⏎" in text
        await until(pilot, lambda: "row 2  2 of 23   " in shown(app))  # the rows that follow, where there is room
        if size == WIDE:
            await until(pilot, lambda: empty_share(rows_of(app.screen._compositor.render_strips()), size[0]) <= EMPTY)
        await pilot.press("n")
        await until(pilot, lambda: "▸it is 1<|im_end|>◂⏎" not in shown(app) and "row 3  3 of 23   " in shown(app))
        await pilot.press("left")
        await until(pilot, lambda: "▸it is 1<|im_end|>◂⏎" in shown(app))
        await pilot.press("t")
        await until(pilot, lambda: "▸i│t│ │i│s│ │1│<|im_end|>◂" in shown(app))
        await pilot.press("t", "g", *"21", "enter")
        await until(pilot, lambda: "cut at 256 tokens" in app.screen.query_one(TokenView).text)
        assert "row 21" in shown(app)
        await pilot.press("slash", *"IS 17 IN", "enter")
        await until(pilot, lambda: "▸it is 17<|im_end|>◂⏎" in shown(app))
        await pilot.press("n")
        await until(pilot, lambda: "No later row that says 'IS 17 IN'" in " ".join(shown(app).split()))
        await pilot.press("slash", *["backspace"] * 8, "enter")
        await pilot.press("f")
        await until(pilot, lambda: "only cut rows" in shown(app) and "row 21" in shown(app))
        await pilot.press("f", "f")
        await until(pilot, lambda: "only held out rows" in shown(app) and "held out  " in shown(app))
        await pilot.press("f")
        await until(pilot, lambda: "says what row 5 says" in shown(app))
        await pilot.press("g", *"99", "enter")
        await until(pilot, lambda: "There is no row 99: the file has rows 1 to 24." in shown(app))
        await pilot.press("g", *"23", "enter")
        await until(pilot, lambda: "Row 23 is left out: found user; no assistant turn" in shown(app))
        await pilot.press("2")
        await until(pilot, lambda: "Tokens per example" in shown(app) and "an epoch" in shown(app))
        assert "█" in shown(app)
        await pilot.press("tab")
        await until(pilot, lambda: "Row by row" in shown(app) and "no assistant turn" in shown(app))
        await pilot.press("4")
        await until(pilot, lambda: "the same" in shown(app))
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, DataScreen))
        await until(pilot, lambda: processes.started[0]._process.poll() is not None)

    play(story, tmp_path, size=size, recipe=recipe, services=processes.services())


def test_hostile_rows_are_shown_harmlessly(recipe: Recipe, tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("d")
        await until(pilot, lambda: "row 1 " in shown(app))
        await pilot.press("g", *"22", "enter")
        await until(pilot, lambda: r"\x1b[31mred\x1b[2J\x1b]0;title\x07\x9b1;1H\u202e[bold red]" in "".join(text(app)))
        assert "[@click=app.quit]quit[/]" in "".join(text(app))
        assert_harmless(app)
        await pilot.press("slash", *"red\x1b", "enter")
        await until(pilot, lambda: "row 22" in shown(app))
        assert_harmless(app)

    play(story, tmp_path, size=NARROW, recipe=recipe, services=Processes().services())


def one_line(app: StudioApp) -> str:
    return " ".join(shown(app).split())


def text(app: StudioApp) -> list[str]:
    return app.screen.query_one(TokenView).text.split("\n")


def test_a_process_that_dies_is_told_and_started_again(recipe: Recipe, tmp_path: Path) -> None:
    processes = Processes()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("d")
        await until(pilot, lambda: "▸it is 1<|im_end|>◂" in shown(app))
        processes.started[0]._process.kill()
        await until(
            pilot, lambda: "process has ended" in shown(app) and "r looks again" in " ".join(shown(app).split())
        )
        assert "▸it is 1<|im_end|>◂" in shown(app), "what was read stays"
        await pilot.press("r")
        await until(pilot, lambda: len(processes.started) == 2 and "process has ended" not in shown(app))
        await until(pilot, lambda: "n → Next" in shown(app))
        await pilot.press("n")
        await until(pilot, lambda: "▸it is 2<|im_end|>◂" in shown(app))

    play(story, tmp_path, size=WIDE, recipe=recipe, services=processes.services())


def test_a_training_shows_its_own_rows(recipe: Recipe, tmp_path: Path) -> None:
    asked: list[ShowRequest] = []

    def show(request: ShowRequest) -> ShowProcess:
        asked.append(request)
        raise StudioError("not now")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("d")
        await until(pilot, lambda: "not now" in shown(app))
        assert asked == [ShowRequest(recipe, str(paths.root))]
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, DataScreen))

    paths = make_run(tmp_path, "mine", recipe)
    with Worker(paths) as worker:
        train(worker, range(1, 3))
        worker.emit(Finished, outcome="done", step=2)
    services = given(services_that(Asked()), show_data=show)
    play(story, tmp_path, size=WIDE, recipe=recipe, open_run=paths, services=services)


@pytest.mark.slow
def test_data_that_cannot_be_read_says_why(recipe: Recipe, tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("d")
        await until(pilot, lambda: "does not exist" in " ".join(shown(app).split()))
        assert app.screen.query_one(Input).display is False

    missing = recipe.with_("data.path", str(tmp_path / "none.jsonl"))
    play(story, tmp_path, size=NARROW, recipe=missing, services=Processes().services())


@pytest.mark.slow
def test_the_worst_of_the_data_stands_below_the_form(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.tui.panels.data_note._LOOK_AFTER_SECONDS", SELDOM)
    processes = Processes()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        assert "d shows the rows" in shown(app)
        note = app.screen.query_one(DataNote)
        note._look_now()
        await until(pilot, lambda: "1 cut at 256" in shown(app))
        assert "1 left out (4%)" in shown(app)
        assert "1 repeat" in shown(app)
        note.follow(recipe.with_("train.seq_len", 32))
        await until(pilot, lambda: "23 cut at 32" in shown(app))
        assert len(processes.started) == 1, "the rows were not read again"
        note.follow(recipe.with_("eval.rows", 0).with_("eval.samples", 0))
        note._look_now()
        await until(pilot, lambda: len(processes.started) == 2 and "1 cut at 256" in shown(app))
        assert processes.started[0]._process.poll() is not None

    services = given(processes.services(), glance_at_data=processes.glance)
    play(story, tmp_path, size=NARROW, recipe=recipe, services=services)
    assert processes.started[1]._process.wait(10) is not None, "it ends with the screen"


def test_before_the_rows_were_looked_at_the_panel_tells_what_the_file_begins_with(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.tui.panels.data_note._LOOK_AFTER_SECONDS", SELDOM)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: "Tokens of the first rows" in shown(app))
        note = app.screen.query_one(DataNote)
        facts = " ".join(str(note.content).split())
        assert f"rows about {len(Path(recipe.data.path).read_text().splitlines())} " in facts
        assert "cut at 256 tokens" in facts and "by the characters" in facts
        bars = [int(line.split()[-1]) for line in str(note.content).splitlines() if "█" in line]
        assert sum(bars) > 10
        note.follow(recipe.with_("data.path", str(tmp_path / "none.jsonl")))
        await until(pilot, lambda: "Tokens of the first rows" not in shown(app))

    play(story, tmp_path, size=WIDE, recipe=recipe, services=given(Processes().services()))


class Told:
    """A process that tells some events and then nothing."""

    def __init__(self, *told: ShowEvent) -> None:
        self.told, self.closed = [*told], False

    def next_event(self, seconds: float) -> ShowEvent | None:
        if self.told:
            return self.told.pop(0)
        time.sleep(0.02)
        return None

    def close(self) -> None:
        self.closed = True


def test_a_second_look_is_not_ended_with_the_first(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one's process is kept for a while after its last row; the second one may need longer."""
    monkeypatch.setattr("studio.tui.panels.data_note._LOOK_AFTER_SECONDS", SELDOM)
    monkeypatch.setattr("studio.tui.panels.data_note._KEEP_SECONDS", 0.5)
    first = Told(Opened(rows=2), Summary(done=2, rows=2, seq_len=9, steps=1))
    second = Told(Opened(rows=9), Summary(done=2, rows=9, seq_len=9, steps=1))
    looks = [first, second]

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        note = app.screen.query_one(DataNote)
        note._look_now()
        await until(pilot, lambda: "1 step an epoch" in shown(app))
        note.follow(recipe.with_("eval.rows", 0).with_("eval.samples", 0))
        note._look_now()
        await until(pilot, lambda: "of 2 rows so far" in shown(app))
        assert first.closed
        await asyncio.sleep(0.8)
        assert not second.closed

    services = given(services_that(Asked()), glance_at_data=lambda recipe: looks.pop(0))
    play(story, tmp_path, size=NARROW, recipe=recipe, services=services)
    assert second.closed
