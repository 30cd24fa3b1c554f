"""The audit job: `python -m studio.jobs.audit RUN_DIR`, started by `studio.runs.supervise`."""

import ctypes
import os
import sys
from pathlib import Path

from studio.core.errors import BadInput
from studio.jobs.base.failures import explain as _explain
from studio.probe.device import CHOSEN
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.requests import AuditRequest
from studio.runs.worker import Worker

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""
_LARGE_BYTES = 6 * 2**20
"""Larger than the parts in which weights are cast and rounded (4 MiB), which are allocated thousands of times."""


def return_large_blocks() -> None:
    """Let large freed memory go back to the system at once, so that a walk's peak is what it really holds.

    Only glibc needs this. By default it keeps freed blocks of up to 32 MiB in its heap, and the next ones may not fit
    into the gaps: on a walk over 122 MB blocks the peak was 10 to 50 MB higher, differently in each run.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


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
    sys.exit(run_job(Path(sys.argv[1]), _body, explain=_explain, card=os.environ.get(CHOSEN, "")))
