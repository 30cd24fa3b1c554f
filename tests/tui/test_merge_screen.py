"""Choosing a merge, watching it and what comes after it; nothing is started that was not asked for."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from studio.core.errors import BadInput
from studio.core.events import Failed, Finished, Phase, RunEvent, Saved, Started, Warned
from studio.core.recipe import Recipe
from studio.probe.adapter_folder import Checkpoint
from studio.runs.atomic import write_whole
from studio.runs.chain import next_run
from studio.runs.control import requested
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest, MergeRequest
from studio.runs.status import Status, run_status
from studio.tui.app import StudioApp
from studio.tui.merging import MergeFacts
from studio.tui.panels.merge_lists import PickMany, PickOne
from studio.tui.panels.runs_list import RunsList
from studio.tui.screens.dialogs import Confirm
from studio.tui.screens.merge import MergeScreen, merge_screen_for
from studio.tui.screens.merge_progress import MergeProgressScreen
from studio.tui.services import Services
from tests.fakes.runs import LiveWorker, write_log
from tests.tui.stories import (
    BOTH,
    HOSTILE,
    NARROW,
    SELDOM,
    assert_harmless,
    given,
    make_run,
    play,
    settle,
    shown,
    until,
)

SIXTEEN_GB = 16 * 10**9


class Fake:
    """Notes what is started; each start makes a run that has ended as it should."""

    def __init__(self, root: Path, *, refuses: str = "", why_not: str = "", ends: str = "done") -> None:
        self.root, self.refuses, self.why_not, self.ends = root, refuses, why_not, ends
        self.started: list[MergeRequest] = []

    def services(self) -> Services:
        return given(merge_facts=self.facts, start=self.start)

    def facts(self, paths: RunPaths) -> MergeFacts:
        checkpoints = (Checkpoint(20, Path("/c/step-20"), 0.9), Checkpoint(40, Path("/c/step-40"), 1.1),
                       Checkpoint(60, None, 1.2))  # fmt: skip
        recipe = Recipe().with_("model.base", f"some/base{HOSTILE}")
        return MergeFacts(paths, recipe, checkpoints, 270 * 10**6, 8 * 10**9, self.why_not)

    def start(self, request: MergeRequest, root: Path) -> RunPaths:
        if self.refuses:
            raise BadInput(self.refuses)
        self.started.append(request)
        return merge_run(self.root, request, self.ends)


FOUND = {
    "loss": {"tokens": 282, "mean_kl": 0.0069, "same_top_token": 0.975},
    "golden": {"conversations": 5, "tokens": 293, "ends_with_stop": True, "bos_doubled": False, "composes": False},
}


def merge_run(
    root: Path, request: MergeRequest | ExportRequest, ends: str = "done", *, result: dict[str, object] | None = None
) -> RunPaths:
    paths = make_run(root, f"job-{len(list((root / 'runs').glob('job-*')))}")
    write_job(paths, request)
    events: list[RunEvent] = [
        Started(at=1.0, job="merge", model="some/base"),
        Phase(at=2.0, name="merging", fraction=0.5, detail="model-00001-of-00002.safetensors"),
    ]
    if ends == "done":
        events.append(Warned(at=3.0, topic="merge", message=f"a warning {HOSTILE}"))
        events.append(Saved(at=4.0, what="merged", path=request.out))
        events.append(Finished(at=5.0, outcome="done", result=result or {}))
    elif ends == "stopped":
        events.append(Finished(at=3.0, outcome="stopped"))
    else:
        events.append(Failed(at=3.0, failure="disk_full", message="the disk is full", advice="free some space"))
    write_log(paths, *events)
    write_whole(paths.report, json.dumps(REPORT))
    return paths


REPORT = {
    "merged": "/models/out", "base": f"some/base{HOSTILE}", "onto": "original", "untied": False, "tensors": 200,
    "recomputed_tensors": 12,
    "closeness": {"tokens": 120, "mean_kl": 0.00012, "largest_kl": 0.003, "same_top_token": 0.995,
                  "largest_logit_difference": 0.04},
    "side_by_side": [{"prompt": "Who?", "separate": f"The tuned one.{HOSTILE}", "merged": "The tuned one."}],
}  # fmt: skip


def screen(tmp_path: Path, fake: Fake) -> MergeScreen:
    return MergeScreen(make_run(tmp_path, "trained"), services=fake.services(), poll_seconds=SELDOM)


async def opened(pilot: Pilot[None], app: StudioApp, shown_screen: MergeScreen | MergeProgressScreen) -> None:
    await app.push_screen(shown_screen)
    await settle(pilot)


@BOTH
def test_the_choices_are_seen_at_a_glance(tmp_path: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, screen(tmp_path, Fake(tmp_path)))
        text = shown(app)
        for words in ("held-out 0.900  best", "step 60", "the run's adapter", "original 16-bit base", "KL .0006",
                      "16-bit model folder", "0.27 GB", "GGUF Q4_K_M"):  # fmt: skip
            assert words in text
        assert app.screen.query_one("#checkpoints", PickOne).chosen == 0
        assert "free disk" in text
        assert str(tmp_path)[:40] in text, "the folder too, and at 80x24"
        assert "(•) step 20" in text
        assert_harmless(app)

    play(story, tmp_path, size=size)


def test_it_starts_what_is_chosen(tmp_path: Path) -> None:
    fake = Fake(tmp_path)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, screen(tmp_path, fake))
        app.screen.query_one("#onto", PickOne).highlighted = 1
        await pilot.press("tab", "tab", "down", "space", "end", "space")
        assert "[x] 4-bit folder" in shown(app)
        assert "[ ] 8-bit folder" in shown(app)
        app.screen.query_one("#merge-out", Input).value = str(tmp_path / "models" / "mine")
        await pilot.press("r")
        await settle(pilot)
        assert isinstance(app.screen, MergeProgressScreen)
        (merge,) = fake.started
        assert merge.then == ("nf4", "q4_k_m")
        assert (merge.onto, merge.checkpoint, merge.out) == ("dequantized", "/c/step-20", str(tmp_path / "models/mine"))

    play(story, tmp_path)


def test_the_base_as_4_bits_left_it_is_offered_for_qlora_only(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    looked = fake.facts
    fake.facts = lambda paths: replace(looked(paths), recipe=Recipe(method="lora"))  # type: ignore[method-assign]

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, screen(tmp_path, fake))
        assert "4 bits left it" not in shown(app)
        assert "(lora run): its own 16-bit weights" in shown(app)
        await pilot.press("tab")
        assert app.focused is app.screen.query_one("#outputs"), "one base is no choice"
        await pilot.press("r")
        await until(pilot, lambda: fake.started)
        assert fake.started[0].onto == "original"

    play(story, tmp_path)


def test_a_damaged_checkpoint_is_shown_as_one_and_not_merged(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    looked = fake.facts

    def facts(paths: RunPaths) -> MergeFacts:
        found = looked(paths)
        return replace(found, checkpoints=(replace(found.checkpoints[0], damage="it is gone"), *found.checkpoints[1:]))

    fake.facts = facts  # type: ignore[method-assign]

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, screen(tmp_path, fake))
        assert "step 20     damaged: it is gone" in shown(app)
        assert app.screen.query_one("#checkpoints", PickOne).chosen == 1, "the best of the others"
        app.screen.query_one("#checkpoints", PickOne).highlighted = 0
        await pilot.press("r")
        await until(pilot, lambda: "The checkpoint of step 20 is damaged: it is gone." in shown(app))
        assert fake.started == []

    play(story, tmp_path)


def test_the_runs_own_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    fake = Fake(tmp_path)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, screen(tmp_path, fake))
        app.screen.query_one("#checkpoints", PickOne).highlighted = 2
        await pilot.press("r")
        await settle(pilot)
        assert fake.started[0].checkpoint == ""

    play(story, tmp_path)


@pytest.mark.parametrize("fault", ["refuses", "why_not"])
def test_a_refusal_is_shown_and_nothing_starts(tmp_path: Path, fault: str) -> None:
    fake = Fake(tmp_path, **{fault: f"no such base {HOSTILE}"})

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, screen(tmp_path, fake))
        await pilot.press("r")
        await settle(pilot)
        assert isinstance(app.screen, MergeScreen)
        assert "no such base" in shown(app)
        assert fake.started == []
        assert_harmless(app)

    play(story, tmp_path)


def test_the_merged_model_is_always_made(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, screen(tmp_path, Fake(tmp_path)))
        outputs = app.screen.query_one("#outputs", PickMany)
        outputs.turn("merged")
        outputs.turn("int8")
        assert outputs.chosen == ["merged", "int8"]

    play(story, tmp_path)


@BOTH
def test_the_result_is_a_table_with_paths_and_words(tmp_path: Path, size: tuple[int, int]) -> None:
    paths = merge_run(tmp_path, MergeRequest("/a", "b", "/models/out"))
    made = merge_screen_for(paths, services=Services(), poll_seconds=SELDOM)
    assert isinstance(made, MergeProgressScreen)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, made)
        text = shown(app)
        for words in (
            "/models/out",
            "all 200 read back, 12 made again",
            "every bit equal",
            "mean 0.00012",
            "99.5%",
            "base + adapter",
        ):
            assert words in text
        assert "Try it" in text
        assert "x Stop" not in text, "nothing runs any more"
        assert_harmless(app)

    play(story, tmp_path, size=size)


def test_a_failed_merge_says_why_and_what_is_not_made(tmp_path: Path) -> None:
    merge = merge_run(tmp_path, MergeRequest("/a", "b", "/models/out", then=("nf4",)), ends="failed")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, MergeProgressScreen(merge, services=Services(), poll_seconds=SELDOM))
        assert "the disk is full free some space" in shown(app)
        assert "is not made" in shown(app)

    play(story, tmp_path)


def test_a_merge_that_was_killed_says_what_to_do_and_is_resumed_here(tmp_path: Path) -> None:
    merge = merge_run(tmp_path, MergeRequest("/a", "b", "/models/out"))
    whole = merge.events.read_bytes()
    merge.events.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    resumed: list[RunPaths] = []

    def resume(paths: RunPaths) -> None:
        resumed.append(paths)
        if len(resumed) == 1:
            raise BadInput(f"not now {HOSTILE}")
        merge.events.write_bytes(whole)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        made = MergeProgressScreen(merge, services=given(resume=resume), poll_seconds=SELDOM)
        await opened(pilot, app, made)
        assert "crashed: the process ended without saying why. R goes on" in " ".join(shown(app).split())
        assert "R Resume" in shown(app) and "Try it" not in shown(app)
        await pilot.press("R")
        await until(pilot, lambda: "not now" in shown(app))
        assert_harmless(app)
        await pilot.press("R")
        await until(pilot, lambda: len(resumed) == 2)
        made._look()
        await until(pilot, lambda: "every bit equal" in shown(app))
        assert "R Resume" not in shown(app) and "t Try it" in shown(app)

    play(story, tmp_path)
    assert resumed == [merge, merge]


def test_exports_follow_the_merge_wherever_the_screen_is(tmp_path: Path) -> None:
    exports = [ExportRequest("/m", f"/m-{form}", form) for form in ("nf4", "int8")]
    merge = merge_run(tmp_path, MergeRequest("/a", "b", "/m", then=("nf4", "int8", "f16")))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        made = merge_screen_for(merge, services=Services(), poll_seconds=SELDOM)
        assert isinstance(made, MergeProgressScreen)
        await opened(pilot, app, made)
        assert "f16     waits" in shown(app)
        failed, stopped = merge_run(tmp_path, exports[0], "failed"), merge_run(tmp_path, exports[1], "stopped")
        merge.next.write_text(failed.name)
        made._look()
        await settle(pilot)
        assert "nf4     failed: the disk is full" in shown(app)
        assert "int8    waits" in shown(app)
        failed.next.write_text(stopped.name)
        made._look()
        await settle(pilot)
        assert "int8    stopped" in shown(app)
        assert "f16     is not made: the one before was stopped" in shown(app)
        done = merge_run(tmp_path, ExportRequest("/m", "/m.gguf", "f16"), result=FOUND)
        stopped.next.write_text(done.name)
        made._look()
        await settle(pilot)
        assert "f16     finished in 4 s  /m.gguf" in shown(app)
        assert "        tokens: 5 conversations read the same" in shown(app)
        assert "\n         tokenizer and in llama.cpp" in shown(app), "what wraps stays in its column"
        assert "        a warning" in shown(app)

    play(story, tmp_path, size=NARROW)


def test_a_running_merge_is_stopped_after_a_question(tmp_path: Path) -> None:
    paths = make_run(tmp_path, "job")
    write_job(paths, MergeRequest("/a", "b", "/m"))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(
            pilot, app, MergeProgressScreen(paths, services=Services(), poll_seconds=SELDOM, now=lambda: 1075.0)
        )
        assert "merging model.safetensors 25%  1 min 15 s" in shown(app), "what takes long is seen to live"
        assert "x Stop" in shown(app)
        await pilot.press("x")
        assert isinstance(app.screen, Confirm)
        await pilot.press("y")
        await pilot.pause()
        assert requested(paths, "stop")

    with LiveWorker(paths, clock=lambda: 1000.0) as worker:
        worker.emit(Started, job="merge")
        worker.emit(Phase, name="merging", fraction=0.25, detail="model.safetensors")
        play(story, tmp_path)
        worker.emit(Finished, outcome="stopped")


def test_keys_of_the_run_and_of_the_list_lead_here(tmp_path: Path) -> None:
    run = make_run(tmp_path, "trained")
    with LiveWorker(run) as worker:
        worker.emit(Started, job="train")
        worker.emit(Finished, outcome="done", step=1)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("m")
        await settle(pilot)
        assert not isinstance(app.screen, MergeScreen)
        assert "ended without an adapter" in shown(app)
        await pilot.press("escape", "o")
        await until(pilot, lambda: app.screen.query(RunsList) and len(app.screen.query_one(RunsList).rows) == 1)
        assert "m Merge" not in shown(app)
        await pilot.press("m")
        await settle(pilot)
        assert not isinstance(app.screen, MergeScreen)
        run.adapter.mkdir()
        (run.adapter / "adapter_config.json").write_text("{}")
        await settle(pilot)
        await pilot.press("enter")
        await until(pilot, lambda: "m Merge" in shown(app))
        await pilot.press("m")
        await settle(pilot)
        assert isinstance(app.screen, MergeScreen)
        await pilot.press("escape", "escape", "o")
        await settle(pilot)
        await pilot.press("m")
        await settle(pilot)
        assert isinstance(app.screen, MergeScreen)

    play(story, tmp_path, open_run=run)


def test_the_end_of_a_training_that_still_ran_is_noticed(tmp_path: Path) -> None:
    fake = Fake(tmp_path, why_not="it has no adapter yet")
    run = make_run(tmp_path, "trained")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, MergeScreen(run, services=fake.services(), poll_seconds=0.02))
        assert "has no adapter yet" in shown(app)
        app.screen.query_one("#checkpoints", PickOne).highlighted = 1
        app.screen.query_one("#outputs", PickMany).turn("q8_0")
        app.screen.query_one("#merge-out", Input).focus()
        fake.why_not = ""
        run.adapter.mkdir()
        await until(pilot, lambda: "cannot be merged" not in shown(app))
        assert app.screen.query_one("#checkpoints", PickOne).chosen == 1, "what was chosen stays"
        assert app.screen.query_one("#outputs", PickMany).chosen == ["merged", "q8_0"]
        assert app.focused is app.screen.query_one("#merge-out")
        app.set_focus(app.screen.query_one("#onto"))
        await pilot.press("r")
        await settle(pilot)
        assert len(fake.started) == 1

    play(story, tmp_path)


@pytest.mark.slow
def test_what_was_chosen_is_made_after_the_studio_was_left(tmp_path: Path) -> None:
    from tests.jobs.merge_cases import ATTENTION, make_adapter, make_base  # torch, here only

    base, run = make_base(tmp_path / "base", "llama"), make_run(tmp_path, "trained")
    make_adapter(run.adapter, base, target_modules=ATTENTION)
    out = tmp_path / "models" / "mine [1]"

    def facts(paths: RunPaths) -> MergeFacts:
        recipe = Recipe().with_("model.base", str(base))
        return MergeFacts(paths, recipe, (Checkpoint(1, None, 1.0),), 10**6, None)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app, MergeScreen(run, services=given(merge_facts=facts), poll_seconds=0.5))
        for form in ("nf4", "int8"):
            app.screen.query_one("#outputs", PickMany).turn(form)
        app.screen.query_one("#merge-out", Input).value = str(out)
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, MergeProgressScreen))

    play(story, tmp_path)
    merge = next((tmp_path / "runs").glob("merge-*"))
    deadline = time.monotonic() + 120
    while (chain := _chain(RunPaths(merge))) and (len(chain) < 3 or run_status(chain[-1]).live):
        assert time.monotonic() < deadline, (merge / "output.log").read_text()
        time.sleep(0.2)
    assert [run_status(one) for one in chain] == [Status.finished] * 3
    assert all((tmp_path / "models" / f"mine [1]-{form}" / "model.safetensors").is_file() for form in ("nf4", "int8"))


def _chain(paths: RunPaths) -> list[RunPaths]:
    following = next_run(paths)
    return [paths, *(_chain(following) if following else [])]
