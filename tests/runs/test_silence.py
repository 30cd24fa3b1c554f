"""A training that tells nothing for long: what its watchdog says, and what readers of its log say."""

import time
from pathlib import Path

import pytest

from studio.core.events import Evaluated, Paused, Started, StepDone, Warned
from studio.runs import silence
from studio.runs.history import SILENT, History
from studio.runs.log import read_events
from studio.runs.silence import Watchdog, limit_seconds, silent_seconds
from studio.runs.status import Status
from studio.runs.summary import summary_of
from studio.tui.feed import Glance, silence_of
from tests.fakes.runs import LiveWorker, make_run, wait_for


def _step(step: int, seconds: float, at: float = 0.0) -> StepDone:
    return StepDone(at=at, step=step, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=9, seconds=seconds)


@pytest.mark.parametrize(
    ("steps", "limit"), [((), 1800.0), ((1.0,), 600.0), ((60.0, 60.0, 9000.0), 1200.0), ((0.1,) * 20, 600.0)]
)
def test_how_long_a_silence_is_follows_from_the_steps(steps: tuple[float, ...], limit: float) -> None:
    assert limit_seconds(steps) == limit


def test_the_watchdog_warns_once_of_each_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        dog = Watchdog(worker, clock=lambda: now)

        def after(seconds: float) -> int:
            nonlocal now
            now += seconds
            dog.look()
            return sum(isinstance(event, Warned) for event in read_events(paths.events))

        worker.emit(Started, job="train")
        assert [after(0), after(1700)] == [0, 0]
        worker.emit(StepDone, step=1, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=9, seconds=2.0)
        assert [after(0), after(599), after(2), after(5000)] == [0, 0, 1, 1]
        worker.emit(Evaluated, step=1, loss=1.0, loss_tokens=9, rows=1, seconds=1.0)
        assert [after(0), after(599), after(2)] == [1, 1, 2]
        worker.emit(Paused, step=1, paused=True)
        assert [after(0), after(90_000)] == [2, 2]  # it waits because it was asked to
    told = [event for event in read_events(paths.events) if isinstance(event, Warned)]
    assert {event.topic for event in told} == {SILENT}
    assert "nothing was heard of this training for 10 min" in told[0].message
    assert "test_silence.py" in capfd.readouterr().err  # where its threads stand


def test_a_hanging_training_is_noticed_while_its_main_thread_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "_LEAST_SECONDS", 0.05)
    monkeypatch.setattr(silence, "_POLL_SECONDS", 0.01)
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="train")
        worker.emit(StepDone, step=1, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=9, seconds=0.001)
        with Watchdog(worker):
            wait_for(lambda: any(isinstance(event, Warned) for event in read_events(paths.events)))


def _heard(*events: object) -> History:
    history = History()
    history.fold([Started(at=100.0, job="train"), _step(1, 2.0, at=200.0), *events])  # type: ignore[list-item]
    return history


def test_a_warning_of_silence_is_no_sign_of_life() -> None:
    history = _heard(Warned(at=900.0, topic=SILENT, message="nothing was heard"))
    assert silent_seconds(history, Status.running, 1000.0) == 800.0
    assert silent_seconds(_heard(Warned(at=900.0, topic="x", message="y")), Status.running, 1000.0) is None


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.running])
def test_only_a_run_that_should_tell_something_is_silent(status: Status) -> None:
    assert silent_seconds(_heard(), status, 9999.0) is None


def test_a_silent_run_is_said_to_be_one(tmp_path: Path) -> None:
    history = _heard()
    summary = summary_of(make_run(tmp_path), history, Status.running, now=1000.0)
    assert summary["silent_seconds"] == 800.0
    assert summary_of(make_run(tmp_path, "b"), history, Status.running, now=210.0)["silent_seconds"] is None
    glance = Glance(Status.running, history, [], 0, behind=False)
    assert silence_of(glance, 1000.0).startswith("silent for 13 min 20 s: it may hang")
    assert silence_of(Glance(Status.running, history, [], 0, behind=True), 1000.0) == ""
    assert silence_of(glance, 210.0) == ""
    assert silence_of(glance, time.time()) != ""
