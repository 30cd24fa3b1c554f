"""Our loop against HF Trainer + PEFT, TRL's SFTTrainer and Unsloth on the embedded model: time per step, tensor memory.

Engines take turns within one run and medians of the steps are compared: ratios count, absolute numbers are this
machine's. Padding is not useful. Processor seconds are shown beside the wall clock's: a busy neighbour changes them
less. TRL and Unsloth are no dependencies of this project: where they are not installed their rows say so.
`python -m tests.bench.bench_train [STEPS] [ROUNDS] [PART ...] [--cuda]`; parts are `lora:8x1`, `qlora:1x8`, `memory`
and so on, all of them unless named.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

ENGINES = ("studio", "hf", "trl", "unsloth")
SHAPES = ((8, 1), (1, 8))
DEVICE = "cuda" if "--cuda" in sys.argv else "cpu"
WARM_UP_STEPS = 2
MEMORY_STEPS = 2


Run = Callable[[str, str], tuple[str, str]]
"""Runs an engine on some work, in JSON; returns what it printed, and what to say where that holds no result."""


def measure(engine: str, *, run: Run | None = None, **work: Any) -> dict[str, Any]:
    """Run one engine in a process of its own.

    Raises:
        RuntimeError: It left no result.
    """
    printed, why = (run or _in_a_process)(engine, json.dumps({"device": DEVICE, **work}))
    line = next((line for line in printed.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"{engine} broke:\n{why[-2000:]}")
    report: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return report


def _in_a_process(engine: str, words: str) -> tuple[str, str]:
    command = [sys.executable, "-m", "tests.bench.engines", engine, words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout, done.stderr


def speed(method: str, micro_batch: int, accumulation: int, steps: int, rounds: int) -> dict[str, float]:
    """Print seconds per step of each engine; returns how many times as long as ours they take by the wall clock."""
    print(f"\n{method}, micro-batch {micro_batch} x {accumulation}: seconds a step (the same rows: tokens/s inversely)")
    print(f"{'engine':10}{'wall':>8}{'x ours':>8}{'processor':>11}{'x ours':>8}{'first loss':>12}{'last loss':>11}")
    seen: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine, reports in seen.items():
            reports.append(
                measure(engine, method=method, steps=steps, micro_batch=micro_batch, accumulation=accumulation)
            )
    ours: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for engine, reports in seen.items():
        if missing := reports[0].get("missing"):
            print(f"{engine:10}not measured: {missing}")
            continue
        cells = []
        for kind in ("wall_seconds", "processor_seconds"):
            median = statistics.median(second for report in reports for second in report[kind][WARM_UP_STEPS:])
            ratio = median / ours.setdefault(kind, median)
            ratios.setdefault(engine, ratio)
            cells.append(f"{median:8.3f}{ratio:8.2f}")
        losses = reports[0]["losses"]
        print(f"{engine:10}{'   '.join(cells)}{losses[0]:12.4f}{losses[-1]:11.4f}")
    return ratios


def memory(method: str) -> None:
    """Print the peak of tensor bytes above weights and adapter, at batch 4 x 256."""
    print(f"\n{method}, batch 4 x 256: peak bytes of tensors above the loaded model; resident set of the process")
    print(f"{'engine':10}{'tensors MB':>12}{'ours/its':>10}{'resident MB':>13}{'ours/its':>10}")
    ours: list[float] = []
    for engine in ENGINES:
        counted = measure(
            engine, method=method, steps=MEMORY_STEPS, micro_batch=4, accumulation=1, joined=True, memory=True
        )
        if missing := counted.get("missing"):
            print(f"{engine:10}not measured: {missing}")
            continue
        plain = measure(engine, method=method, steps=MEMORY_STEPS, micro_batch=4, accumulation=1, joined=True)
        both = [counted["peak_tensor_bytes"], plain["peak_resident_bytes"]]
        ours = ours or both
        cells = [f"{value / 1e6:12.0f}{own / value:10.2f}" for own, value in zip(ours, both, strict=True)]
        print(f"{engine:10}{' '.join(cells)}")


def main(steps: int = 10, rounds: int = 3, parts: tuple[str, ...] = ()) -> None:
    """Print the tables."""
    print(f"{steps} steps of 8 rows, rank 16 on all linear layers; medians over {rounds} interleaved rounds")
    for method in ("lora", "qlora"):
        if not parts or "memory" in parts:
            memory(method)
        for micro_batch, accumulation in SHAPES:
            if not parts or f"{method}:{micro_batch}x{accumulation}" in parts:
                speed(method, micro_batch, accumulation, steps, rounds)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--cuda"]
    main(*(int(word) for word in words[:2]), parts=tuple(words[2:]))
