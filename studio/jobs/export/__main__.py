"""The export job: `python -m studio.jobs.export RUN_DIR`, started by `studio.runs.supervise`."""

import sys
from pathlib import Path

from studio.core.errors import BadInput
from studio.jobs.base.failures import explain as _explain
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.launched import start_next
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from studio.runs.worker import Worker


def _body(worker: Worker) -> None:
    request = read_job(worker.paths, ExportRequest)
    if request is None:
        raise BadInput("this run is not an export")
    from studio.jobs.export.job import export_run  # noqa: PLC0415  torch, after the lock is held

    export_run(worker, request)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m studio.jobs.export RUN_DIR")
    code = run_job(Path(sys.argv[1]), _body, explain=_explain)
    start_next(RunPaths(Path(sys.argv[1])))
    sys.exit(code)
