import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput, StudioError
from studio.core.events import Failed, Finished, Paused, Started, StepDone
from studio.runs.control import request, requested, withdraw
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.log import read_events
from studio.runs.process import mark_of, mark_to_json, read_mark
from studio.runs.status import Status, run_status
from studio.runs.store import remove_run
from studio.runs.supervise import child_environment, launch, resume, stop
from tests.fakes.runs import MODULE, fake_environment, launch_fake, make_run, wait_for, write_log


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path)


def _steps(paths: RunPaths) -> list[int]:
    return [event.step for event in read_events(paths.events) if isinstance(event, StepDone)]


def test_a_run_from_launch_to_end(paths: RunPaths) -> None:
    handle = launch_fake(paths, steps=5)
    assert handle.process.wait(60) == 0
    assert run_status(paths) is Status.finished
    assert _steps(paths) == [1, 2, 3, 4, 5]
    assert (paths.adapter / "adapter_config.json").is_file()
    assert paths.output.read_text() == ""


def test_launch_returns_when_the_worker_holds_the_run(paths: RunPaths) -> None:
    handle = launch_fake(paths, steps=1000, seconds=0.05)
    assert lock_held(paths.lock)
    worker = read_mark(paths.process)
    assert worker is not None
    assert worker[0].pid == handle.pid
    assert run_status(paths).live
    with pytest.raises(StudioError, match="already has a worker"):
        launch_fake(paths)
    with pytest.raises(BadInput, match="cannot be resumed while its worker lives"):
        resume(paths, module=MODULE)
    with pytest.raises(BadInput, match="stop it first"):
        remove_run(paths)
    assert stop(paths, 60) is Status.stopped
    assert handle.process.wait(60) == 0


