"""A worker that costs nothing: it writes real events through the real `Worker`, and obeys like a real job.

Run as `python -m tests.fakes.job RUN`; what it does is set by the environment (see `_number`).
"""

import ctypes
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from studio.core.errors import BadInput, JobFailed
from studio.core.events import Evaluated, Finished, Paused, Phase, Planned, Sampled, Saved, Started, StepDone, Warned
from studio.core.recipe import Recipe
from studio.probe.data import read_data
from studio.probe.held_out import hold_out
from studio.runs.atomic import publish_folder
from studio.runs.held_out import keep_record
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.restarts import tell_restart
from studio.runs.worker import Worker


def _number(name: str, otherwise: float) -> float:
    """FAKE_STEPS, FAKE_SECONDS (per step), FAKE_FAIL_AT, FAKE_DEAF (ignores requests) ..."""
    return float(os.environ.get(f"FAKE_{name}", otherwise))


def main(worker: Worker) -> None:
    total = int(_number("STEPS", 10))
    worker.patient = bool(_number("PATIENT", 0))
    if _number("SEGFAULT", 0):
        ctypes.string_at(0)
    done = _resumable(worker)
    worker.emit(Started, job="train", method="qlora", model="embedded", resumed_from=done)
    tell_restart(worker.emit)
    worker.emit(
        Planned,
        total_steps=total,
        trainable_parameters=1000,
        rows=100,
        held_out_rows=10,
        device="cpu",
        dtype="bf16",
        loss_path="chunked",
    )
    worker.emit(Phase, name="load", detail="reading nothing")
    _keep_record(worker)
    print(os.environ.get("FAKE_SAYS", ""), end="", flush=True)
    worker.emit(Warned, message=os.environ.get("FAKE_NOTE", "this worker is a fake"), topic="fake")
    worker.emit(Evaluated, step=done, loss=4.0, loss_tokens=100, rows=10, seconds=0.1)
    worker.emit(Sampled, step=done, index=0, prompt="what?", answer="no idea", expected="this")
    for step in range(done + 1, total + 1):
        if step == _number("FAIL_AT", -1):
            raise JobFailed("nonfinite_loss", f"the loss is nan at step {step}", "Lower the learning rate.")
        if step == _number("REFUSE_AT", -1):
            raise BadInput("the rows cannot be used")
        if step == _number("RAISE_AT", -1):
            raise ZeroDivisionError("a fault of the fake")
        if step == _number("DIE_AT", -1):
            _die()
        if step == _number("NATIVE_EXIT_AT", -1):
            # As bitsandbytes ends a process whose CUDA call failed: a line and `exit(1)`, and Python hears of neither.
            os.write(2, f"{os.environ['FAKE_LAST']}\n".encode())
            ctypes.CDLL(None).exit(1)
        if step == _number("HOARD_AT", -1):
            _hoard()
        time.sleep(_number("SECONDS", 0.0))
        worker.emit(
            StepDone,
            step=step,
            loss=4.0 * math.exp(-step / 10),
            learning_rate=1e-4,
            grad_norm=1.0,
            tokens=1000,
            seconds=max(0.001, _number("SECONDS", 0.0)),
        )
        if _number("DEAF", 0):
            continue
        _wait_while_paused(worker, step)
        if worker.requested("stop"):
            return _end(worker, step, "stopped")
    return _end(worker, total, "done")


def _keep_record(worker: Worker) -> None:
    """What the real job keeps of its rows, where its recipe names rows that are there; once: it takes 65 ms."""
    if worker.paths.held_out.is_file():
        return
    with suppress(BadInput):
        recipe = read_job(worker.paths, Recipe)
        assert isinstance(recipe, Recipe)
        keep_record(worker.paths, hold_out(recipe, read_data(Path(recipe.data.path)), None).record)


def _die() -> None:
    if _number("KILLED", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(9)


def _wait_while_paused(worker: Worker, step: int) -> None:
    if not worker.requested("pause"):
        return
    worker.emit(Paused, step=step, paused=True)
    while worker.requested("pause") and not worker.requested("stop"):
        time.sleep(0.01)
    worker.emit(Paused, step=step, paused=False)


def _end(worker: Worker, step: int, outcome: str) -> None:
    worker.emit(Evaluated, step=step, loss=2.0, loss_tokens=100, rows=10, seconds=0.1)
    worker.emit(Sampled, step=step, index=0, prompt="what?", answer="this", expected="this")
    scratch = worker.paths.root / ".adapter.part"
    scratch.mkdir(exist_ok=True)
    (scratch / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (scratch / "adapter_model.safetensors").write_bytes(_weights())
    publish_folder(scratch, worker.paths.adapter)
    (worker.paths.root / "step.txt").write_text(str(step))
    worker.emit(Saved, what="adapter", path="adapter", step=step)
    worker.emit(Finished, outcome=outcome, step=step, seconds=1.0)


def _weights() -> bytes:
    """One number in safetensors."""
    header = b'{"lora_B.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


def _resumable(worker: Worker) -> int:
    saved = worker.paths.root / "step.txt"
    return int(saved.read_text()) if saved.is_file() else 0


def _hoard() -> None:
    """Take memory until somebody objects."""
    held = []
    while True:
        held.append(b"x" * 2**24)


if __name__ == "__main__":
    if group := os.environ.get("FAKE_GROUP"):
        Path(group).write_text(str(os.getpid()))
    watched = bool(_number("WATCHED", 0))
    sys.exit(run_job(Path(sys.argv[1]), main, card=os.environ.get("LORA_STUDIO_CARD", ""), watched=watched))
