"""A run on the screen: what it shows while it lives and after it ended, and what the keys ask for."""

import json
from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.core.events import Failed, Finished, Paused, Phase, Planned, Sampled, Saved, Started, StepDone, Warned
from studio.runs.control import requested
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker
from studio.tui.against_plan import planned_reading
from studio.tui.app import StudioApp
from studio.tui.panels.run_plots import RunPlots
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.confirm import Confirm
from studio.tui.screens.run import RunScreen
from tests.tui.stories import (
    HOSTILE,
    NARROW,
    WIDE,
    Asked,
    assert_harmless,
    engine_that,
    make_run,
    play,
    settle,
    shown,
    text_of,
    train,
    until,
)
from widgets.gauge_picture import figure
from widgets.line_plot import LinePlot
from widgets.log_view import LogView


def screen_of(app: StudioApp) -> RunScreen:
    assert isinstance(app.screen, RunScreen)
    return app.screen


def plots(app: StudioApp) -> str:
    return "\n".join(text_of(plot) for plot in app.screen.query(LinePlot))


@pytest.mark.parametrize("size", [NARROW, WIDE])
@pytest.mark.parametrize("no_color", [False, True])
def test_a_live_run_is_followed(
    tmp_path: Path, size: tuple[int, int], no_color: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    paths = make_run(tmp_path, "shell helper")
    with Worker(paths) as worker:
        train(worker, range(1, 31))
        paths.output.write_text("loading\n")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert app.no_color is no_color
            first = shown(app)
            for part in (
                "shell-helper-",
                "running",
                "step 30/100",
                "ETA 2 min 20 s",
                "800 tok/s",
                "lr 2e-4",
                "grad 0.512",
            ):
                assert part in first
            assert "held-out 4.000" in first
            assert "loss 1.669" in first
            assert "100 step" in plots(app)
            assert "allocated" in plots(app)
            assert "resident" not in plots(app), "readings that no event has are not named"
            before = plots(app)
            train(worker, range(31, 61))
            with paths.output.open("a") as file:
                file.write("step 60\n")
            await settle(pilot)
            assert "step 60/100" in shown(app)
            assert plots(app) != before
            assert screen_of(app).query_one(LogView).lines == ("loading", "step 60")
            worker.emit(Finished, outcome="done", step=60, seconds=120.0)

        play(story, tmp_path, size=size, open_run=paths)


def test_phases_before_the_first_step(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        worker.emit(Started, job="train")
        worker.emit(Phase, name="converting the embedded model", fraction=0.4, detail="from GGUF")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert "converting the embedded model 40% (from GGUF)" in shown(app)
            worker.emit(Phase, name="training")
            await settle(pilot)
            assert "converting" not in shown(app)
            assert "step 0" in shown(app)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, open_run=paths)


@pytest.mark.parametrize(("size", "alone"), [(NARROW, True), (WIDE, False)])
def test_views(tmp_path: Path, size: tuple[int, int], alone: bool) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        train(worker, range(1, 5))
        worker.emit(Warned, message="the paged optimizer falls back")
        worker.emit(Saved, what="checkpoint", path="checkpoints/step-4", step=4, size_bytes=2**30)
        paths.output.write_text("line one\nline two\n")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            views = {"samples": "what is it?", "log": "line two", "notes": "the paged optimizer falls back"}
            for number, (key, words) in enumerate(views.items(), start=2):
                await pilot.press(str(number))
                await settle(pilot)
                assert words in shown(app)
                assert ("loss" in shown(app).split("Notes", 1)[1]) is not alone, f"plots beside {key}"
            assert "checkpoint at step 4: checkpoints/step-4, 1.0 GiB" in shown(app)
            await pilot.press("tab")
            await settle(pilot)
            assert screen_of(app).view == "plots"
            await pilot.press("shift+tab", "shift+tab")
            assert screen_of(app).view == "log"
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, size=size, open_run=paths)


