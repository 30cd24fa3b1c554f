"""A run on the screen: what it shows while it lives and after it ended, and what the keys ask for."""

import json
from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.core.events import (
    Evaluated,
    Failed,
    Finished,
    Phase,
    Sampled,
    Saved,
    Started,
    StepDone,
    Warned,
    event_to_dict,
)
from studio.runs.control import requested
from studio.runs.layout import RunPaths
from studio.tui.app import StudioApp
from studio.tui.panels.run_plots import RunPlots
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.run import RunScreen
from tests.fakes.runs import LiveWorker
from tests.tui.stories import (
    BOTH,
    HOSTILE,
    NARROW,
    WIDE,
    assert_harmless,
    make_run,
    play,
    settle,
    shown,
    text_of,
    train,
    until,
)
from widgets.line_plot import LinePlot
from widgets.log_view import LogView


def screen_of(app: StudioApp) -> RunScreen:
    assert isinstance(app.screen, RunScreen)
    return app.screen


def said(app: StudioApp) -> str:
    """What stands on the screen, with the lines of a notice in one, without the frames that it lies over."""
    return " ".join(shown(app).translate(dict.fromkeys(map(ord, "▌│─╭╮╰╯"), " ")).split())


def plots(app: StudioApp) -> str:
    return "\n".join(text_of(plot) for plot in app.screen.query(LinePlot))


@BOTH
@pytest.mark.parametrize("no_color", [False, True])
def test_a_live_run_is_followed(
    tmp_path: Path, size: tuple[int, int], no_color: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    paths = make_run(tmp_path, "shell helper")
    with LiveWorker(paths) as worker:
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
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="train")
        worker.emit(Phase, name="converting the embedded model", fraction=0.4, detail="from GGUF")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert "converting the embedded model 40% (from GGUF)" in shown(app)
            worker.emit(Phase, name="training")
            await settle(pilot)
            assert "converting" not in shown(app)
            assert "step 0" in shown(app)
            assert "No step is done yet. The loss is drawn" in shown(app)
            assert not any(mark in plots(app) for mark in ("0.0", "1.0", "┤", "└")), "no axes without a point"
            await pilot.press("4")
            await settle(pilot)
            assert "No warning so far, and nothing saved yet" in shown(app)
            worker.emit(Finished, outcome="done")
            await until(pilot, lambda: "ended before its first step" in shown(app))
            await pilot.press("3")
            await until(pilot, lambda: "The process printed nothing. What it does" in shown(app))

        play(story, tmp_path, open_run=paths)


def test_a_plot_says_that_no_step_told_its_memory(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="train")
        worker.emit(StepDone, step=1, loss=1.5, learning_rate=2e-4, grad_norm=0.5, tokens=1, seconds=1.0)

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await until(pilot, lambda: "none told its memory" in " ".join(shown(app).split()))
            worker.emit(Finished, outcome="done")
            await until(pilot, lambda: "done after 1 step" in shown(app))
            assert "before its first step" not in shown(app)

        play(story, tmp_path, open_run=paths)


@pytest.mark.parametrize(("size", "alone"), [(NARROW, True), (WIDE, False)])
def test_views(tmp_path: Path, size: tuple[int, int], alone: bool) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
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
                assert ("loss" in shown(app).lower().split("notes", 1)[1]) is not alone, f"plots beside {key}"
            assert "checkpoint at step 4: checkpoints/step-4, 1.0 GiB" in shown(app)
            assert "4 Notes (1)" in shown(app), "a warning is seen from the other pages too"
            await pilot.press("tab")
            await settle(pilot)
            assert screen_of(app).view == "memory"
            await pilot.press("tab")
            assert screen_of(app).view == "plots"
            await pilot.press("shift+tab", "shift+tab")
            assert screen_of(app).view == "notes"
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, size=size, open_run=paths)


def pair_plots(app: StudioApp) -> str:
    return "\n".join(text_of(plot) for plot in app.screen.query("#pairs LinePlot"))


