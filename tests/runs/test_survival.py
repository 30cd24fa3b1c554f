"""What the run directory promises when processes die: measured on real ones, killed for real."""

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from studio.core.events import Failed, Finished, StepDone, Unknown
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.log import EventTail, read_events
from studio.runs.process import read_mark
from studio.runs.status import Status, run_status
from studio.runs.supervise import resume, stop
from studio.runs.watch import read_history
from tests.fakes.runs import MODULE, fake_environment, launch_fake, make_run, wait_for
from tests.fakes.small_disk import small_disk

KILLS = 12


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path)


@pytest.mark.slow
def test_killed_at_any_moment_a_run_is_crashed_and_its_files_are_whole(paths: RunPaths) -> None:
    """The same run is killed again and again and resumed: from before its first line to long into its steps."""
    chance = random.Random(7)  # noqa: S311  moments, not secrets
    tail, followed = EventTail(paths.events), History()
    for attempt in range(KILLS):
        environment = fake_environment(steps=1_000_000)
        handle = (
            resume(paths, module=MODULE, environment=environment) if attempt else launch_fake(paths, steps=1_000_000)
        )
        time.sleep(chance.random() * 0.1)
        if attempt == KILLS - 1:  # on a busy machine none of the moments before may lie among the steps
            wait_for(lambda: any(isinstance(event, StepDone) for event in read_events(paths.events)))
        handle.process.kill()
        handle.process.wait(60)
        assert run_status(paths, now=time.time() + 3600) is Status.crashed
        for whole in (paths.process, paths.launch):
            assert json.loads(whole.read_text())["pid"] == handle.pid
        while events := tail.poll():
            followed.fold(events)
    events = read_events(paths.events)
    unknown = [event for event in events if isinstance(event, Unknown)]
    assert len(unknown) <= KILLS - 1
    assert sum(isinstance(event, StepDone) for event in events) > 0
    at_once = History()
    at_once.fold(events)
    assert at_once == followed
    assert stop(paths, 1) is Status.crashed


def test_crashed_shows_soon_after_the_kill(paths: RunPaths) -> None:
    handle = launch_fake(paths, steps=1000, seconds=0.05)
    wait_for(lambda: run_status(paths) is Status.running)
    os.kill(handle.pid, signal.SIGKILL)
    wait_for(lambda: run_status(paths) is Status.crashed)
    handle.process.wait(60)


def test_a_run_that_fills_the_disk_says_so_in_its_last_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "400k") as disk:
        paths = make_run(disk)
        handle = launch_fake(paths, steps=1_000_000)
        assert handle.process.wait(60) == 1
        events = read_events(paths.events)
        status = run_status(paths)
    assert isinstance(events[-1], Failed)
    assert events[-1].failure == "disk_full"
    assert events[-1].step == sum(isinstance(event, StepDone) for event in events)
    assert not any(isinstance(event, Unknown) for event in events)
    assert status is Status.failed


@pytest.mark.slow
def test_a_patient_run_on_a_full_disk_waits_goes_on_and_can_be_stopped(tmp_path: Path) -> None:
    """Two processes: who looks at the run, and stops it, is not the one that waits."""
    with small_disk(tmp_path / "disk", "400k") as disk:
        paths = make_run(disk)
        handle = launch_fake(paths, steps=1_000_000, patient=1)
        wait_for(lambda: run_status(paths) is Status.paused)
        history = read_history(paths)
        assert "full" in history.paused_for
        assert "goes on by itself" in history.warnings[-1].message
        before = history.last_step
        subprocess.run(["mount", "-o", "remount,size=600k", str(disk)], check=True)
        wait_for(lambda: read_history(paths).last_step > before)
        wait_for(lambda: run_status(paths) is Status.paused)
        stop(paths)
        assert handle.process.wait(60) == 1
        events = read_events(paths.events)
        assert run_status(paths) is Status.failed
    steps = [event.step for event in events if isinstance(event, StepDone)]
    assert steps == list(range(1, len(steps) + 1))
    assert not any(isinstance(event, Unknown) for event in events)
    assert isinstance(events[-1], Failed)
    assert events[-1].failure == "disk_full"
    assert "stopped while it waited" in events[-1].message


# A terminal's own program: whoever runs the tests may have told all that they start to ignore the end of a terminal.
_PARENT = """
import signal, sys, time
from pathlib import Path
from studio.runs.layout import RunPaths
from studio.runs.supervise import launch

signal.signal(signal.SIGHUP, signal.SIG_DFL)
launch(RunPaths(Path(sys.argv[1])), "tests.fakes.job")
print("launched", flush=True)
time.sleep(600)
"""


def _parent_environment() -> dict[str, str]:
    return {**os.environ, **fake_environment(steps=40, seconds=0.02)}


def _survived(paths: RunPaths) -> None:
    wait_for(lambda: not run_status(paths).live)
    last = read_events(paths.events)[-1]
    assert isinstance(last, Finished), paths.output.read_text()
    assert last.outcome == "done"
    assert last.step == 40


def test_a_run_outlives_a_killed_parent(paths: RunPaths) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(paths.root)], stdout=subprocess.PIPE, env=_parent_environment()
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"launched\n"
    parent.kill()
    parent.wait(60)
    assert run_status(paths).live
    _survived(paths)


def test_a_run_outlives_its_terminal(paths: RunPaths) -> None:
    """The parent leads a session on a pseudo terminal; closing its other end is what a dropped connection does."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", _PARENT, str(paths.root)], _parent_environment())  # noqa: S606
    seen = b""
    while b"launched" not in seen:
        seen += os.read(terminal, 1024)
    worker = read_mark(paths.process)
    assert worker is not None
    assert os.getsid(worker[0].pid) == worker[0].pid
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGHUP
    assert run_status(paths).live
    _survived(paths)