@pytest.mark.parametrize("size", [NARROW, WIDE])
def test_foreign_text_is_never_markup_nor_control(tmp_path: Path, size: tuple[int, int]) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        worker.emit(Started, job="train", model=HOSTILE, method="lora")
        worker.emit(Phase, name=HOSTILE, fraction=0.5, detail=HOSTILE)
        worker.emit(Sampled, step=0, index=0, prompt=HOSTILE, answer=HOSTILE, expected=HOSTILE)
        worker.emit(Warned, message=HOSTILE)
        worker.emit(Saved, what=HOSTILE, path=HOSTILE, step=1)
        paths.output.write_text(f"{HOSTILE}\n50%\r100%{HOSTILE}\n")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            for key in "1234":
                await pilot.press(key)
                await settle(pilot)
                assert_harmless(app)
                if key != "1":
                    assert "[@click=app.quit]" in shown(app)
            worker.emit(Failed, failure=HOSTILE, message=HOSTILE, advice=HOSTILE)
            await until(pilot, lambda: "What to do" in shown(app))
            assert_harmless(app)

        play(story, tmp_path, size=size, open_run=paths)


def test_non_finite_losses_are_gaps_and_said(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        train(worker, range(1, 3))
        nan = float("nan")
        worker.emit(StepDone, step=3, loss=nan, learning_rate=nan, grad_norm=float("inf"), tokens=1, seconds=1.0)

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert "loss nan" in shown(app)
            assert "grad inf" in shown(app)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, open_run=paths)


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
        await until(pilot, lambda: "crashed" in shown(app), seconds=3)
        told = shown(app)
        assert "the process ended without saying why" in told
        assert "line 49" in told
        assert "Killed" in told
        assert "R resumes" in told
        assert_harmless(app)

    play(story, tmp_path, size=NARROW, open_run=paths)
    worker._signals.restore()


