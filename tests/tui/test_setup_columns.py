"""A file whose columns nobody knows: the set-up asks which is the prompt and which the answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from studio.tui.app import StudioApp
from studio.tui.screens.columns import ColumnsScreen
from tests.tui.stories import (
    HOSTILE,
    NARROW,
    WIDE,
    Asked,
    assert_harmless,
    make_run,
    services_that,
    shown,
    until,
)
from tests.tui.test_setup_screen import Told, finding, play_setup, step_of, through

ROW = {"Nr": 7, "Frage": "Why?", "Antwort": "Because."}


def lines(path: Path, row: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row | {"Nr": n}) + "\n" for n in range(30)))
    return path


def tables(path: Path, row: dict[str, Any]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist([row | {"Nr": n} for n in range(30)]), path)
    return path


async def choose(pilot: Pilot[None], app: StudioApp, *columns: str) -> None:
    """Take the option that begins with each word, one after the other."""
    for column in columns:
        options = app.screen.query_one(OptionList)
        lines = [str(options.get_option_at_index(place).prompt) for place in range(options.option_count)]
        options.highlighted = next(place for place, line in enumerate(lines) if column in line)
        await pilot.press("enter")
        await pilot.pause()


async def to_the_question(pilot: Pilot[None], app: StudioApp, path: Path) -> None:
    """Come to the dialog with this file."""
    await through(pilot, app, "model", "data")
    app.screen.query_one("#step-data").offer_first(str(path))  # type: ignore[attr-defined]
    await until(pilot, lambda: "Enter asks which of them is the prompt" in " ".join(shown(app).split()))
    await pilot.press("enter")
    await until(pilot, lambda: isinstance(app.screen, ColumnsScreen))


@pytest.mark.parametrize(("size", "write"), [(NARROW, lines), pytest.param(WIDE, tables, marks=pytest.mark.slow)])
def test_the_user_says_which_columns_ask_and_answer(tmp_path: Path, size: tuple[int, int], write: Any) -> None:
    asked, told = Asked(), Told()
    path = write(tmp_path / "rows.jsonl", ROW)
    services = services_that(asked, makes=lambda: make_run(tmp_path, "made"))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await to_the_question(pilot, app, path)
        assert "Which column holds what is asked?" in shown(app)
        assert "Why?" in shown(app)
        await choose(pilot, app, "Frage")
        assert "Which column holds the answer" in shown(app)
        await choose(pilot, app, "Antwort")
        await until(pilot, lambda: step_of(app) == "goal")
        assert told.kept[-1].columns == (("prompt", "Frage"), ("completion", "Antwort"))
        await through(pilot, app, "recipe")
        await until(pilot, lambda: "Start training now" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: bool(asked.started))

    play_setup(story, tmp_path, finding(told, services, files=(path,)), size=size)
    assert asked.started[0].data.columns == (("prompt", "Frage"), ("completion", "Antwort"))


@pytest.mark.slow
def test_a_file_may_be_plain_text_and_the_user_may_go_back(tmp_path: Path) -> None:
    path, told = lines(tmp_path / "rows.jsonl", ROW), Told()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await to_the_question(pilot, app, path)
        await choose(pilot, app, "Frage")
        await pilot.press("escape")
        assert "Which column holds what is asked?" in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, ColumnsScreen))
        assert step_of(app) == "data"
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ColumnsScreen))
        await choose(pilot, app, "plain text", "Antwort")
        await until(pilot, lambda: step_of(app) == "goal")
        assert told.kept[-1].columns == (("text", "Antwort"),)

    play_setup(story, tmp_path, finding(told, files=(path,)))


def test_a_single_column_is_text(tmp_path: Path) -> None:
    path, told = tmp_path / "rows.jsonl", Told()
    path.write_text(json.dumps({"Geschichte": "Once upon a time"}) + "\n")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await to_the_question(pilot, app, path)
        assert "Which column holds the text?" in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: step_of(app) == "data")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ColumnsScreen))
        await choose(pilot, app, "Geschichte")
        await until(pilot, lambda: step_of(app) == "goal")
        assert told.kept[-1].columns == (("text", "Geschichte"),)

    play_setup(story, tmp_path, finding(told, files=(path,)))


@pytest.mark.slow
def test_another_file_forgets_the_columns(tmp_path: Path) -> None:
    path, other, told = lines(tmp_path / "rows.jsonl", ROW), tmp_path / "other.jsonl", Told()
    other.write_text('{"prompt": "a", "completion": "b"}\n' * 30)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await to_the_question(pilot, app, path)
        await choose(pilot, app, "Frage", "Antwort")
        await until(pilot, lambda: step_of(app) == "goal")
        await pilot.press("escape")
        await until(pilot, lambda: step_of(app) == "data")
        app.screen.query_one("#step-data").offer_first(str(other))  # type: ignore[attr-defined]
        await pilot.pause()
        await through(pilot, app, "goal")
        assert told.kept[-1].columns == ()

    play_setup(story, tmp_path, finding(told, files=(path,)))


def test_names_and_texts_of_strangers_do_no_harm(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {HOSTILE: HOSTILE, f"{HOSTILE} too": HOSTILE})

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await to_the_question(pilot, app, path)
        assert_harmless(app)
        await pilot.press("enter", "enter")
        await until(pilot, lambda: step_of(app) == "goal")
        assert_harmless(app)

    play_setup(story, tmp_path, finding(Told(), files=(path,)))