@BOTH
def test_pairs_of_answers_have_plots_of_their_own(tmp_path: Path, size: tuple[int, int]) -> None:
    paths = make_run(tmp_path)

    def step(worker: LiveWorker, number: int) -> None:
        worker.emit(
            StepDone, step=number, loss=0.6, learning_rate=5e-6, grad_norm=1.0, tokens=100, seconds=1.0, loss_tokens=4,
            margin=number / 20, accuracy=0.75, chosen_logp=-40.0 - number, rejected_logp=-50.0 - 2 * number,
            chosen_reward=0.1, rejected_reward=0.0,
        )  # fmt: skip

    with LiveWorker(paths) as worker:
        worker.emit(Started, job="train", method="lora", model="embedded", recipe={"train": {"objective": "dpo"}})

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("6")
            await settle(pilot)
            assert "learns from no pairs" in said(app)
            for number in range(1, 31):
                step(worker, number)
            worker.emit(
                Evaluated, step=30, loss=0.65, loss_tokens=9, rows=9, seconds=1.0, margin=0.2, accuracy=0.6,
                chosen_logp=-45.0, rejected_logp=-60.0,
            )  # fmt: skip
            await settle(pilot)
            await pilot.press("6")
            await settle(pilot)
            before = pair_plots(app)
            for name in ("rewards", "margin", "accuracy", "log-probability", "chosen", "rejected", "held-out"):
                assert name in (before + shown(app)).lower(), name  # a large screen has titles in the frames
            for number in range(31, 61):
                step(worker, number)
            await settle(pilot)
            assert pair_plots(app) != before
            worker.emit(Finished, outcome="done", step=60, seconds=60.0)

        play(story, tmp_path, size=size, open_run=paths)


@BOTH
def test_foreign_text_is_never_markup_nor_control(tmp_path: Path, size: tuple[int, int]) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
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
    with LiveWorker(paths) as worker:
        train(worker, range(1, 3))
        nan = float("nan")
        worker.emit(StepDone, step=3, loss=nan, learning_rate=nan, grad_norm=float("inf"), tokens=1, seconds=1.0)

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert "loss nan" in shown(app)
            assert "grad inf" in shown(app)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, open_run=paths)


def test_another_job_shows_its_log_and_what_it_saved(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="merge", model="embedded")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert screen_of(app).view == "log"
            assert "printed nothing so far" in shown(app), "no page is blank"
            paths.output.write_text("merging layer 3\n")
            await until(pilot, lambda: "merging layer 3" in shown(app))
            assert "printed nothing" not in shown(app)
            assert "step 0" not in shown(app), "it has no steps, loss or speed"
            worker.emit(Saved, what="merged", path="/models/out")
            worker.emit(Warned, message="it differs by 0.2 nats a token")
            worker.emit(Finished, outcome="done")
            await until(pilot, lambda: "merged: /models/out" in shown(app))
            assert "it differs by 0.2 nats a token" in shown(app), "beside what it saved, not on a page of its own"
            assert "No adapter" not in shown(app)

        play(story, tmp_path, open_run=paths)


@pytest.mark.parametrize(
    ("job", "keys"),
    [
        ("train", "xpcmt"),
        ("export", "xt"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("merge", "xmt"), ("audit", "x"), ("measure", "x"))),
    ],
)
def test_keys_are_offered_where_they_mean_something(tmp_path: Path, job: str, keys: str) -> None:
    paths, made = make_run(tmp_path), tmp_path / "made"
    for folder, config in ((paths.adapter, "adapter_config.json"), (made, "config.json")):
        folder.mkdir()
        (folder / config).write_text("{}")

    with LiveWorker(paths) as worker:

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            worker.emit(Started, job=job, model="embedded")
            worker.emit(Saved, what="made", path=str(made))
            await settle(pilot)
            assert {key for key in "xpcmt" if f" {key} " in shown(app).splitlines()[-1]} == set(keys)
            await pilot.press("p")
            assert requested(paths, "pause") is (job == "train"), "what nobody would answer is not asked"
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, open_run=paths)


