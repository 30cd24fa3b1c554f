"""Following a run: what an interrupt is answered with."""

import os
import signal
import sys
from pathlib import Path

import pytest

from studio.commands.follow import follow
from studio.core.events import Finished, Started
from studio.runs.control import requested
from studio.runs.status import Status
from studio.runs.watch import RunWatch
from tests.fakes.runs import LiveWorker, make_run


@pytest.mark.parametrize(
    ("job", "said"), [("train", "stopping after this step and saving"), ("merge", "asked to stop")]
)
def test_an_interrupt_promises_what_the_job_can_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str, said: str
) -> None:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        worker.emit(Started, job=job)

        def sleep(_: float) -> None:
            if requested(paths, "stop"):
                worker.emit(Finished, outcome="stopped")
            else:
                os.kill(os.getpid(), signal.SIGINT)

        end = follow(RunWatch(paths), to=sys.stdout, stops_on_interrupt=True, sleep=sleep)
    assert (end.status, end.left) == (Status.stopped, False)
    assert f"\n{said}; Ctrl-C again returns at once, and the run stops by itself\n" in capsys.readouterr().out
