"""The merge job: `python -m studio.jobs.merge RUN_DIR`, started by `studio.runs.supervise`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.jobs.base.failures import explain as _explain
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.launched import start_next
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from studio.runs.worker import Worker


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Hide bitsandbytes from peft, which imports it if it is installed: 47 MB that a 16-bit merge does not need.

    With it the job would take more memory than 1.3 times the largest tensor plus 400 MB
    (tests/bench/merge_results.md).
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    hidden: Any = None  # Python's own mark for a module that must not be imported
    sys.modules["bitsandbytes"] = hidden
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]


def _body(worker: Worker) -> None:
    request = read_job(worker.paths, MergeRequest)
    if request is None:
        raise BadInput("this run is not a merge")
    # For the whole merge, because peft looks for bitsandbytes only when the adapter is attached.
    with without_bitsandbytes() if request.onto == "original" else nullcontext():
        from studio.jobs.merge.job import merge_run  # noqa: PLC0415  torch, after the lock is held

        merge_run(worker, request)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m studio.jobs.merge RUN_DIR")
    code = run_job(Path(sys.argv[1]), _body, explain=_explain)
    start_next(RunPaths(Path(sys.argv[1])))
    sys.exit(code)
