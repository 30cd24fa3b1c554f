"""The audit screen: what was measured is shown with its intervals, and an audit is begun from recipe and run."""

import json
from functools import partial
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from studio.core.errors import BadInput
from studio.core.events import Finished, Phase, Started
from studio.core.recipe import Recipe
from studio.runs.control import requested, withdraw
from studio.runs.held_out import HeldOutRecord, keep_record
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from studio.tui.app import StudioApp
from studio.tui.panels.audit_report import block_curve, lane_curves
from studio.tui.screens.ask_audit import AskAudit
from studio.tui.screens.audit import AuditScreen
from studio.tui.screens.dialogs import AskLine
from studio.tui.screens.run import RunScreen
from studio.tui.services import Services
from tests.fakes.audit_job import answers_report, base_report, figures, run_report
from tests.fakes.runs import LiveWorker
from tests.tui.stories import BOTH, HOSTILE, NARROW, WIDE, assert_harmless, given, play, settle, shown, until


def an_audit(root: Path, name: str = "audit-base", report: dict[str, object] | None = None) -> RunPaths:
    """A finished audit with its report, told by a real worker."""
    paths = RunPaths(root / "runs" / name)
    paths.root.mkdir(parents=True)
    paths.control.mkdir()
    write_job(paths, AuditRequest("base", model="embedded", data="rows.jsonl"))
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="audit", method="base", model="embedded")
        paths.report.write_text(json.dumps(report or base_report("embedded")))
        worker.emit(Finished, outcome="done")
    return paths


def race_report() -> dict[str, object]:
    lanes = [
        {
            "name": name,
            "run": f"{name}-run",
            "task": figures(loss, more, 0.1),
            "neutral": figures(loss, more, 0.1),
            "peak_predicted_bytes": 2**30,
            "peak_measured_bytes": None,
            "tokens_per_second": 120.0,
            "seconds": 60.0,
            "adapter_bytes": 2**20,
            "curve": [[1, 4.0], [2, 3.0], [3, loss]],
            "held_out": [[3, loss]],
        }
        for name, loss, more in (("lora", 2.0, 0.0), ("qlora", 2.2, 0.2))
    ]
    advice = {"best": "lora", "sentence": "lora learns better.", "reason": "so it is", "certainty": "40 tokens"}
    shared = {"schema": 1, "what": "race", "recipe": "mine", "model": "embedded", "reference": "lora"}
    return {**shared, "rows": {"task": 4, "neutral": 4}, "lanes": lanes, "recommendation": advice}


async def opened(pilot: Pilot[None], app: StudioApp) -> AuditScreen:
    await pilot.press("a")
    await until(pilot, lambda: isinstance(app.screen, AuditScreen))
    screen = app.screen
    assert isinstance(screen, AuditScreen)
    screen.look()
    await until(pilot, lambda: screen.is_mounted)
    return screen


@BOTH
def test_without_an_audit_it_says_how_to_begin(tmp_path: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "No audit yet" in shown(app))
        assert "e Race" in shown(app) and "esc Back" in shown(app)
        for key in ("Open run", "Stop", "Write report"):
            assert key not in shown(app), "there is nothing to do it to"

    play(story, tmp_path, size=size)


def test_the_report_under_the_cursor_is_shown(tmp_path: Path) -> None:
    an_audit(tmp_path)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "Do it." in shown(app))
        for wanted in ("base embedded: 40 tokens of 4 rows", "2.1000 (2.0000-2.2000)", "finished"):
            assert wanted in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))

    play(story, tmp_path, size=(160, 50))


def test_a_race_shows_its_lanes_and_curves(tmp_path: Path) -> None:
    an_audit(tmp_path, "audit-race", race_report())

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "lora learns better." in shown(app))
        await until(pilot, lambda: "training loss  ━━ lora  ━━ qlora" in shown(app))

    play(story, tmp_path, size=(160, 50))


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    report = base_report(HOSTILE)
    report["recommendation"]["sentence"] = HOSTILE  # type: ignore[index]
    report["variants"][1]["name"] = HOSTILE  # type: ignore[index]
    report["blocks"][0]["name"] = HOSTILE  # type: ignore[index]
    an_audit(tmp_path, report=report)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "[bold red]not bold[/]" in shown(app))
        assert_harmless(app)

    play(story, tmp_path, size=(160, 50))


