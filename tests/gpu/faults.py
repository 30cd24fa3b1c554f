"""The training job with something done to it: `python -m tests.gpu.faults RUN FAULT DEVICE`, as `studio.jobs.train`.

FAULT is one of
`oom:STAGE`   the card is full from the first moment of a stage on: what is reserved stays, nothing more is given;
`stop:N`      the run is asked to stop after step N, as a user would;
`overflow`    the fp16 scaler begins so high that gradients overflow;
`pages`       leaves `pages.json`: how many tensors of the optimizer's state are paged when training begins;
`assert`      a kernel fails an assertion on the device before step 2;
`native`      the card's state is spoilt, then bitsandbytes is called: its native code ends the process by exit(1);
`traced`      compiled layers run torch's own operators, so that no compiler is needed.
In a rehearsal (DEVICE cpu) what only a card can do is raised, or printed, in its place, in the libraries' own words.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from studio.core.recipe import TrainSection
from studio.jobs.base import precision
from studio.jobs.base.failures import explain
from studio.jobs.measure.step import _staged
from studio.jobs.train import between, compiled, job
from studio.jobs.train.__main__ import _body
from studio.jobs.train.checkpoint import TrainState
from studio.jobs.train.loop import LoopParts
from studio.runs.control import request
from studio.runs.job_process import run_job

STAGES = ("load", "forward", "loss", "backward", "optimizer", "eval", "save")
OVERFLOWING_SCALE = 2.0**20
_LARGEST, _SMALLEST = 28, 9
_FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 0 bytes (rehearsed)"
_ASSERTED = "CUDA error: device-side assert triggered (rehearsed)"
_NATIVE = "Error device-side assert triggered at line 94 in file /src/csrc/ops.cu (rehearsed)"


def fill(allocate: Callable[[int], Any]) -> list[Any]:
    """Take all that an allocator gives, in ever smaller pieces, down to the smallest block of torch's (512 bytes)."""
    held = []
    for power in range(_LARGEST, _SMALLEST - 1, -1):
        while True:
            try:
                held.append(allocate(2**power))
            except torch.OutOfMemoryError:
                break
    return held


class FullCard:
    """Makes the card full, once, when the stage begins."""

    def __init__(self, stage: str, device: str) -> None:
        self._stage = stage
        self._device = device
        self.held: list[Any] = []
        self._done = False

    def stage(self, name: str) -> None:
        """Say that a stage begins."""
        if name != self._stage or self._done:
            return
        self._done = True
        if self._device == "cpu":
            if name != "save":  # a copy to the host takes nothing of the card
                raise torch.OutOfMemoryError(_FULL)
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, torch.cuda.memory_reserved() / total))
        self.held = fill(lambda size: torch.empty(size, dtype=torch.uint8, device="cuda"))

    def claim(self, tensors: Any, component: str) -> None:
        """Nothing: only the stages are listened to."""


def inject(fault: str, run: Path, device: str) -> None:
    """Prepare a fault in this process."""
    kind, _, detail = fault.partition(":")
    if kind == "oom":
        _full_at(FullCard(detail, device))
    elif kind == "stop":
        _before(between.Between, "after_step", lambda self, progress: _stop(self, progress, int(detail)))
    elif kind == "overflow":
        precision.Precision.scaler = lambda self: torch.amp.GradScaler(  # type: ignore[method-assign]
            self.device_type, enabled=self.name == "fp16", init_scale=OVERFLOWING_SCALE
        )
    elif kind == "pages":
        _before(job, "train", lambda parts, *_: _write_pages(parts.optimizer, run))
    elif kind in ("assert", "native"):
        act = _fail_assertion if kind == "assert" else _end_natively
        _before(between.Between, "after_step", lambda self, progress: act(device) if progress.step == 1 else None)
    elif kind == "traced":
        compiled.BACKEND = "eager"
    else:
        raise SystemExit(f"no such fault: {fault}")


def _full_at(card: FullCard) -> None:
    _before(job, "trainable_model", lambda *_, **__: card.stage("load"))
    evaluations: list[int] = []

    def evaluating(*_: Any, **__: Any) -> None:
        evaluations.append(1)
        if len(evaluations) > 1:  # the first one comes before the first step
            card.stage("eval")

    _before(between, "held_out_losses", evaluating)
    _before(between.Between, "save_adapter", lambda *_: card.stage("save"))
    register_optimizer_step_pre_hook(lambda *_: card.stage("optimizer"))
    loop = job.train

    def train(
        parts: LoopParts, section: TrainSection, total: int, state: TrainState, between: Callable[[TrainState], bool]
    ) -> TrainState:
        with _staged(parts.step_model, card):  # type: ignore[arg-type]
            return loop(parts, section, total, state, between)

    job.train = train


def _before(owner: Any, name: str, act: Callable[..., Any]) -> None:
    """Let something happen before a function of somebody is called."""
    function = getattr(owner, name)

    def acting(*args: Any, **named: Any) -> Any:
        act(*args, **named)
        return function(*args, **named)

    setattr(owner, name, acting)


def _stop(self: between.Between, progress: TrainState, step: int) -> None:
    if progress.step == step:
        request(self.worker.paths, "stop")


def _write_pages(optimizer: torch.optim.Optimizer, run: Path) -> None:
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    large = [tensor for tensor in tensors if tensor.numel() >= 1e5]  # bitsandbytes pages no smaller ones
    paged = sum(bool(getattr(tensor, "is_paged", False)) for tensor in large)
    (run / "pages.json").write_text(json.dumps({"tensors": len(tensors), "large": len(large), "paged": paged}))


def _fail_assertion(device: str) -> None:
    if device == "cpu":
        raise RuntimeError(_ASSERTED)
    table = torch.zeros(4, device="cuda")
    table[torch.tensor([1_000_000], device="cuda")].sum().item()


def _end_natively(device: str) -> None:
    if device == "cpu":
        print(_NATIVE, file=sys.stderr, flush=True)
        os._exit(1)
    from bitsandbytes.functional import quantize_4bit

    weight = torch.zeros(4096, device="cuda")
    try:
        _fail_assertion(device)
    except RuntimeError:
        quantize_4bit(weight)


if __name__ == "__main__":
    inject(sys.argv[2], Path(sys.argv[1]), sys.argv[3])
    sys.exit(run_job(Path(sys.argv[1]), _body, explain=explain))
