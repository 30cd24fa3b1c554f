"""A run that is resumed by itself after a crash: real workers, really killed."""

import signal
import threading
from pathlib import Path

import pytest

from studio.core.events import Failed, Finished, Started, StepDone
from studio.core.recipe import Recipe
from studio.launch.guard import Guard
from studio.launch.start import start
from studio.runs.control import request
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.process import read_mark, send_signal
from studio.runs.restarts import read_guard
from studio.runs.status import Status, run_status
from studio.runs.summary import summary_of
from studio.runs.supervise import stop
from studio.runs.watch import read_history
from tests.fakes.runs import MODULE, fake_environment, launch_fake, make_run, wait_for, write_log


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "question {n}", "completion": "answer {n}"}}\n' for n in range(20)))
    return Recipe(name="guarded").with_("data.path", str(rows)).with_("device.device", "cpu")


class Watched:
    """A guard at work in a thread of the test."""

    def __init__(self, paths: RunPaths, times: int, first_pause: float = 0.05) -> None:
        self.said: list[str] = []
        guard = Guard(paths, times, MODULE, first_pause=first_pause, sleep=lambda seconds: self.over.wait(0.01) or None)
        self.over = threading.Event()
        self.thread = threading.Thread(target=lambda: self.said.append(guard.watch()), daemon=True)
        self.thread.start()

    def words(self) -> str:
        self.thread.join(60)
        (said,) = self.said
        return said


def settings(monkeypatch: pytest.MonkeyPatch, **values: float) -> None:
    for name, value in fake_environment(**values).items():
        monkeypatch.setenv(name, value)


def kill(paths: RunPaths) -> None:
    worker = read_mark(paths.process)
    assert worker is not None
    assert send_signal(worker[0], signal.SIGKILL)


def steps(paths: RunPaths) -> History | None:
    history = read_history(paths)
    return history if history.last_step else None


def test_a_killed_run_goes_on_and_says_so(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings(monkeypatch, steps=1_000_000, seconds=0.02)
    paths = make_run(tmp_path, recipe=recipe)
    launch_fake(paths, steps=1_000_000, seconds=0.02)
    wait_for(lambda: steps(paths))
    watched = Watched(paths, 2)
    wait_for(lambda: read_guard(paths))
    kill(paths)
    history = wait_for(lambda: (found := read_history(paths)).restarted and found)
    (told,) = history.restarted
    assert (told.number, told.of) == (1, 2)
    assert "crashed after step" in told.because
    assert any("restarted by itself, 1 of 2" in warning.message for warning in history.warnings)
    wait_for(lambda: run_status(paths) is Status.running)
    wait_for(lambda: (guard := read_guard(paths)) and not guard.words)
    guard = summary_of(paths, history, Status.running)["guard"]
    assert (guard["used"], guard["times"], guard["words"]) == (1, 2, "")
    assert stop(paths, 60) is Status.stopped
    assert watched.words() == ""


def test_the_same_end_at_the_same_step_is_not_tried_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(monkeypatch, steps=9, die_at=4, killed=1)
    paths = make_run(tmp_path, recipe=recipe)
    launch_fake(paths, steps=9, die_at=4, killed=1)
    assert "came again at step 3" in Watched(paths, 5).words()
    assert run_status(paths) is Status.crashed
    assert [event.number for event in read_history(paths).restarted] == [1]


@pytest.mark.parametrize("failure", ["bad_input", "nonfinite_loss", "out_of_memory", "device_assert"])
def test_an_error_of_recipe_or_data_is_not_tried_again(recipe: Recipe, tmp_path: Path, failure: str) -> None:
    paths = make_run(tmp_path, recipe=recipe)
    failed = Failed(at=2.0, failure=failure, message="no", advice="")
    write_log(paths, Started(at=1.0, job="train"), failed)
    assert Watched(paths, 5).words() == f"{failure} is no accident: it would come again"
    write_log(paths, Started(at=1.0, job="train"), Finished(at=2.0, outcome="done"))
    assert Watched(paths, 5).words() == ""


def test_a_stop_ends_the_wait_for_a_restart(recipe: Recipe, tmp_path: Path) -> None:
    paths = make_run(tmp_path, recipe=recipe)
    step = StepDone(at=2.0, step=7, loss=1.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
    lost = Failed(at=3.0, failure="gpu_lost", message="gone", advice="")
    write_log(paths, Started(at=1.0, job="train"), step, lost)
    watched = Watched(paths, 5, first_pause=1000.0)
    wait_for(lambda: (guard := read_guard(paths)) and guard.words)
    assert run_status(paths) is Status.restarting
    words = summary_of(paths, read_history(paths), Status.restarting)["guard"]["words"]
    assert words == "gpu_lost after step 7: it is restarted in 16 min 40 s (1 of 5)" or "10 min" in words
    request(paths, "stop")
    assert run_status(paths) is Status.stopping
    assert watched.words() == "it was asked to stop"
    assert run_status(paths) is Status.failed


@pytest.mark.slow
def test_a_launch_starts_the_guard_which_outlives_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = fake_environment(steps=1_000_000, seconds=0.02)
    paths = start(recipe, tmp_path / "runs", module=MODULE, restarts=1, environment=environment)
    wait_for(lambda: (guard := read_guard(paths)) and guard.alive)
    wait_for(lambda: steps(paths))
    kill(paths)
    wait_for(lambda: run_status(paths) is Status.restarting)
    wait_for(lambda: read_history(paths).restarted)
    assert stop(paths, 60) is Status.stopped
    wait_for(lambda: not read_guard(paths).alive)  # type: ignore[union-attr]
