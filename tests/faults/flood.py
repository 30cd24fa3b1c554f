"""A worker that tells a thousand steps a second: `python -m tests.faults.flood RUN`, for FLOOD_SECONDS.

Each step is a fraction of a millisecond of arithmetic and an event. Of the step before, the event holds how long both
took: `seconds` by the clock, `grad_norm` by the process's own time.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

from studio.core.events import Finished, Planned, Started, StepDone
from studio.runs.job_process import run_job
from studio.runs.worker import Worker

RATE = 1000.0
_WORK = bytes(200_000)


def flood(worker: Worker) -> None:
    """Tell steps at their pace until the time is over."""
    total = int(RATE * float(os.environ["FLOOD_SECONDS"]))
    worker.emit(Started, job="train", method="lora", model="none")
    worker.emit(
        Planned, total_steps=total, trainable_parameters=1, rows=1, held_out_rows=0, device="cpu", dtype="fp32",
        loss_path="chunked",
    )  # fmt: skip
    began, wall, own = time.perf_counter(), 0.0, 0.0
    step, end = 0, began + total / RATE
    while step < total and time.perf_counter() < end:  # on a busy machine fewer than were planned
        step += 1
        time.sleep(max(0.0, began + step / RATE - time.perf_counter()))
        clock, spent = time.perf_counter(), time.thread_time()
        hashlib.sha256(_WORK).digest()
        loss = 4.0 / (1 + step / 1000)
        worker.emit(StepDone, step=step, loss=loss, learning_rate=1e-4, grad_norm=own, tokens=1000, seconds=wall)
        wall, own = time.perf_counter() - clock, time.thread_time() - spent
    worker.emit(Finished, outcome="done", step=step, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), flood))