def test_a_failure_is_told_with_its_advice(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
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


@pytest.mark.parametrize(
    ("outcome", "words"), [("done", "done after 3 steps in 1 min 15 s"), ("stopped", "stopped after 3")]
)
def test_an_end_says_where_the_adapter_lies(tmp_path: Path, outcome: str, words: str) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        train(worker, range(1, 4))
        paths.adapter.mkdir()
        worker.emit(Finished, outcome=outcome, step=3, seconds=75.0)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        told = " ".join(shown(app).split())
        assert words in told
        assert "The adapter lies in" in told
        assert ("R continues" in told) is (outcome == "stopped")

    play(story, tmp_path, open_run=paths)


def test_stop_is_asked_once_and_can_be_forced(tmp_path: Path) -> None:
    paths, asked = make_run(tmp_path), Asked()
    with Worker(paths) as worker:
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

        play(story, tmp_path, open_run=paths, engine=engine_that(asked))


def test_pause_and_checkpoint_are_requests_that_stay_visible(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
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
            worker.emit(Paused, step=3, paused=True)
            await until(pilot, lambda: "paused  p goes on" in shown(app))
            await pilot.press("c")
            await settle(pilot)
            assert "p goes on, then saves a checkpoint" in shown(app)
            worker.served("checkpoint-now")
            await pilot.press("p")
            await settle(pilot)
            assert not requested(paths, "pause")
            worker.emit(Paused, step=3, paused=False)
            await until(pilot, lambda: "running" in shown(app))
            worker.emit(Finished, outcome="done")
            await until(pilot, lambda: "finished" in shown(app))
            await pilot.press("p", "c")
            await settle(pilot)
            assert not requested(paths, "pause")
            assert not requested(paths, "checkpoint-now")

        play(story, tmp_path, open_run=paths)


def test_resume_starts_a_worker_for_a_run_that_ended_early(tmp_path: Path) -> None:
    paths, asked = make_run(tmp_path), Asked()
    with Worker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(Finished, outcome="stopped", step=3)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("R")
        await until(pilot, lambda: asked.resumed)
        assert asked.resumed == [paths]

    play(story, tmp_path, open_run=paths, engine=engine_that(asked))


def test_a_refused_resume_is_told(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(Finished, outcome="stopped", step=3)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("R")
        await until(pilot, lambda: "no such" in shown(app))
        assert_harmless(app)

    play(story, tmp_path, open_run=paths, engine=engine_that(Asked(), refuses=f"no such [b]thing[/b] {HOSTILE}"))


@pytest.mark.parametrize("outcome", ["done", None])
def test_resume_is_refused_for_finished_and_live_runs(tmp_path: Path, outcome: str | None) -> None:
    paths, asked = make_run(tmp_path), Asked()
    with Worker(paths) as worker:
        train(worker, range(1, 4))
        if outcome:
            worker.emit(Finished, outcome=outcome, step=3)

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("R")
            await settle(pilot)
            assert asked.resumed == []
            assert "there is nothing to resume" in shown(app)

        play(story, tmp_path, open_run=paths, engine=engine_that(asked))
        if not outcome:
            worker.emit(Finished, outcome="done", step=3)


def test_a_resumed_run_draws_its_new_steps_in_place_of_the_old(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
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


def test_leaving_and_quitting_leave_the_run_alive(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        train(worker, range(1, 4))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("escape")
            await settle(pilot)
            assert isinstance(app.screen, ConfigureScreen)
            assert "The run goes on" in shown(app)
            await pilot.press("q")
            await pilot.pause()

        app = play(story, tmp_path, open_run=paths)
        assert farewell(app).startswith(f"The run {paths.name} goes on without the studio.")
        assert f"lora-studio runs attach {paths.name}" in farewell(app)
        assert not requested(paths, "stop")
        assert app.return_code == 0
        worker.emit(Finished, outcome="done", step=3)


def test_quitting_without_a_live_run_says_nothing(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(Finished, outcome="done", step=3)

    async def story(pilot: Pilot[None], _: StudioApp) -> None:
        await pilot.press("q")
        await pilot.pause()

    assert farewell(play(story, tmp_path, open_run=paths)) == ""


def farewell(app: StudioApp) -> str:
    return "\n".join(str(part) for part in app._exit_renderables)


def test_a_prediction_is_drawn(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    paths.plan.write_text('{"peak_bytes": 8589934592}')
    with Worker(paths) as worker:
        train(worker, range(1, 10))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            memory = app.screen.query_one("#memory-plot", LinePlot)
            assert "predicted peak 8.0" in text_of(memory) or "predicted" in text_of(memory)
            assert "╌╌╌╌" in text_of(memory)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, size=(160, 50), open_run=paths)


PLAN = {
    "peak_bytes": 6 * 2**30,
    "components": {"base": 5 * 2**30, "activations": 2**30, "context": 2**29},
    "ranges": {"allocated": {"low": 5 * 2**30, "expected": 6 * 2**30, "high": 7 * 2**30}},
}


@pytest.mark.parametrize(("factor", "verdict"), [(1, "in the range"), (0.5, "100% over"), (2, "50% under")])
def test_the_measured_peak_stands_beside_the_predicted_one(tmp_path: Path, factor: float, verdict: str) -> None:
    paths = make_run(tmp_path)
    plan = json.loads(json.dumps(PLAN), parse_int=lambda number: int(int(number) * factor))
    paths.plan.write_text(json.dumps(plan))
    with Worker(paths) as worker:
        train(worker, range(1, 4))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            row = next(line for line in shown(app).splitlines() if line.startswith(" peak "))
            assert "█" in row
            assert f"{figure(6 * factor)} GiB" in row
            assert "measured 6.00" in row
            assert verdict in row
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, open_run=paths)


def test_a_run_on_the_cpu_is_not_measured_against_a_card(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    paths.plan.write_text(json.dumps(PLAN))
    with Worker(paths) as worker:
        worker.emit(Started, job="train", method="lora", model="embedded")
        worker.emit(
            Planned,
            total_steps=9,
            trainable_parameters=1,
            rows=9,
            held_out_rows=1,
            device="cpu",
            dtype="fp32",
            loss_path="full",
        )

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert not app.screen.query_one("#against-plan").display
            assert "predicted" not in shown(app)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, open_run=paths)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "{}", '{"components": {"base": "x"}}', '{"components": {"base": 1}, "ranges": {"allocated": []}}'],
)
def test_a_damaged_plan_shows_no_gauge(tmp_path: Path, damage: str) -> None:
    paths = make_run(tmp_path)
    paths.plan.write_text(damage)
    assert planned_reading(paths) is None


def test_another_job_shows_its_log_and_what_it_saved(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with Worker(paths) as worker:
        worker.emit(Started, job="merge", model="embedded")
        paths.output.write_text("merging layer 3\n")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert screen_of(app).view == "log"
            assert "merging layer 3" in shown(app)
            worker.emit(Saved, what="merged", path="/models/out")
            worker.emit(Finished, outcome="done")
            await until(pilot, lambda: "merged: /models/out" in shown(app))
            assert "No adapter" not in shown(app)

        play(story, tmp_path, open_run=paths)


@pytest.mark.parametrize("size", [(1, 1), (20, 5), (40, 12), (300, 90)])
def test_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    paths: RunPaths = make_run(tmp_path)
    with Worker(paths) as worker:
        train(worker, range(1, 30))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            for key in "1234":
                await pilot.press(key)
            await pilot.resize_terminal(*NARROW)
            await settle(pilot)
            assert "step 29/100" in shown(app)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, size=size, open_run=paths)
