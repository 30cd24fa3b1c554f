"""The training job: `python -m studio.jobs.train RUN_DIR`, started by `studio.runs.supervise`."""

import os
import sys
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.base.failures import explain as _explain
from studio.probe.device import CHOSEN
from studio.probe.machine import growing_segments
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.worker import Worker

_KERNELS_KEPT = "128"
"""How many prepared matrix products oneDNN keeps on a CPU: enough for the last few shapes of a batch.

Each new number of tokens prepares new ones. With the default of 1024, a run over rows of varying length grew by 20 MB a
step for tens of steps (tests/bench/train_results.md). torch's cache and oneDNN's read their environment variables when
torch first multiplies, so these must be set before that.
"""


def _bound_caches() -> None:
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KERNELS_KEPT)


def _body(worker: Worker) -> None:
    recipe = read_job(worker.paths, Recipe)
    if recipe is None:
        raise BadInput("this run is not a training run")
    _bound_caches()
    os.environ.update(growing_segments())
    from studio.jobs.train.job import train_run  # noqa: PLC0415  torch, after the lock is held

    train_run(worker, recipe)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m studio.jobs.train RUN_DIR")
    sys.exit(run_job(Path(sys.argv[1]), _body, explain=_explain, card=os.environ.get(CHOSEN, ""), watched=True))
