import errno
import json
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest

from studio.core.errors import BadInput, JobFailed
from studio.core.events import Failed, Finished, Paused, Phase, RunEvent, Started, StepDone
from studio.runs.control import request, requested
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.log import EventWriter, read_events
from studio.runs.process import is_alive, read_mark
from studio.runs.status import Status, run_status
from studio.runs.worker import RunBusy, Worker
from tests.fakes.runs import make_run, write_log


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path)


def _last(paths: RunPaths) -> RunEvent:
    return read_events(paths.events)[-1]


def _failed(paths: RunPaths) -> Failed:
    event = _last(paths)
    assert isinstance(event, Failed)
    return event


def test_a_worker_holds_the_run_says_who_it_is_and_leaves_it_free(paths: RunPaths) -> None:
    with Worker(paths, clock=lambda: 5.0) as worker:
        worker.emit(Started, job="train")
        assert lock_held(paths.lock)
        mark = read_mark(paths.process)
        assert mark is not None
        assert mark[0].pid == os.getpid()
        assert is_alive(mark[0])
        assert run_status(paths) is Status.running
        worker.emit(Finished, outcome="done")
    assert worker.exit_code == 0
    assert not lock_held(paths.lock)
    assert run_status(paths) is Status.finished
    assert [event.at for event in read_events(paths.events)] == [5.0, 5.0]


def test_everything_a_worker_writes_is_for_its_owner_only(paths: RunPaths) -> None:
    with Worker(paths) as worker:
        worker.emit(Finished, outcome="done")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths.root.iterdir() if path.is_file()}
    assert set(modes) == {"recipe.toml", "events.jsonl", "process.json", "worker.lock"}
    assert set(modes.values()) == {0o600}


def test_a_second_worker_is_refused_and_the_first_one_undisturbed(paths: RunPaths) -> None:
    with Worker(paths) as first:
        first.emit(Started, job="train")
        before = paths.process.read_text(), paths.events.read_text()
        with pytest.raises(RunBusy, match="already has a worker"), Worker(paths, wait_seconds=0.1):
            pytest.fail("two workers held one run")
        assert run_job(paths.root, lambda worker: None) == 1
        assert (paths.process.read_text(), paths.events.read_text()) == before
        assert lock_held(paths.lock)
        first.emit(Finished, outcome="stopped")
    assert first.exit_code == 0


