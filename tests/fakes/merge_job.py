"""A merge that only writes what a merge leaves: `python -m tests.fakes.merge_job RUN`."""

import os
import sys
from pathlib import Path

from studio.core.errors import JobFailed
from studio.core.events import Finished, Phase, Saved, Started
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.launched import start_next
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from studio.runs.worker import Worker


def main(worker: Worker) -> None:
    request = read_job(worker.paths, MergeRequest)
    assert request
    worker.emit(Started, job="merge", model=request.base)
    worker.emit(Phase, name="merging", fraction=0.5)
    if os.environ.get("FAKE_MERGE_FAILS"):
        raise JobFailed("disk_full", "no room for the merged model", "Free some space.")
    out = Path(request.out)
    out.mkdir(parents=True)
    if not os.environ.get("FAKE_MERGE_LIES"):
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"not a model")
    worker.emit(Saved, what="merged", path=str(out))
    worker.emit(Finished, outcome="done", seconds=0.5)


if __name__ == "__main__":
    code = run_job(Path(sys.argv[1]), main)
    start_next(RunPaths(Path(sys.argv[1])), module="tests.fakes.export_job")
    sys.exit(code)