@pytest.mark.parametrize("reached", [(), ("tab",)])
def test_the_page_keys_turn_the_report_wherever_the_cursor_stands(tmp_path: Path, reached: tuple[str, ...]) -> None:
    """In a narrow terminal the report is longer than its place, and the list took the keys without a sign."""
    an_audit(tmp_path, "audit-run", run_report())

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "Use it." in shown(app))
        words = app.screen.query_one("#audit-words")
        await pilot.press(*reached, "pagedown")
        await settle(pilot)
        assert words.scroll_offset.y > 0
        await pilot.press("pageup")
        await settle(pilot)
        assert words.scroll_offset.y == 0

    play(story, tmp_path, size=NARROW)


def test_answers_are_shown_side_by_side_and_harmless(tmp_path: Path) -> None:
    report = run_report()
    report["answers"] = answers_report(text=HOSTILE)
    report["answers"]["rows"][0]["prompt"] = HOSTILE
    an_audit(tmp_path, "audit-run", report)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "Use it." in shown(app))
        app.screen.query_one("#audit-words").scroll_end(animate=False)
        await until(pilot, lambda: "held-out answer" in shown(app))
        assert "[bold red]not bold[/]" in shown(app)
        assert_harmless(app)

    play(story, tmp_path, size=(160, 60))


def test_an_audit_that_is_no_report_says_so(tmp_path: Path) -> None:
    an_audit(tmp_path).report.unlink()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "no report yet" in shown(app))

    play(story, tmp_path, size=WIDE)


@pytest.mark.parametrize(("key", "what"), [("b", "base"), ("e", "race")])
def test_the_recipe_is_audited(tmp_path: Path, key: str, what: str) -> None:
    recipe = Recipe(name="mine").with_("train.seed", 5)
    asked: list[AuditRequest] = []
    made = an_audit(tmp_path, "audit-new")

    def start(request: AuditRequest, runs_root: Path) -> RunPaths:
        asked.append(request)
        return made

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        app.push_screen(AuditScreen(recipe, tmp_path / "runs", poll_seconds=3600, services=given(start=start)))
        await until(pilot, lambda: isinstance(app.screen, AuditScreen))
        await pilot.press(key)
        await until(pilot, lambda: isinstance(app.screen, AskAudit))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))

    play(story, tmp_path)
    (request,) = asked
    assert (request.what, request.model) == (what, "embedded")
    assert request.recipe == (recipe if what == "race" else None)
    assert request.seed == (5 if what == "base" else 17)


def test_a_refusal_is_said(tmp_path: Path) -> None:
    def start(request: AuditRequest, runs_root: Path) -> RunPaths:
        raise BadInput(f"the data are gone {HOSTILE}")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        app.push_screen(AuditScreen(Recipe(), tmp_path / "runs", poll_seconds=3600, services=given(start=start)))
        await until(pilot, lambda: isinstance(app.screen, AuditScreen))
        await pilot.press("b")
        await until(pilot, lambda: isinstance(app.screen, AskAudit))
        await pilot.press("up", "up", "up", "enter", "0", "r", "backspace")
        assert isinstance(app.screen, AskAudit), "r is typed while a line is edited"
        await pilot.press("enter", "r")
        await until(pilot, lambda: "the data are gone" in shown(app))
        assert isinstance(app.screen, AskAudit), "there it can be mended"
        assert app.focused is app.screen.query_one("#wish-rows")
        assert app.screen.query_one("#wish-rows", Input).value == "1000", "what was chosen is there again"
        assert_harmless(app)
        await pilot.press("escape", "b")
        await until(pilot, lambda: isinstance(app.screen, AskAudit))
        assert "the data are gone" not in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: "the data are gone" in shown(app))

    play(story, tmp_path)


def _asks(app: StudioApp, words: str) -> bool:
    return isinstance(app.screen, AskAudit) and words in shown(app)


def test_a_race_has_the_steps_that_were_typed(tmp_path: Path) -> None:
    recipe, asked = Recipe(name="mine"), []

    def start(request: AuditRequest, runs_root: Path) -> RunPaths:
        asked.append(request)
        raise BadInput("enough")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        app.push_screen(AuditScreen(recipe, tmp_path / "runs", poll_seconds=3600, services=given(start=start)))
        await until(pilot, lambda: isinstance(app.screen, AuditScreen))
        await pilot.press("e")
        for typed, before in (("12", "Race"), ("many", "enough")):
            await until(pilot, partial(_asks, app, before))
            app.screen.query_one("#wish-steps", Input).value = typed
            await pilot.click("#audit-start")
        await until(pilot, lambda: "steps: found many" in shown(app))

    play(story, tmp_path, size=NARROW)
    (request,) = asked
    assert request.recipe == recipe.with_("train.steps", 12) and request.lanes == ("lora", "qlora")