def _fails(error: BaseException, paths: RunPaths, **options: object) -> Failed:
    with Worker(paths, **options) as worker:  # type: ignore[arg-type]
        worker.emit(Started, job="train")
        worker.emit(StepDone, step=7, loss=1.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
        raise error
    assert worker.exit_code == 1
    assert not lock_held(paths.lock)
    assert run_status(paths) is Status.failed
    return _failed(paths)


def test_a_named_failure_becomes_the_terminal_event(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    event = _fails(JobFailed("nonfinite_loss", "the loss is nan", "lower the learning rate"), paths)
    assert (event.failure, event.message, event.advice) == (
        "nonfinite_loss",
        "the loss is nan",
        "lower the learning rate",
    )
    assert event.step == 7
    assert "JobFailed: the loss is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "failure", "word"),
    [
        (ZeroDivisionError("a fault"), "error", "ZeroDivisionError: a fault"),
        (BadInput("the data changed"), "bad_input", "the data changed"),
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (MemoryError(), "out_of_memory", "memory"),
        (SystemExit(3), "error", "SystemExit"),
    ],
)
def test_every_other_end_is_named_too(paths: RunPaths, error: BaseException, failure: str, word: str) -> None:
    event = _fails(error, paths)
    assert event.failure == failure
    assert word in event.message
    assert event.advice


def test_a_job_explains_the_errors_of_its_libraries(paths: RunPaths) -> None:
    def explain(error: BaseException) -> JobFailed | None:
        return JobFailed("out_of_memory", "the card is full", "lower rank") if isinstance(error, RuntimeError) else None

    assert _fails(RuntimeError("CUDA out of memory"), paths, explain=explain).failure == "out_of_memory"


def test_an_explanation_that_fails_does_not_hide_the_error(paths: RunPaths) -> None:
    def explain(error: BaseException) -> JobFailed | None:
        raise ImportError("no torch here")

    event = _fails(RuntimeError("the error"), paths, explain=explain)
    assert (event.failure, event.message) == ("error", "RuntimeError: the error")


def test_who_sees_the_failure_finds_its_traceback(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []
    write = EventWriter.write

    def looking(self: EventWriter, event: RunEvent) -> None:
        if isinstance(event, Failed):
            printed.append(capsys.readouterr().err)
        write(self, event)

    monkeypatch.setattr(EventWriter, "write", looking)
    _fails(ZeroDivisionError("a fault"), paths)
    assert "ZeroDivisionError: a fault" in printed[0]


def test_signals_do_not_cut_the_last_words_short(paths: RunPaths) -> None:
    def explain(error: BaseException) -> JobFailed | None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        return None

    assert _fails(RuntimeError("the error"), paths, explain=explain).failure == "error"


def test_a_job_that_ends_without_saying_how_has_failed(paths: RunPaths) -> None:
    with Worker(paths) as worker:
        worker.emit(Started, job="train")
    assert worker.exit_code == 1
    assert _failed(paths).failure == "no_result"


def test_an_error_after_the_end_does_not_add_a_second_end(paths: RunPaths) -> None:
    with Worker(paths) as worker:
        worker.emit(Finished, outcome="done")
        raise OSError("while cleaning up")
    assert worker.exit_code == 1
    assert len(read_events(paths.events)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_interrupts_where_it_was_asked_for(
    paths: RunPaths, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with Worker(paths) as worker:
        os.kill(os.getpid(), number)
        assert worker.requested("stop")
        os.kill(os.getpid(), number)
        pytest.fail("the second signal was ignored")
    assert _failed(paths).failure == "interrupted"
    assert signal.getsignal(number) is before


def test_a_hang_up_is_ignored(paths: RunPaths) -> None:
    with Worker(paths) as worker:
        os.kill(os.getpid(), signal.SIGHUP)
        worker.emit(Finished, outcome="done")
    assert worker.exit_code == 0


def test_requests_reach_the_worker_until_they_are_served(paths: RunPaths) -> None:
    request(paths, "checkpoint-now")
    with Worker(paths) as worker:
        assert worker.requested("checkpoint-now")
        worker.served("checkpoint-now")
        worker.served("checkpoint-now")
        assert not worker.requested("checkpoint-now")
        assert not worker.requested("pause")
        worker.emit(Finished, outcome="done")
    assert not requested(paths, "checkpoint-now")


def test_a_torn_line_of_a_killed_predecessor_is_repaired(paths: RunPaths) -> None:
    write_log(paths, Phase(at=1.0, name="load"))
    with paths.events.open("a") as file:
        file.write('{"schema": 1, "kind": "StepDo')
    with Worker(paths) as worker:
        worker.emit(Finished, outcome="done")
    assert [event.kind for event in read_events(paths.events)] == ["Phase", "Unknown", "Finished"]


def test_the_reserve_makes_room_for_the_last_line(paths: RunPaths) -> None:
    with Worker(paths) as worker:
        assert (paths.root / ".reserve").stat().st_size >= 16 * 1024
        raise JobFailed("disk_full", "m", "a")
    assert not (paths.root / ".reserve").exists()
    assert worker.exit_code == 1


def test_process_json_says_where_the_worker_ran(paths: RunPaths) -> None:
    with Worker(paths) as worker:
        worker.emit(Finished, outcome="done")
    table = json.loads(paths.process.read_text())
    assert table["cwd"] == str(Path.cwd())
    assert table["taken_at"] > 0


def test_a_worker_whose_folder_was_deleted_ends_at_its_next_look(paths: RunPaths) -> None:
    worker, looked = Worker(paths), []
    with worker:
        looked.append(worker.requested("stop"))
        shutil.rmtree(paths.root)
        looked.append(worker.requested("stop"))
    assert (worker.exit_code, looked) == (1, [False])
    assert not paths.root.exists()


def _without_room_for_requests(paths: RunPaths) -> None:
    """A disk that takes not even an empty file, as a file where the folder was does (root may write anywhere)."""
    paths.control.rmdir()
    paths.control.write_text("")


def test_a_signal_asks_for_a_stop_also_where_no_request_can_be_left(paths: RunPaths) -> None:
    _without_room_for_requests(paths)
    with Worker(paths) as worker:
        assert not worker.requested("stop")
        os.kill(os.getpid(), signal.SIGTERM)
        assert worker.requested("stop")
        worker.emit(Finished, outcome="stopped")
    assert worker.exit_code == 0


def test_a_stop_reaches_a_worker_on_a_disk_that_takes_no_request(paths: RunPaths) -> None:
    _without_room_for_requests(paths)
    with pytest.raises(OSError):
        request(paths, "stop")
    with Worker(paths) as worker:
        with pytest.raises(OSError):
            request(paths, "pause")
        request(paths, "stop")
        assert worker.requested("stop")
        worker.emit(Finished, outcome="stopped")


def test_a_patient_worker_waits_for_other_troubles_of_a_disk_too(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is made read-only and writable again, as the system does with one that has faults."""
    write, naps, refused = os.write, [], [errno.EROFS] * 2

    def refusing(descriptor: int, data: bytes) -> int:
        if refused and b"StepDone" in data:
            raise OSError(refused.pop(), "Read-only file system")
        return write(descriptor, data)

    monkeypatch.setattr("studio.runs.log.os.write", refusing)
    with Worker(paths) as worker:
        worker.patient, worker.sleep = True, naps.append
        worker.emit(StepDone, step=7, loss=1.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
        worker.emit(Finished, outcome="done")
    told = read_events(paths.events)
    assert [event.kind for event in told] == ["Warned", "Paused", "Paused", "StepDone", "Finished"]
    assert isinstance(told[1], Paused)
    assert "read-only" in told[1].reason
    assert naps


def test_what_is_no_trouble_of_a_disk_is_not_waited_for(paths: RunPaths) -> None:
    with Worker(paths) as worker:
        worker.patient = True
        worker.sleep = lambda seconds: pytest.fail("it waited")
        worker.patiently("it cannot be done", lambda: {}["missing"])
    assert _failed(paths).failure == "error"
