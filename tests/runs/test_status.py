import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from studio.core.events import Failed, Finished, Paused, RunEvent, Started, StepDone
from studio.runs.control import request
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.process import mark_of, mark_to_json
from studio.runs.status import Status, file_bytes, run_status
from tests.fakes.runs import make_run, write_log

STARTED = Started(at=1.0, job="train")
STEP = StepDone(at=2.0, step=1, loss=1.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
DONE = Finished(at=3.0, outcome="done")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path)


@contextmanager
def _worker(paths: RunPaths, *events: RunEvent) -> Iterator[None]:
    """This very process as the worker of the run."""
    mark = mark_of(os.getpid())
    assert mark is not None
    paths.process.write_text(mark_to_json(mark))
    write_log(paths, *events)
    with FileLock(paths.lock):
        yield


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([STARTED, STEP, DONE], Status.finished),
        ([STARTED, Finished(at=3.0, outcome="stopped")], Status.stopped),
        ([STARTED, Failed(at=3.0, failure="f", message="m", advice="a")], Status.failed),
        ([STARTED, STEP], Status.crashed),
        ([STARTED, DONE, STARTED, STEP], Status.crashed),
        ([STEP] * 3000, Status.crashed),
        ([STEP] * 3000 + [DONE], Status.finished),
    ],
)
def test_without_a_worker_the_end_of_the_log_decides(paths: RunPaths, events: list[RunEvent], wanted: Status) -> None:
    write_log(paths, *events)
    assert run_status(paths) is wanted


def test_a_worker_at_work(paths: RunPaths) -> None:
    with _worker(paths, STARTED, STEP):
        assert lock_held(paths.lock)
        assert run_status(paths) is Status.running
        request(paths, "stop")
        assert run_status(paths) is Status.stopping
    assert run_status(paths) is Status.crashed


def test_a_worker_that_waits(paths: RunPaths) -> None:
    waits, goes_on = Paused(at=3.0, step=1, paused=True), Paused(at=4.0, step=1, paused=False)
    with _worker(paths, STARTED, STEP, waits):
        assert run_status(paths) is Status.paused
        write_log(paths, STARTED, STEP, waits, goes_on, STEP)
        assert run_status(paths) is Status.running
        write_log(paths, STARTED, waits, STARTED, STEP)
        assert run_status(paths) is Status.running


def test_a_worker_that_has_said_nothing_yet_is_starting(paths: RunPaths) -> None:
    with _worker(paths):
        assert run_status(paths) is Status.starting
        request(paths, "stop")
        assert run_status(paths) is Status.stopping


def test_a_run_made_a_moment_ago_is_starting_and_later_crashed(paths: RunPaths) -> None:
    made = paths.root.stat().st_mtime
    assert run_status(paths, now=made + 1) is Status.starting
    request(paths, "stop")
    assert run_status(paths, now=made + 1) is Status.stopping
    assert run_status(paths, now=made + 3600) is Status.crashed


def test_a_clock_that_was_set_back_leaves_no_folder_starting_for_good(paths: RunPaths) -> None:
    made = paths.root.stat().st_mtime
    assert run_status(paths, now=made - 5) is Status.starting, "two machines' clocks may differ a little"
    assert run_status(paths, now=made - 86_400) is Status.crashed


def test_a_launched_process_that_has_no_lock_yet_is_starting_even_over_an_old_end(paths: RunPaths) -> None:
    write_log(paths, STARTED, DONE)
    mark = mark_of(os.getpid())
    assert mark is not None
    paths.launch.write_text(mark_to_json(mark, events_bytes=file_bytes(paths.events)))
    assert run_status(paths) is Status.starting
    request(paths, "stop")
    assert run_status(paths) is Status.stopping, "the screen offers to end it at once, not to stop it again"
    paths.launch.write_text(mark_to_json(replace(mark, started=1.0), events_bytes=file_bytes(paths.events)))
    assert run_status(paths) is Status.finished


def test_a_run_copied_from_another_machine_does_not_point_at_a_process_here(paths: RunPaths) -> None:
    mark = mark_of(os.getpid())
    assert mark is not None
    write_log(paths, STARTED, STEP)
    for path in (paths.process, paths.launch):
        path.write_text(mark_to_json(replace(mark, host="elsewhere"), events_bytes=10**6))
    assert run_status(paths) is Status.crashed


def test_on_a_shared_disk_a_lock_held_elsewhere_counts(paths: RunPaths) -> None:
    with _worker(paths, STARTED, STEP):
        mark = mark_of(os.getpid())
        assert mark is not None
        paths.process.write_text(mark_to_json(replace(mark, host="elsewhere")))
        assert run_status(paths) is Status.running


_HOLDS = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_kept_open_by_an_orphan_does_not_make_a_dead_worker_live(paths: RunPaths) -> None:
    orphan = subprocess.Popen([sys.executable, "-c", _HOLDS, str(paths.lock)], stdout=subprocess.PIPE)
    assert orphan.stdout is not None
    orphan.stdout.readline()
    mark = mark_of(os.getpid())
    assert mark is not None
    write_log(paths, STARTED, STEP)
    try:
        assert run_status(paths) is Status.running
        paths.process.write_text(mark_to_json(replace(mark, started=1.0)))
        assert lock_held(paths.lock)
        assert run_status(paths) is Status.crashed
    finally:
        orphan.kill()
        orphan.wait(60)


def test_looking_never_keeps_a_worker_out(paths: RunPaths) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom studio.runs.lock import lock_held\nprint(1, flush=True)\n"
        "while True: lock_held(Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    paths.lock.touch()
    looker = subprocess.Popen([sys.executable, "-c", code, str(paths.lock)], env=environment, stdout=subprocess.PIPE)
    assert looker.stdout is not None
    looker.stdout.readline()
    try:
        for _ in range(200):
            with FileLock(paths.lock, timeout=2.0):
                pass
    finally:
        looker.kill()
        looker.wait(60)


def test_damaged_marks_are_as_good_as_none(paths: RunPaths) -> None:
    write_log(paths, STARTED, STEP)
    paths.process.write_text("{")
    paths.launch.write_text(json.dumps({"events_bytes": "many"}))
    assert run_status(paths) is Status.crashed
