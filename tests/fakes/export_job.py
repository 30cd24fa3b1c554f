"""An export that only writes what an export leaves: `python -m tests.fakes.export_job RUN`."""

import sys
from pathlib import Path

from studio.core.events import Finished, Saved, Started
from studio.runs.job import ExportRequest, read_job
from studio.runs.worker import Worker, run_job


def main(worker: Worker) -> None:
    request = read_job(worker.paths)
    assert isinstance(request, ExportRequest)
    worker.emit(Started, job="export", model=request.source)
    out = Path(request.out)
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    worker.emit(Saved, what="exported", path=str(out))
    worker.emit(Finished, outcome="done", result={"format": request.format})


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), main))