def test_the_child_has_no_tie_to_its_parent(paths: RunPaths) -> None:
    seen: dict[str, Any] = {}

    def popen(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        seen.update(options, command=command)
        return subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)

    launch(paths, "a.module", popen=popen, environment={"WANDB_MODE": "mine"})
    assert seen["command"] == [sys.executable, "-m", "a.module", str(paths.root)]
    assert seen["start_new_session"] is True
    assert seen["stdin"] is subprocess.DEVNULL
    assert seen["stdout"] == seen["stderr"]
    assert isinstance(seen["stdout"], int)
    assert seen["env"]["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert seen["env"]["WANDB_MODE"] == "mine"
    assert seen["env"]["PYTHONSAFEPATH"] == "1"
    assert paths.output.stat().st_mode & 0o777 == 0o600


def test_a_child_that_cannot_begin_leaves_its_words_and_a_crashed_run(paths: RunPaths) -> None:
    handle = launch(paths, "no.such.module", environment=fake_environment())
    assert handle.process.wait(60) != 0
    assert run_status(paths) is Status.crashed
    assert "no.such.module" in paths.output.read_text() or "No module named" in paths.output.read_text()


def test_a_program_that_cannot_be_started_is_an_error_not_a_traceback(paths: RunPaths) -> None:
    def popen(*_: Any, **__: Any) -> "subprocess.Popen[bytes]":
        raise OSError("no processes left")

    with pytest.raises(StudioError, match="no processes left"):
        launch(paths, MODULE, popen=popen)


def test_a_library_in_the_current_folder_is_not_imported(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = paths.root.parent
    (trap / "filelock.py").write_text("raise SystemExit('trapped')")
    (paths.root / "filelock.py").write_text("raise SystemExit('trapped')")
    monkeypatch.chdir(trap)
    assert launch_fake(paths, steps=1).process.wait(60) == 0


def test_a_relative_search_path_still_means_the_same_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    path = child_environment({"PYTHONPATH": "mine"})["PYTHONPATH"].split(os.pathsep)
    assert path[0] == str(tmp_path / "mine")
    assert str(Path(__file__).resolve().parents[2]) in path


def test_a_failure_of_the_job_is_told_with_its_advice(paths: RunPaths) -> None:
    assert launch_fake(paths, fail_at=3).process.wait(60) == 1
    assert run_status(paths) is Status.failed
    last = read_events(paths.events)[-1]
    assert isinstance(last, Failed)
    assert (last.failure, last.step) == ("nonfinite_loss", 2)
    assert "Traceback" in paths.output.read_text()


def test_a_stopped_run_goes_on_where_it_was(paths: RunPaths) -> None:
    handle = launch_fake(paths, steps=400, seconds=0.02)
    wait_for(lambda: len(_steps(paths)) >= 3)
    assert stop(paths, 60) is Status.stopped
    handle.process.wait(60)
    before = _steps(paths)[-1]
    resumed = resume(paths, module=MODULE, environment=fake_environment(steps=before + 3))
    assert resumed.process.wait(60) == 0
    assert run_status(paths) is Status.finished
    starts = [event.resumed_from for event in read_events(paths.events) if isinstance(event, Started)]
    assert starts == [0, before]
    assert _steps(paths) == list(range(1, before + 4))
    with pytest.raises(BadInput, match="finished"):
        resume(paths, module=MODULE)


def test_a_stale_stop_request_does_not_end_a_resumed_run(paths: RunPaths) -> None:
    write_log(paths, Started(at=1.0, job="train"))
    request(paths, "stop")
    request(paths, "pause")
    assert resume(paths, module=MODULE, environment=fake_environment(steps=2)).process.wait(60) == 0
    assert not requested(paths, "stop")
    assert run_status(paths) is Status.finished


def test_pausing_and_going_on(paths: RunPaths) -> None:
    handle = launch_fake(paths, steps=1000, seconds=0.01)
    request(paths, "pause")
    wait_for(lambda: run_status(paths) is Status.paused)
    halted = _steps(paths)[-1]
    time.sleep(0.1)
    assert _steps(paths)[-1] == halted
    withdraw(paths, "pause")
    wait_for(lambda: _steps(paths)[-1] > halted)
    assert run_status(paths) is Status.running
    assert [event.paused for event in read_events(paths.events) if isinstance(event, Paused)] == [True, False]
    assert stop(paths, 60) is Status.stopped
    handle.process.wait(60)


def test_stop_without_grace_only_asks(paths: RunPaths) -> None:
    handle = launch_fake(paths, steps=1000, seconds=0.05, deaf=1)
    wait_for(lambda: _steps(paths))  # so it catches signals by now
    assert stop(paths) is Status.stopping
    assert handle.process.poll() is None
    assert stop(paths, 0.1) is Status.failed
    last = read_events(paths.events)[-1]
    assert isinstance(last, (Failed, Finished))
    handle.process.wait(60)


_DEAF = """
import signal, sys, time
from pathlib import Path
from studio.core.events import Started
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker

with Worker(RunPaths(Path(sys.argv[1]))) as worker:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    worker.emit(Started, job="train")
    time.sleep(600)
"""


def test_a_worker_deaf_to_everything_is_killed_in_the_end(paths: RunPaths) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _DEAF, str(paths.root)], env={**os.environ, **fake_environment()}, start_new_session=True
    )
    wait_for(lambda: run_status(paths) is Status.running)
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 1.0
        time.sleep(0.01)

    assert stop(paths, 3.0, clock=lambda: now[0], sleep=sleep) is Status.crashed
    assert child.wait(60) == -signal.SIGKILL
    assert now[0] >= 13.0


def test_stopping_a_run_never_signals_a_process_that_is_not_its_worker(paths: RunPaths) -> None:
    """A worker from another machine, on a shared disk: our process with the same number must not be touched."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    holder = subprocess.Popen(
        [sys.executable, "-c", _DEAF, str(paths.root)], env={**os.environ, **fake_environment()}, start_new_session=True
    )
    try:
        wait_for(lambda: run_status(paths) is Status.running)
        mark = mark_of(bystander.pid)
        assert mark is not None
        text = mark_to_json(mark)
        paths.process.write_text(text.replace(f'"{mark.host}"', '"another-machine"'))
        now = [0.0]

        def sleep(seconds: float) -> None:
            now[0] += 5.0

        assert stop(paths, 1.0, clock=lambda: now[0], sleep=sleep) is Status.stopping
        assert bystander.poll() is None
        assert holder.poll() is None
    finally:
        for child in (bystander, holder):
            child.kill()
            child.wait(60)


def test_stopping_what_is_not_alive_does_nothing(paths: RunPaths) -> None:
    write_log(paths, Started(at=1.0, job="train"), Finished(at=2.0, outcome="done"))
    assert stop(paths, 5) is Status.finished
    assert not requested(paths, "stop")
