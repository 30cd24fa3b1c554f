"""A measurement whose figures are made up: `python -m tests.fakes.measure_job RUN`."""

import json
import os
import sys
from pathlib import Path

from studio.core.errors import JobFailed
from studio.core.events import Finished, Started
from studio.runs.atomic import write_whole
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.requests import MeasureRequest
from studio.runs.worker import Worker

GIB = 2**30


def main(worker: Worker) -> None:
    request = read_job(worker.paths, MeasureRequest)
    assert isinstance(request, MeasureRequest)
    worker.emit(Started, job="measure")
    if os.environ.get("FAKE_MEASURE_FAILS"):
        raise JobFailed("not_traceable", "values decide", "measure it on a card")
    peaks = {"load": {"base": GIB}, "backward": {"base": GIB, "activations": GIB // 2}}
    report = {"source": "trace", "peaks": peaks, "trainable_parameters": 1000, "seconds": 0.1, "asked": request.how}
    write_whole(worker.paths.report, json.dumps(report | {"capability": request.capability, "device": request.device}))
    worker.emit(Finished, outcome="done", seconds=0.1)


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), main))