@pytest.mark.parametrize(
    ("job", "ends", "key", "why"),
    [
        ("train", "", "m", "This run has no adapter yet"),
        ("export", "done", "t", "a GGUF file is tried in llama.cpp"),
        ("audit", "", "p", "Only a training can be paused."),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("train", "stopped", "t", "ended without an adapter. R resumes it."),
                ("train", "", "R", "The run is alive"),
                ("train", "done", "x", "The run has ended."),
                ("merge", "", "t", "no model to chat with"),
                ("export", "", "m", "Only a training run has an adapter to merge."),
            )
        ),
    ],
)
def test_a_key_that_does_nothing_is_not_offered_and_says_why(
    tmp_path: Path, job: str, ends: str, key: str, why: str
) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        worker.emit(Started, job=job, model="embedded")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert f" {key} " not in shown(app).splitlines()[-1]
            await pilot.press(key)
            await settle(pilot)
            assert why in said(app)
            assert isinstance(app.screen, RunScreen)
            await pilot.press("question_mark")
            await settle(pilot)
            assert f"\n  {key}  " not in "\n".join(row.strip(" │▎▊") for row in shown(app).splitlines())

        if ends:
            worker.emit(Finished, outcome=ends)
            worker.__exit__(None, None, None)
        play(story, tmp_path, open_run=paths)


def test_a_job_without_steps_offers_no_empty_pages(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="export", model="embedded")

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert "3 Log   4 Notes" in shown(app)
            assert not {"1 Plots", "2 Samples", "5 Memory"} & {name for name in _TABS if name in shown(app)}
            assert not app.screen.query_one(RunPlots).display, "nor on a screen with room for plots and more"
            await pilot.press("tab")
            assert screen_of(app).view == "notes"
            await pilot.press("tab", "2")
            await settle(pilot)
            assert screen_of(app).view == "log"
            assert "fills no samples. It has log and notes" in said(app)

        play(story, tmp_path, open_run=paths)


_TABS = ("1 Plots", "2 Samples", "3 Log", "4 Notes", "5 Memory")


@pytest.mark.parametrize(
    "size", [(1, 1), *(pytest.param(one, marks=pytest.mark.slow) for one in ((20, 5), (40, 12), (300, 90)))]
)
def test_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    paths: RunPaths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 30))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            for key in "1234":
                await pilot.press(key)
            await pilot.resize_terminal(*NARROW)
            await settle(pilot)
            assert "step 29/100" in shown(app)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, size=size, open_run=paths)


def test_the_log_is_searched(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    lines = [f"line {number} [b]{'NEEDLE' if number in (30, 60) else 'hay'}" for number in range(100)]
    paths.output.write_text("\n".join(lines) + "\n")
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("slash", *"needle")
            await settle(pilot)
            assert "2 in the last 100 lines" in shown(app)
            assert "line 60 [b]NEEDLE" in shown(app)
            await pilot.press("enter", "n")
            await settle(pilot)
            assert "line 30 [b]NEEDLE" in shown(app)
            await pilot.press("n")
            await settle(pilot)
            assert "line 60 [b]NEEDLE" in shown(app)
            await pilot.press("escape")
            await settle(pilot)
            assert screen_of(app).view == "log"
            assert "in the last" not in shown(app)
            await pilot.press("escape")
            await settle(pilot)
            assert isinstance(app.screen, ConfigureScreen)

        play(story, tmp_path, open_run=paths)
        worker.emit(Finished, outcome="done")


@pytest.mark.slow
def test_a_long_log_shows_its_curve_before_it_is_read_and_answers_keys_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_on = RunScreen._read_on
    waiting: list[RunScreen] = []

    def wait(screen: RunScreen) -> None:
        waiting.append(screen)

    monkeypatch.setattr(RunScreen, "_read_on", wait)
    paths = make_run(tmp_path)
    steps = 6000
    with LiveWorker(paths) as worker:
        train(worker, range(1, 3), total=steps)
    with paths.events.open("a") as log:
        for number in range(3, steps + 1):
            event = StepDone(
                at=2.0, step=number, loss=1.5, learning_rate=2e-4, grad_norm=0.5, tokens=1, seconds=1.0
            )  # fmt: skip
            log.write(json.dumps(event_to_dict(event)) + "\n")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: "at a glance" in plots(app))
        assert f"step {steps}/" not in shown(app)
        await pilot.press("3")
        assert screen_of(app).view == "log"
        await until(pilot, lambda: bool(waiting))
        monkeypatch.setattr(RunScreen, "_read_on", read_on)
        read_on(waiting[0])
        await until(pilot, lambda: f"step {steps}/{steps}" in shown(app))
        assert "at a glance" not in plots(app)
        assert "smoothed" in plots(app)

    play(story, tmp_path, open_run=paths)
