"""The list of runs: how they stand, opening, resuming."""

import time
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Input

from studio.core.events import Evaluated, Finished, Saved, Started, StepDone, Warned
from studio.core.recipe import Recipe
from studio.runs.extension import Wish
from studio.runs.layout import RunPaths
from studio.runs.note import read_note
from studio.tui.app import StudioApp
from studio.tui.panels import runs_list
from studio.tui.panels.run_preview import RunPreview
from studio.tui.panels.runs_list import RunsList
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.dialogs import AskLine, Confirm
from studio.tui.screens.run import RunScreen
from studio.tui.screens.runs import RunsScreen
from tests.fakes.runs import LiveWorker, write_log
from tests.tui.stories import (
    BOTH,
    HOSTILE,
    NARROW,
    Asked,
    assert_harmless,
    make_run,
    play,
    services_that,
    settle,
    shown,
    train,
    until,
)


def ended(root: Path, name: str, outcome: str, at: float) -> RunPaths:
    paths = make_run(root, name, now=at)
    with LiveWorker(paths, clock=lambda: at) as worker:
        train(worker, range(1, 5))
        worker.emit(Finished, outcome=outcome, step=4)
    return paths


def rows(app: StudioApp) -> list[list[str]]:
    """What is listed, by columns; of a comparison the rows of its table."""
    for table in app.screen.query(DataTable):
        return [[str(cell) for cell in table.get_row_at(index)] for index in range(table.row_count)]
    return [
        [str(row.info.status), f"{'* ' if row.marked else ''}{row.name}", row.step, row.loss, row.held_out, row.note,
         row.started, row.method, row.model]
        for row in app.screen.query_one(RunsList).rows
    ]  # fmt: skip


