"""An export that only writes what an export leaves: `python -m tests.fakes.export_job RUN`."""

import os
import sys
from pathlib import Path

from studio.core.errors import JobFailed
from studio.core.events import Finished, Saved, Started
from studio.core.export_formats import gguf_formats
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.launched import start_next
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from studio.runs.worker import Worker


def main(worker: Worker) -> None:
    request = read_job(worker.paths, ExportRequest)
    assert request
    worker.emit(Started, job="export", model=request.source)
    if request.format in os.environ.get("FAKE_EXPORT_FAILS", "").split():
        raise JobFailed("disk_full", f"no room for {request.format}", "Free some space.")
    out = Path(request.out)
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    worker.emit(Saved, what="exported", path=str(out))
    loss = {"tokens": 282, "mean_kl": 0.0069, "same_top_token": 0.975}
    golden = {"conversations": 5, "tokens": 293, "ends_with_stop": True, "bos_doubled": False, "composes": False}
    found = {"loss": loss, "golden": golden} if request.format in gguf_formats() else {}
    worker.emit(Finished, outcome="done", result={"format": request.format, **found})


if __name__ == "__main__":
    code = run_job(Path(sys.argv[1]), main)
    start_next(RunPaths(Path(sys.argv[1])), module="tests.fakes.export_job")
    sys.exit(code)