def test_a_runs_adapter_is_audited_as_chosen(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "runs" / "trained")
    run.adapter.mkdir(parents=True)
    write_job(run, Recipe(name="mine"))
    keep_record(run, HeldOutRecord("embedded", "embedded", "auto", held_out=("00" * 12,) * 7))
    asked: list[AuditRequest] = []

    def start(request: AuditRequest, runs_root: Path) -> RunPaths:
        asked.append(request)
        raise BadInput("enough")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        services = given(start=start)
        app.push_screen(AuditScreen(Recipe(), tmp_path / "runs", poll_seconds=3600, run=run, services=services))
        await until(pilot, lambda: isinstance(app.screen, AskAudit))
        assert "Audit the adapter of trained" in shown(app)
        app.screen.query_one("#wish-answers").focus()
        await pilot.press("enter", "backspace", "2")
        await pilot.press("down", "x", "enter", *"^[A-Z]", "enter", "r")
        await until(pilot, lambda: "enough" in shown(app))

    play(story, tmp_path, size=NARROW)
    (request,) = asked
    assert (request.what, request.run) == ("run", str(run.root))
    assert (request.answers, request.check_regex, request.speed, request.rows) == (2, "^[A-Z]", True, 7)


def test_a_running_audit_shows_how_far_it_is_and_is_stopped(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "runs" / "audit-now")
    paths.control.mkdir(parents=True)
    write_job(paths, AuditRequest("base", model="embedded", data="rows.jsonl"))

    told: list[str] = []

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        app.push_screen(AuditScreen(Recipe(), tmp_path / "runs", services=Services(), poll_seconds=3600))
        await until(pilot, lambda: "answering 25%  base: 2 of 6" in shown(app))
        assert "x Stop" in shown(app) and "Write report" not in shown(app)
        await pilot.press("x")
        await until(pilot, lambda: requested(paths, "stop"))
        told.append("stopped")
        worker.emit(Finished, outcome="done")
        paths.report.write_text(json.dumps(base_report("embedded")))
        withdraw(paths, "stop")
        assert isinstance(app.screen, AuditScreen)
        app.screen.look()
        await until(pilot, lambda: "Do it." in shown(app))
        assert "finished " in shown(app), "not cut to the width of running"
        assert "x Stop" not in shown(app) and "w Write report" in shown(app)
        told.append("finished")

    with LiveWorker(paths) as worker:
        worker.emit(Started, job="audit", method="run", model="embedded")
        worker.emit(Phase, name="answering", fraction=0.25, detail="base: 2 of 6")
        play(story, tmp_path, size=WIDE)
    assert told == ["stopped", "finished"], "a worker keeps what is raised in it to itself"


def test_a_report_is_written_to_a_folder(tmp_path: Path) -> None:
    paths = an_audit(tmp_path)
    (paths.root / "report.md").write_text("# Audit\n")
    (paths.root / "losses.svg").write_text("<svg/>")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "Do it." in shown(app))
        await pilot.press("w")
        await until(pilot, lambda: isinstance(app.screen, AskLine))
        for again in (False, True):
            app.screen.query_one(Input).value = str(tmp_path / "out")
            await pilot.press("enter")
            if not again:
                await until(pilot, lambda: isinstance(app.screen, AuditScreen))
                await pilot.press("w")
                await until(pilot, lambda: isinstance(app.screen, AskLine))
        await until(pilot, lambda: "holds report.md already" in " ".join(shown(app).split()))

    play(story, tmp_path, size=WIDE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["losses.svg", "report.json", "report.md"]


def test_a_damaged_report_is_said_and_breaks_nothing(tmp_path: Path) -> None:
    an_audit(tmp_path, report={"what": "base", "variants": "none"})

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        await until(pilot, lambda: "This report is damaged" in shown(app))

    play(story, tmp_path, size=WIDE)


def test_a_run_without_an_adapter_is_not_audited(tmp_path: Path) -> None:
    an_audit(tmp_path)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("o")
        await until(pilot, lambda: "✓ audit-base" in shown(app))
        await pilot.press("a")
        await until(pilot, lambda: "Only a training run has an adapter to audit" in shown(app))

    play(story, tmp_path, size=WIDE)


def test_curves_of_a_report() -> None:
    assert lane_curves(race_report())[1] == ([1.0, 2.0, 3.0], [4.0, 3.0, 2.2])
    assert block_curve(base_report()) == ([0.0, 1.0], [0.1, 0.2])
    assert lane_curves(base_report()) == [] and block_curve(race_report()) == ([], [])