@BOTH
@pytest.mark.parametrize("no_color", [False, True])
def test_runs_are_listed_newest_first(
    tmp_path: Path, size: tuple[int, int], no_color: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    ended(tmp_path, "first", "done", 1_000_000)
    ended(tmp_path, "second", "stopped", 2_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: "2 runs in" in shown(app) and "first-" in shown(app))
        assert [row[0] for row in rows(app)] == ["stopped", "finished"]
        assert [row[1].partition("-")[0] for row in rows(app)] == ["second", "first"]
        assert rows(app)[0][2:5] == ["4/100", "3.456", "4.000"]
        assert "stopped" in shown(app)

    play(story, tmp_path, size=size)


def test_figures_that_come_later_are_not_cut_to_the_width_of_the_first(tmp_path: Path) -> None:
    run = make_run(tmp_path, "try")
    write_log(run, Started(at=1.0, job="train"))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        assert rows(app)[0][0] == "crashed"
        write_log(run, Started(at=1.0, job="train"), StepDone(at=2.0, step=12345, loss=12.3456, tokens=1, seconds=1.0,
                  learning_rate=1e-4, grad_norm=1.0), Finished(at=3.0, outcome="done"))  # fmt: skip
        await until(pilot, lambda: rows(app)[0][2] != "-")
        for figure in ("12345", "12.35", "finished"):
            assert figure in rows(app)[0]
            assert f"{figure} " in shown(app)

    play(story, tmp_path, size=NARROW)


def test_enter_opens_the_chosen_run_and_escape_comes_back(tmp_path: Path) -> None:
    older = ended(tmp_path, "first", "done", 1_000_000)
    ended(tmp_path, "second", "done", 2_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("end", "home", "down", "home", "end", "enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert isinstance(app.screen, RunScreen)
        assert app.screen.paths == older
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(app.screen, RunsScreen)
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(app.screen, ConfigureScreen)

    play(story, tmp_path)


def test_resume_from_the_list(tmp_path: Path) -> None:
    stopped, asked = ended(tmp_path, "first", "stopped", 1_000_000), Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("R")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert asked.resumed == [stopped]

    play(story, tmp_path, services=services_that(asked))


@pytest.mark.parametrize("answer", ["y", "n"])
def test_to_start_over_is_asked_from_the_list_too(tmp_path: Path, answer: str) -> None:
    stopped, asked = ended(tmp_path, "first", "stopped", 1_000_000), Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("R")
        await until(pilot, lambda: isinstance(app.screen, Confirm) and "y  start over" in shown(app))
        await pilot.press(answer)
        await until(pilot, lambda: isinstance(app.screen, RunScreen if answer == "y" else RunsScreen))
        assert asked.started_over == ([stopped] if answer == "y" else [])

    play(story, tmp_path, services=services_that(asked, damaged="every checkpoint is damaged"))


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    ended(tmp_path, "first", "done", 1_000_000)
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("R")
        await settle(pilot)
        assert asked.resumed == []
        assert "Resume" not in shown(app).splitlines()[-1]

    play(story, tmp_path, services=services_that(asked))


def test_a_finished_run_trains_longer_as_far_and_as_typed(tmp_path: Path) -> None:
    finished, asked = ended(tmp_path, "first", "done", 1_000_000), Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("e")
        await until(pilot, lambda: isinstance(app.screen, AskLine))
        field = app.screen.query_one(Input)
        field.value = "half a mile"
        await pilot.press("enter")
        await until(pilot, lambda: "wanted such as 200 steps" in shown(app))
        field.value = "50 steps restart"
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Confirm) and "50 further, restart" in shown(app))
        assert not asked.extended
        await pilot.press("y")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert asked.extended == [(finished, Wish(50, 0.0, "restart"))]

    play(story, tmp_path, services=services_that(asked))


def test_a_refused_resume_is_told(tmp_path: Path) -> None:
    ended(tmp_path, "first", "stopped", 1_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("R")
        await until(pilot, lambda: "the data has gone" in shown(app))
        assert isinstance(app.screen, RunsScreen)
        assert_harmless(app)

    play(story, tmp_path, services=services_that(Asked(), refuses=f"the data has gone {HOSTILE}"))


def test_the_list_follows_and_keeps_the_cursor(tmp_path: Path) -> None:
    ended(tmp_path, "first", "done", 1_000_000)
    ended(tmp_path, "second", "done", 2_000_000)
    live = make_run(tmp_path / "elsewhere", "third", now=3_000_000)
    with LiveWorker(live, clock=lambda: 3_000_000) as worker:
        train(worker, range(1, 3))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("o")
            await until(pilot, lambda: rows(app))
            await pilot.press("down")
            live.root.rename(tmp_path / "runs" / live.name)  # as if it were launched now
            await until(pilot, lambda: len(rows(app)) == 3)
            assert rows(app)[0][0] == "running"
            screen = app.screen
            assert isinstance(screen, RunsScreen)
            assert screen._chosen is not None
            assert screen._chosen.name.startswith("first")
            worker.emit(StepDone, step=50, loss=1.25, learning_rate=1e-4, grad_norm=1.0, tokens=1, seconds=1.0)
            worker.emit(Evaluated, step=50, loss=float("nan"), loss_tokens=1, rows=1, seconds=1.0)
            await until(pilot, lambda: rows(app)[0][2:5] == ["50/100", "1.250", "nan"])
            worker.emit(Finished, outcome="done")
            await until(pilot, lambda: rows(app)[0][0] == "finished")

        play(story, tmp_path)


def test_the_filter_narrows_and_escape_takes_it_away(tmp_path: Path) -> None:
    ended(tmp_path, "first", "done", 1_000_000)
    ended(tmp_path, "second", "stopped", 2_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: len(rows(app)) == 2)
        await pilot.press("slash", *"finished fir")
        await settle(pilot)
        assert [row[1].partition("-")[0] for row in rows(app)] == ["first"]
        assert "1 of 2 runs" in shown(app)
        await pilot.press("enter", "enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert isinstance(app.screen, RunScreen)
        assert app.screen.paths.name.startswith("first")
        await pilot.press("escape", "escape")
        await settle(pilot)
        assert len(rows(app)) == 2
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(app.screen, ConfigureScreen)

    play(story, tmp_path)


def test_a_run_is_deleted_after_a_question(tmp_path: Path) -> None:
    kept = ended(tmp_path, "first", "done", 1_000_000)
    doomed = ended(tmp_path, "second", "done", 2_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: len(rows(app)) == 2)
        await pilot.press("d", "n")
        await settle(pilot)
        assert doomed.root.is_dir()
        await pilot.press("d")
        await settle(pilot)
        assert "cannot be undone" in shown(app)
        await pilot.press("y")
        await until(pilot, lambda: len(rows(app)) == 1)
        assert not doomed.root.exists()
        assert kept.root.is_dir()

    play(story, tmp_path)


def test_deleting_a_merge_says_that_its_model_stays(tmp_path: Path) -> None:
    write_log(make_run(tmp_path, "merged"), Started(at=1.0, job="merge"), Finished(at=3.0, outcome="done"))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("d")
        await settle(pilot)
        told = " ".join(shown(app).replace("│", " ").split())
        assert ": its log, 0.0 MB? Models and files that it made stay." in told
        await pilot.press("n")

    play(story, tmp_path)


def test_a_live_run_is_not_deleted(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 3))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await until(pilot, lambda: isinstance(app.screen, RunScreen))
            await pilot.press("escape", "o")
            await until(pilot, lambda: rows(app))
            await pilot.press("d")
            await settle(pilot)
            assert isinstance(app.screen, RunsScreen)
            assert any("stop it first" in told.message for told in app._notifications)
            assert paths.root.is_dir()
            worker.emit(Finished, outcome="done")

        play(story, tmp_path)
    assert paths.root.is_dir()


def test_no_runs_yet(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: "No runs yet" in shown(app))
        assert not any(key in shown(app) for key in ("Mark", "Compare", "Audit", "Merge", "Note"))
        await pilot.press("enter", "R", "d", "space", "c")
        await settle(pilot)
        assert isinstance(app.screen, RunsScreen)

    play(story, tmp_path)


def test_hostile_names_and_models(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "evil [b]\x1b[31m[@click=app.quit]x[-]"
    folder.mkdir(parents=True)
    paths = RunPaths(folder)
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="train", model=HOSTILE, method=HOSTILE)
        worker.emit(Finished, outcome="done")

    ended(tmp_path, "other", "done", 1_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        assert "[@click=app.quit]" in shown(app)
        assert_harmless(app)
        await pilot.press("space", "down", "space", "c")
        await until(pilot, lambda: "of 2 runs" in shown(app))
        assert "[@click=app.quit]" in shown(app)
        assert_harmless(app)
        await pilot.press("escape", "enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert_harmless(app)

    play(story, tmp_path, size=(160, 40))


def test_a_note_is_written_kept_found_and_taken_away(tmp_path: Path) -> None:
    paths = ended(tmp_path, "first", "done", 1_000_000)
    ended(tmp_path, "second", "done", 2_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: len(rows(app)) == 2)
        await pilot.press("down", "n", *"too [b]warm[/]", "enter")
        await until(pilot, lambda: "too [b]warm[/]" in shown(app))
        assert read_note(paths) == "too [b]warm[/]"
        await pilot.press("slash", *"warm")
        await settle(pilot)
        assert len(rows(app)) == 1
        await pilot.press("escape", "n")
        await settle(pilot)
        await pilot.press("home", "ctrl+k", "enter")
        await until(pilot, lambda: not paths.note.exists())

    play(story, tmp_path)


def test_a_note_that_is_too_long_is_refused_in_place(tmp_path: Path) -> None:
    paths = ended(tmp_path, "first", "done", 1_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("n")
        await settle(pilot)
        app.screen.query_one(Input).value = "x" * 501
        await pilot.press("enter")
        await settle(pilot)
        assert "at most 500" in shown(app)
        await pilot.press("escape")
        assert not paths.note.exists()

    play(story, tmp_path)


def test_a_run_of_today_shows_its_time_and_another_its_day() -> None:
    assert len(runs_list._when(time.time())) == len("00:00")
    assert runs_list._when(time.mktime((2001, 2, 3, 4, 5, 6, 0, 0, -1))) == "2001-02-03"


def test_groups_full_names_methods_models_and_differences_in_a_narrow_terminal(tmp_path: Path) -> None:
    base, long = "meta-llama/Llama-3.1-8B-Instruct", "a very long name that is as long as folders may be called"
    for number, (name, rank) in enumerate((("shell", 16), (long, 32))):
        recipe = Recipe(name=name, method="qlora").with_("adapter.rank", rank).with_("model.base", base)
        paths = make_run(tmp_path, name, recipe, now=1_000_000 * (number + 1))
        steps = [
            StepDone(at=4.0 + n, step=n, loss=4 - n, learning_rate=1e-4, grad_norm=1.0, tokens=9, seconds=1.0)
            for n in range(1, 4)
        ]
        started = Started(at=number + 1.0, job="train", method="qlora", model=base, recipe=recipe.to_dict())
        measured = [Evaluated(at=2.0 + n, step=3 * n, loss=4.0 - n, loss_tokens=9, rows=5, seconds=1.0) for n in (0, 1)]
        write_log(paths, started, measured[0], *steps, measured[1], Finished(at=9.0, outcome="done", step=3))
    export = make_run(tmp_path, "export-q8_0-a-model-with-a-rather-long-name", now=3_000_000)
    write_log(
        export, Started(at=3.0, job="export", model="/models/merged"), Warned(at=4.0, message="far from it"),
        Saved(at=5.0, what="exported", path="/models/m.gguf"), Finished(at=6.0, outcome="done"),
    )  # fmt: skip

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: "the run before" in shown(app))
        assert [row[1] for row in rows(app)] == [run.info.name for run in app.screen.query_one(RunsList).rows]
        assert len(rows(app)) == 2, "an export is not among the runs"
        assert " Runs 2 " in shown(app) and " Exports 1 " in shown(app)
        for row in rows(app):
            assert f"✓ {row[1]}" in shown(app), "the whole name"
        lines = shown(app).splitlines()[: app.screen.query_one("#runs-of").region.bottom]
        for rank in (16, 32):
            (line,) = (line for line in lines if f"qlora r{rank}" in line)
            assert f"qlora r{rank}  Llama-3.1-8B-Instruct" in line, "method and model, whole"
        assert "█▅▁" in shown(app) and "held-out 4.000 → 3.000" in shown(app)
        assert "adapter.rank 16 → 32" in shown(app) and base in shown(app)
        await pilot.press("tab")
        await until(pilot, lambda: "! far from it" in shown(app))
        assert [row[1] for row in rows(app)] == [export.name] and f"✓ {export.name}" in shown(app)
        assert "1 warning" in shown(app) and "exported: /models/m.gguf" in shown(app)
        await pilot.press("slash", *"shell", "enter")
        await until(pilot, lambda: "1 of 3 runs" in shown(app))
        assert [row[1].partition("-")[0] for row in rows(app)] == ["shell"], "what is sought is in another group"
        assert "Runs 1/2" in shown(app) and "Exports 0/1" in shown(app)
        await pilot.resize_terminal(160, 40)
        await until(pilot, lambda: app.screen.query_one(RunPreview).region.x > 80)
        await until(pilot, lambda: "● held-out" in shown(app))

    play(story, tmp_path, size=NARROW)
