"""How fast an estimate is, and a table of every published row beside it: `python -m tests.bench.bench_estimate`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from studio.core.gpu_catalogue import find_gpu
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup
from studio.core.vram.step import step_forms
from tests.core.published_rows import GIB, Compared, compared, measured_bytes, shapes

METRICS = ("allocated", "reserved", "device")
ROUNDS = 2000


def microseconds(call: Callable[[int], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Return median and 95th percentile of one call."""
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        call(number)
        times.append(1e6 * (time.perf_counter() - began))
    times.sort()
    return statistics.median(times), times[int(0.95 * len(times))]


def speed() -> None:
    shape, gpu, setup = shapes()["Llama-3.1-8B"], find_gpu("4090"), Setup(seq_len=2048)

    def slide(number: int) -> object:
        return estimate_vram(shape, replace(setup, micro_batch=1 + number % 8, rank=8 + number % 64), gpu)

    def stock(number: int) -> object:
        return estimate_vram(shape, replace(setup, engine="hf", loss="full", micro_batch=1 + number % 8), gpu)

    def cold(number: int) -> object:
        step_forms.cache_clear()
        return estimate_vram(shape, setup, gpu)

    for name, call, rounds in (("slider", slide, ROUNDS), ("stock loop", stock, ROUNDS), ("another set-up", cold, 50)):
        median, late = microseconds(call, rounds)
        print(f"{name:15} {median:8.0f} us median {late:8.0f} us at the 95th percentile")


def row_of(item: Compared) -> str:
    cells = []
    for metric in METRICS:
        measured, error = measured_bytes(item.row, metric), item.error(metric)
        cells.append(" " * 17 if measured is None else f"{measured / GIB:8.2f} {100 * (error or 0):+7.1f}%")
    if not any(cell.strip() for cell in cells):
        expected = item.estimate.reserved.expected / GIB / item.row["measured_gib"] - 1
        cells = [f"{item.row['measured_gib']:8.2f} {100 * expected:+7.1f}% of an unsaid metric ".ljust(51)]
    return (
        f"{item.row['id'][-20:]:20} {item.row['model'][:16]:16} {item.row['method']:5} {' '.join(cells)} {item.unlike}"
    )


def table() -> None:
    print(f"\n{'row':20} {'model':16} {'':5} {'allocated GiB':>17} {'reserved GiB':>17} {'device GiB':>17} unlike")
    for item in compared():
        print(row_of(item))
    for metric in METRICS:
        errors = [e for item in compared() if not item.unlike and (e := item.error(metric)) is not None]
        ordered = sorted(map(abs, errors))
        print(
            f"{metric}: {len(errors)} rows alike, median {100 * statistics.median(ordered):.2f} %, "
            f"90th percentile {100 * ordered[int(0.9 * len(ordered))]:.2f} %, "
            f"from {100 * min(errors):+.2f} to {100 * max(errors):+.2f} %"
        )


if __name__ == "__main__":
    speed()
    table()
