"""The audit job: `python -m studio.jobs.audit RUN_DIR`, started by `studio.runs.supervise`."""

import sys
from pathlib import Path

from studio.core.errors import BadInput
from studio.jobs.audit.large_blocks import return_large_blocks
from studio.jobs.base.failures import explain as _explain
from studio.runs.audit_request import AuditRequest
from studio.runs.job import read_job
from studio.runs.worker import Worker, run_job


def _body(worker: Worker) -> None:
    request = read_job(worker.paths, AuditRequest)
    if request is None:
        raise BadInput("this run is not an audit")
    from studio.jobs.audit.job import audit_run  # noqa: PLC0415  torch, after the lock is held

    audit_run(worker, request)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m studio.jobs.audit RUN_DIR")
    return_large_blocks()
    sys.exit(run_job(Path(sys.argv[1]), _body, explain=_explain))
