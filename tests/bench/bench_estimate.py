"""How fast an estimate is, and a table of every published row beside it: `python -m tests.bench.bench_estimate`.

Errors come twice: with each row's own loop and library version, and from its flags alone; reserved and device bytes as
`lora-studio plan` gives them, by replay. The closed form that sliders use stands below, with its one fitted constant
chosen on the other sources.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from studio.core.gpu_catalogue import find_gpu
from studio.core.placement.planner import AIMS
from studio.core.stock.estimate import estimate_stock, refined, stock_stages
from studio.core.stock.loop import stock_kernel
from studio.core.stock.replay import replayed
from studio.core.stock.setup import StockSetup, built
from studio.core.vram.decoder_layer import layer_pass
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.frozen import frozen_form
from studio.core.vram.head import head_marks, head_pass
from studio.core.vram.loop import own_loop
from studio.core.vram.micro_batch import layer_marks, micro_batch
from studio.core.vram.report import VramEstimate
from studio.core.vram.reserve import CONTEXT_BYTES, reserved_range, unused_in_segments
from studio.core.vram.setup import Setup
from studio.core.vram.stages import CUBLAS_WORKSPACE_BYTES
from tests.bench.trace_settings import config_of
from tests.core.loops import estimated
from tests.core.published_rows import GIB, Compared, card, compared, from_flags, measured_bytes, shapes

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

    loop = StockSetup(seq_len=2048, loss="full")
    ours = [replace(setup, micro_batch=1 + number % 8, rank=8 + number % 64) for number in range(ROUNDS)]
    theirs = [replace(loop, micro_batch=1 + number % 8, seq_len=64 + number) for number in range(ROUNDS)]

    def slide(number: int) -> object:
        return estimate_vram(shape, ours[number], gpu)

    def stock(number: int) -> VramEstimate:
        return estimate_stock(shape, theirs[number], gpu)

    def cold(number: int) -> object:
        micro_batch.cache_clear()
        layer_marks.cache_clear()
        head_marks.cache_clear()
        layer_pass.cache_clear()
        head_pass.cache_clear()
        own_loop.cache_clear()
        return estimate_vram(shape, setup, gpu)

    def replay(number: int) -> object:
        replayed.cache_clear()
        return refined(stock(number), shape, theirs[number], gpu)

    calls = (
        ("slider", slide, ROUNDS),
        ("stock loop", stock, ROUNDS),
        ("another set-up", cold, 50),
        ("replay", replay, 5),
    )
    for name, call, rounds in calls:
        median, late = microseconds(call, rounds)
        print(f"{name:15} {median:8.0f} us median {late:8.0f} us at the 95th percentile")


def row_of(item: Compared) -> str:
    cells = []
    for metric in METRICS:
        measured, error = measured_bytes(item.row, metric), item.error(metric)
        cells.append(" " * 17 if measured is None else f"{measured / GIB:8.2f} {100 * (error or 0):+7.1f}%")
    if not any(cell.strip() for cell in cells):
        measured, found = item.row["measured_gib"], item.estimate
        either = (100 * (found_.expected / GIB / measured - 1) for found_ in (found.allocated, found.reserved))
        cells = ["{:8.2f} {:+7.1f}% if allocated, {:+.1f}% if reserved".format(measured, *either).ljust(51)]
    return (
        f"{item.row['id'][-20:]:20} {item.row['model'][:16]:16} {item.row['method']:5} {' '.join(cells)} {item.unlike}"
    )


def table() -> None:
    print(f"\n{'row':20} {'model':16} {'':5} {'allocated GiB':>17} {'reserved GiB':>17} {'device GiB':>17} unlike")
    for item in compared():
        print(row_of(item))
    alike = [item for item in compared() if not item.unlike]
    for metric in METRICS:
        summary(metric, [e for item in alike if (e := item.error(metric)) is not None])
    for metric in METRICS:
        pairs = [(getattr(found, metric).expected, measured_bytes(item.row, metric)) for item, found in from_flags()]
        summary(
            f"{metric}, class A from flags alone", [bytes_ / measured - 1 for bytes_, measured in pairs if measured]
        )


def summary(name: str, errors: list[float]) -> None:
    ordered = sorted(map(abs, errors))
    print(
        f"{name}: {len(errors)} rows alike, median {100 * statistics.median(ordered):.2f} %, "
        f"90th percentile {100 * ordered[int(0.9 * len(ordered))]:.2f} %, "
        f"from {100 * min(errors):+.2f} to {100 * max(errors):+.2f} %"
    )


def left_out() -> None:
    """Predict the reserved bytes of each source in closed form, as sliders do.

    The one fitted constant is the fragmentation that suits the other sources best. A replay has none.
    """
    rows: dict[str, list[tuple[Compared, float]]] = {}
    for item in compared():
        measured = measured_bytes(item.row, "reserved") or (measured_bytes(item.row, "device") or 0) - CONTEXT_BYTES
        if not item.unlike and measured > 0:
            rows.setdefault(item.row["id"].partition("-")[0], []).append((item, measured))

    def error(item: Compared, measured: float, fragmentation: float) -> float:
        shape, gpu = built(shapes()[item.row["model"]], item.setup), card(item.row)
        kernel = stock_kernel(shape, item.setup, gpu)
        stages = stock_stages(shape, item.setup, kernel, workspace=CUBLAS_WORKSPACE_BYTES)
        unused = unused_in_segments(shape, frozen_form(item.setup.kind))
        found = reserved_range(stages, stages.peak, stages.peak, unused, fragmentation=fragmentation)
        return found.expected / measured - 1

    errors = []
    for source, own in rows.items():
        others = [pair for name, pairs in rows.items() if name != source for pair in pairs]
        shares = [share / 100 for share in range(21)]
        best = min(shares, key=lambda f: statistics.mean(abs(error(*pair, f)) for pair in others))
        found = [error(*pair, best) for pair in own]
        summary(f"reserved in closed form, {source} left out (fragmentation {best:.2f})", found)
        errors += found
    summary("reserved in closed form, each source left out in turn", errors)


def held(engine: type[Setup], rounds: int) -> None:
    """Replay random set-ups of a loop; print how often the closed form's high end of reserved bytes falls short."""
    draw, gpu, misses, errors = random.Random(17), find_gpu("4090"), [], []  # noqa: S311
    models = [name for name, shape in sorted(shapes().items()) if not any(g.layer.experts for g in shape.groups)]
    for _ in range(rounds):
        shape = shapes()[draw.choice(models)]
        setup: Setup = Setup(
            method=draw.choice(("lora", "qlora")),
            rank=draw.choice((1, 8, 16, 32, 64, 128, 256)),
            micro_batch=draw.choice((1, 1, 1, 2, 3, 4, 8)),
            seq_len=draw.choice((64, 128, 256, 512, 700, 1024, 2048, 4096)),
            accumulation=draw.choice((1, 4)),
            optimizer=draw.choice(("adamw_torch", "adamw_8bit", "paged_adamw_8bit")),
            recompute="all" if draw.random() < 0.7 else "none",
            double_quant=draw.random() < 0.5,
        )
        model = shape
        if engine is StockSetup:
            same = {field.name: getattr(setup, field.name) for field in fields(Setup)}
            loss = draw.choice(("chunked", "full"))
            setup = StockSetup(**{**same, "loss": loss}, transformers="5.24")
            model = built(shape, setup)
        estimate = estimated(shape, setup, gpu)
        if estimate.device.expected > 60 * GIB:
            continue
        workspace = estimate.components.workspace
        peak = replayed.__wrapped__(model, setup, estimate.kernel, workspace=workspace)
        errors.append(estimate.reserved.expected / peak.reserved - 1)
        if estimate.reserved.high < peak.reserved:
            misses.append(peak.reserved - estimate.reserved.high)
    summary(f"reserved in closed form beside a replay, random set-ups of {engine.engine}", errors)
    worst = f", by {max(misses) / 2**20:.0f} MiB at most" if misses else ""
    print(f"  beyond the high end: {len(misses)} of {len(errors)}{worst}")


def planning(rounds: int = 10) -> None:
    """Print the processor time of whole `fit --for` commands, start of Python included, for an 8B on an RTX 4090."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(config_of("Llama-3.1-8B", None)), encoding="utf-8")
        fit = ["fit", "llama-3.1-8b-qlora-24gb", "--model", str(config), "--gpu", "4090", "--ram-gib", "64", "--for"]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environ = kept | {"LORA_STUDIO_HOME": folder}
        for words in (["--version"], *([*fit, aim] for aim in AIMS)):
            times = sorted(processor_seconds([sys.executable, "-m", "studio", *words], environ) for _ in range(rounds))
            print(f"{words[0]} {words[-1]}: {statistics.median(times):.3f} s, least {times[0]:.3f}")


def processor_seconds(words: list[str], environ: dict[str, str]) -> float:
    """Return the user's and the system's seconds of a command."""
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    _, status, used = os.wait4(os.posix_spawn(words[0], words, environ, file_actions=silent), 0)
    if status:
        raise RuntimeError(f"{' '.join(words)} ended with {status}")
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    speed()
    planning()
    table()
    left_out()
    held(Setup, 1000)
    held(StockSetup, 500)
