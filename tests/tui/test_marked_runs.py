"""Runs that are marked in the list and laid over each other: their curves, what differs, and what cannot be marked."""

from pathlib import Path

from textual.pilot import Pilot

from studio.core.events import Finished, Started
from studio.core.recipe import Recipe
from studio.tui.app import StudioApp
from studio.tui.screens.runs import RunsScreen
from tests.fakes.runs import LiveWorker
from tests.tui.stories import (
    BOTH,
    make_run,
    play,
    settle,
    shown,
    train,
    until,
)
from tests.tui.test_runs_screen import ended, rows
from widgets.line_plot import LinePlot


@BOTH
def test_marked_runs_are_compared(tmp_path: Path, size: tuple[int, int]) -> None:
    for number, rank in enumerate((8, 64)):
        recipe = Recipe(name=f"r{rank}").with_("adapter.rank", rank)
        paths = make_run(tmp_path, f"r{rank}", recipe, now=1_000_000 * (number + 1))
        with LiveWorker(paths) as worker:
            train(worker, range(1, 41))
            worker.emit(Finished, outcome="done", step=40)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: len(rows(app)) == 2)
        await pilot.press("space", "c")
        await settle(pilot)
        assert "mark 2 to 4" in shown(app)
        await pilot.press("down", "space")
        await settle(pilot)
        assert [row[1][:2] for row in rows(app)] == ["* ", "* "]
        await pilot.press("c")
        await until(pilot, lambda: "2 runs; 1 field" in shown(app))
        cells = {row[0]: row[1:] for row in rows(app)}
        assert cells["adapter.rank"] == ["64", "8"]
        assert cells["steps"] == ["40/100", "40/100"]
        assert cells["held-out loss"] == ["4.000", "4.000"]
        assert "Training loss (smoothed)" in shown(app)
        plot = app.screen.query_one(LinePlot)
        assert all(plot._picture.has_points(key) for key in "12")
        await pilot.press("e")
        await settle(pilot)
        assert "Held-out loss" in shown(app)
        await pilot.press("l", "escape")
        await settle(pilot)
        assert isinstance(app.screen, RunsScreen)

    play(story, tmp_path, size=size)


def test_a_mark_cuts_no_name(tmp_path: Path) -> None:
    run = ended(tmp_path, "a rather long name", "done", 1_000_000)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        await pilot.press("space")
        await settle(pilot)
        assert f"* {run.name} " in shown(app)

    play(story, tmp_path)


def test_what_has_no_curve_is_not_marked(tmp_path: Path) -> None:
    paths = make_run(tmp_path, "merged", now=1_000_000)
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="merge", model="embedded")
        worker.emit(Finished, outcome="done", step=0)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: rows(app))
        assert rows(app)[0][7] == "merge"
        await pilot.press("space")
        await settle(pilot)
        assert "Only training runs" in shown(app)
        assert "* merged" not in shown(app)

    play(story, tmp_path)
