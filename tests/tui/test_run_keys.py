"""A run on the screen at its end and under the keys: stop, pause, checkpoint, resume, leave."""

from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.core.events import Failed, Finished, Paused, Started
from studio.runs.control import request, requested, withdraw
from studio.runs.worker import Worker
from studio.tui.app import StudioApp
from studio.tui.panels.run_plots import RunPlots
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.dialogs import Confirm
from tests.fakes.runs import LiveWorker
from tests.tui.stories import (
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


def test_a_crash_is_told_with_the_last_lines(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    worker = Worker(paths)
    worker.__enter__()
    train(worker, range(1, 4))
    paths.output.write_text("".join(f"line {number}\n" for number in range(50)) + f"Killed {HOSTILE}")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        assert "running" in shown(app)
        worker._log.close()
        worker._lock.release()  # as the kernel does when the process is killed
        paths.process.write_text('{"pid": 999999999, "started": 1, "boot": "none", "host": "elsewhere"}')
        await until(pilot, lambda: "crashed" in shown(app))
        told = shown(app)
        assert "the process ended without saying why" in told
        assert "line 49" in told
        assert "Killed" in told
        assert "R resumes" in told
        assert_harmless(app)

    play(story, tmp_path, size=NARROW, open_run=paths)
    worker._signals.restore()


def test_a_crash_whose_last_line_says_why_is_told_with_advice(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with pytest.raises(SystemExit), LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        worker._ended = True  # native code ends the process: nobody writes how
        raise SystemExit(1)
    paths.output.write_text(f"{HOSTILE}\nError out of memory at line 228 in file /src/csrc/ops.cu\n")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: "crashed" in shown(app))
        told = " ".join(shown(app).split())
        assert "crashed: out_of_memory" in told
        assert "What to do: cheapest first: halve train.micro_batch" in told
        assert_harmless(app)

    play(story, tmp_path, size=NARROW, open_run=paths)


def test_a_failure_is_told_with_its_advice(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(
            Failed,
            failure="nonfinite_loss",
            message="the loss is nan",
            advice="Lower it: lora-studio runs resume RUN",
            step=3,
        )

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        told = shown(app)
        assert "failed at step 3: nonfinite_loss" in told
        assert "the loss is nan" in told
        assert f"What to do: Lower it: lora-studio runs resume {paths.name}" in told
        assert "ETA -" in told

    play(story, tmp_path, open_run=paths)


@pytest.mark.parametrize(("outcome", "words"), [("done", "done after 3 steps in "), ("stopped", "stopped after 3")])
def test_an_end_says_where_the_adapter_lies(tmp_path: Path, outcome: str, words: str) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        paths.adapter.mkdir()
        worker.emit(Finished, outcome=outcome, step=3)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        told = " ".join(shown(app).split())
        assert words in told
        assert "The adapter lies in" in told
        assert ("R continues" in told) is (outcome == "stopped")

    play(story, tmp_path, open_run=paths)


def test_stop_is_asked_once_and_can_be_forced(tmp_path: Path) -> None:
    paths, asked = make_run(tmp_path), Asked()
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("x", "n")
            await settle(pilot)
            assert not requested(paths, "stop")
            await pilot.press("x")
            await settle(pilot)
            assert isinstance(app.screen, Confirm)
            assert "Stop this run?" in shown(app)
            await pilot.press("y")
            await until(pilot, lambda: "stopping" in shown(app))
            assert requested(paths, "stop")
            assert asked.ended == []
            await pilot.press("x")
            await settle(pilot)
            assert "End the process at once" in shown(app)
            await pilot.press("y")
            await until(pilot, lambda: asked.ended)
            assert asked.ended == [paths]
            worker.emit(Finished, outcome="stopped", step=3)
            await until(pilot, lambda: "stopped after 3" in shown(app))
            await pilot.press("x")
            assert not isinstance(app.screen, Confirm), "an ended run cannot be stopped"

        play(story, tmp_path, open_run=paths, services=services_that(asked))


def test_a_run_that_waits_for_its_disk_says_why_and_that_no_key_is_needed(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            worker.emit(Paused, step=3, paused=True, reason="the disk of /runs is full")
            await until(pilot, lambda: "paused  it goes on by itself: the disk of /runs is full" in shown(app))
            worker.emit(Paused, step=3, paused=False)
            await until(pilot, lambda: "goes on by itself" not in shown(app))

        play(story, tmp_path, open_run=paths)
        worker.emit(Finished, outcome="done")


def test_pause_and_checkpoint_are_requests_that_stay_visible(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("c")
            await settle(pilot)
            assert requested(paths, "checkpoint-now")
            assert "checkpoint asked for" in shown(app)
            worker.served("checkpoint-now")
            await pilot.press("p")
            await settle(pilot)
            assert requested(paths, "pause")
            assert "pause asked for" in shown(app)
            assert "p Go on" in shown(app), "the same key takes it back, and its name says so"
            worker.emit(Paused, step=3, paused=True)
            await until(pilot, lambda: "paused  p goes on" in shown(app))
            assert "p Go on" in shown(app)
            await pilot.press("c")
            await settle(pilot)
            assert "p goes on, then saves a checkpoint" in shown(app)
            worker.served("checkpoint-now")
            await pilot.press("p")
            await settle(pilot)
            assert not requested(paths, "pause")
            worker.emit(Paused, step=3, paused=False)
            await until(pilot, lambda: "running" in shown(app) and "p Pause" in shown(app))
            request(paths, "pause")  # from another terminal
            await until(pilot, lambda: "p Go on" in shown(app))
            withdraw(paths, "pause")
            worker.emit(Finished, outcome="done")
            await until(pilot, lambda: "finished" in shown(app))
            await pilot.press("p", "c")
            await settle(pilot)
            assert not requested(paths, "pause")
            assert not requested(paths, "checkpoint-now")

        play(story, tmp_path, open_run=paths)


def test_a_pause_asked_for_before_the_process_is_there_is_seen_too(tmp_path: Path) -> None:
    paths = make_run(tmp_path)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: "starting" in shown(app))
        await pilot.press("p")
        await settle(pilot)
        assert "starting  pause asked for" in shown(app)
        await pilot.press("p")
        await settle(pilot)
        assert "starting  waiting for the process" in shown(app)

    play(story, tmp_path, open_run=paths)


def test_resume_starts_a_worker_for_a_run_that_ended_early(tmp_path: Path) -> None:
    paths, asked = make_run(tmp_path), Asked()
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(Finished, outcome="stopped", step=3)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("R")
        await until(pilot, lambda: asked.resumed)
        assert asked.resumed == [paths]

    play(story, tmp_path, open_run=paths, services=services_that(asked))


@pytest.mark.parametrize("answer", ["y", "n"])
def test_to_start_over_where_every_checkpoint_is_damaged_is_asked_first(tmp_path: Path, answer: str) -> None:
    paths, asked = make_run(tmp_path), Asked()
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(Finished, outcome="stopped", step=3)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("R")
        await until(pilot, lambda: isinstance(app.screen, Confirm) and "y  start over" in shown(app))
        assert "Every checkpoint is damaged" in shown(app)
        assert_harmless(app)
        assert asked.started_over == []
        await pilot.press(answer)
        await settle(pilot)
        if answer == "y":
            await until(pilot, lambda: asked.started_over)
        assert asked.started_over == ([paths] if answer == "y" else [])
        assert asked.resumed == [paths]

    play(
        story, tmp_path, services=services_that(asked, damaged=f"every checkpoint is damaged {HOSTILE}"), open_run=paths
    )


def test_a_refused_resume_is_told(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(Finished, outcome="stopped", step=3)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("R")
        await until(pilot, lambda: "no such" in shown(app))
        assert_harmless(app)

    play(story, tmp_path, open_run=paths, services=services_that(Asked(), refuses=f"no such [b]thing[/b] {HOSTILE}"))


@pytest.mark.parametrize("outcome", ["done", None])
def test_resume_is_offered_neither_for_finished_nor_for_live_runs(tmp_path: Path, outcome: str | None) -> None:
    paths, asked = make_run(tmp_path), Asked()
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        if outcome:
            worker.emit(Finished, outcome=outcome, step=3)

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("R")
            await settle(pilot)
            assert asked.resumed == []
            keys = shown(app).splitlines()[-1]
            assert "Resume" not in keys
            assert ("Stop" in keys) is (outcome is None)
            assert "Back" in keys, "the last key fits as well"

        play(story, tmp_path, open_run=paths, services=services_that(asked), size=NARROW)
        if not outcome:
            worker.emit(Finished, outcome="done", step=3)


def test_a_resumed_run_draws_its_new_steps_in_place_of_the_old(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 41))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            picture = app.screen.query_one(RunPlots)._loss._picture
            assert len(picture._series["train"].xs) == 40
            worker.emit(Started, job="train", method="qlora", model="embedded", resumed_from=20)
            train(worker, range(21, 45))
            await until(pilot, lambda: "step 44" in shown(app))
            steps = list(picture._series["train"].xs)
            assert steps == list(range(1, 45))
            assert list(picture._series["mean"].xs) == steps
            assert list(picture._series["held_out"].xs) == [0]
            worker.emit(Finished, outcome="done", step=44)

        play(story, tmp_path, open_run=paths)


def test_leaving_and_quitting_leave_the_run_alive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("escape")
            await settle(pilot)
            assert isinstance(app.screen, ConfigureScreen)
            assert "The run goes on" in shown(app)
            await pilot.press("q")
            await pilot.pause()

        app = play(story, tmp_path, open_run=paths)
        farewell = " ".join(capsys.readouterr().err.split())
        assert farewell.startswith(f"The run {paths.name} goes on without the studio.")
        assert f"lora-studio runs attach {paths.name}" in farewell
        assert not requested(paths, "stop")
        assert app.return_code == 0
        worker.emit(Finished, outcome="done", step=3)


def test_quitting_without_a_live_run_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(Finished, outcome="done", step=3)

    async def story(pilot: Pilot[None], _: StudioApp) -> None:
        await pilot.press("q")
        await pilot.pause()

    play(story, tmp_path, open_run=paths)
    assert capsys.readouterr().err == ""
