"""The merge job: `python -m studio.jobs.merge RUN_DIR`, started by `studio.runs.supervise`."""

import os
import sys
from pathlib import Path

from studio.core.errors import BadInput
from studio.runs.job import MergeRequest, read_job
from studio.runs.worker import Worker, run_job


def _body(worker: Worker) -> None:
    request = read_job(worker.paths)
    if not isinstance(request, MergeRequest):
        raise BadInput("this run is not a merge")
    # A merge is additions; the card, if there is one, may be busy with a training run.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from studio.jobs.merge.job import merge_run  # noqa: PLC0415  torch, after the lock is held

    merge_run(worker, request)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m studio.jobs.merge RUN_DIR")
    sys.exit(run_job(Path(sys.argv[1]), _body))
