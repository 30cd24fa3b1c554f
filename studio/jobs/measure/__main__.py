"""The measuring job: `python -m studio.jobs.measure RUN_DIR`, started by `studio.runs.supervise`."""

import os
import sys
from pathlib import Path

from studio.core.errors import BadInput
from studio.jobs.base.failures import explain as _explain
from studio.probe.device import CHOSEN
from studio.probe.machine import growing_segments
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.requests import MeasureRequest
from studio.runs.worker import Worker


def _body(worker: Worker) -> None:
    request = read_job(worker.paths, MeasureRequest)
    if request is None:
        raise BadInput("this run is not a measurement")
    os.environ.update(growing_segments())  # as a training does
    from studio.jobs.measure.job import measure_run  # noqa: PLC0415  torch, after the lock is held

    measure_run(worker, request)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m studio.jobs.measure RUN_DIR")
    sys.exit(run_job(Path(sys.argv[1]), _body, explain=_explain, card=os.environ.get(CHOSEN, "")))
