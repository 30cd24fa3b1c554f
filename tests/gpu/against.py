"""Checks against others: the peak that was traced, HF Trainer and TRL, and what only a card can run."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from studio.core.recipe import Recipe
from studio.jobs.train.row_attention import packed_attentions
from studio.runs.history import History
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.measure_request import MeasureRequest
from studio.runs.recipe_file import dump_recipe
from tests.bench import bench_train

Check = tuple[str, Callable[[], str]]
Run = Callable[[Recipe], History]

ALLOWED = 0.05
"""How far the traced peak may be from the measured one."""

WANTED = {"hf": 1.25, "trl": 1.5}
"""How many times our useful tokens a second are to be an engine's."""


def checks(folder: Path, tiny: Recipe, run: Run, device: str) -> Iterator[Check]:
    """Yield the name of each check and the check; it returns what was seen.

    Args:
        folder: To work in.
        tiny: A recipe on the tiny model.
        run: Trains, and returns what the run told.
        device: `cuda`; `cpu` rehearses what needs no card.
    """
    for method in ("lora", "qlora"):
        for checkpointing in (True, False):
            recipe = _long(tiny, device).with_("method", method).with_("train.grad_checkpointing", checkpointing)
            word = "checkpointing" if checkpointing else "no checkpointing"
            yield f"{method}, {word}: the traced peak is the measured one", lambda r=recipe: traced(folder, r, device)
    yield "checkpoints on the host: the same losses in less memory", lambda: offloaded(_long(tiny, device), run)
    exact = tiny.with_("model.dtype", "fp32")
    compiled = exact.with_("train.compile", True)
    yield "compiled layers: the same losses", lambda: same(exact, compiled, run, "compile")
    if device == "cuda":
        yield "packed rows go through one flash kernel", _first_way
    if find_spec("liger_kernel"):
        yield "liger's loss: the same losses", lambda: same(tiny, tiny.with_("train.loss", "liger"), run, "loss")
    if find_spec("flash_attn"):
        half = tiny.with_("model.dtype", "bf16")
        flash = half.with_("train.attention", "flash_attention_2")
        yield "flash-attn: the same losses", lambda: same(half, flash, run, "attention")
    for method in ("lora", "qlora"):
        for shape in bench_train.SHAPES:
            name = f"{method} {shape[0]} x {shape[1]}: useful tokens/s against HF Trainer and TRL"
            yield name, lambda m=method, s=shape: faster(m, s, device)


def traced(folder: Path, recipe: Recipe, device: str) -> str:
    """Measure a recipe's step and trace it without weights; returns both peaks.

    Raises:
        AssertionError: They are too far apart.
    """
    if device == "cpu":
        return f"traced only: {_peak(_measured(folder, recipe, 'trace', device)) / 2**20:.0f} MiB"
    seen, trace = (_measured(folder, recipe, how, device) for how in ("auto", "trace"))
    assert seen["source"] == "cuda"
    real, told = _peak(seen), _peak(trace)
    assert abs(told - real) <= ALLOWED * real, f"traced {told / 2**20:.0f} MiB, measured {real / 2**20:.0f} MiB"
    reserved = seen["reserved_bytes"] / 2**20
    return f"measured {real / 2**20:.0f} MiB, traced {told / real - 1:+.1%}, reserved {reserved:.0f} MiB"


def _measured(folder: Path, recipe: Recipe, how: str, device: str) -> dict[str, Any]:
    paths = RunPaths(Path(tempfile.mkdtemp(dir=folder)))
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else "8.0"
    native = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    request = MeasureRequest(dump_recipe(recipe), how, device, "bf16" if native else "fp16", capability)
    write_job(paths, request)
    # A process of its own: a card's counters and a world without weights do not share one.
    command = [sys.executable, "-m", "studio.jobs.measure", str(paths.root)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr[-1000:] + paths.events.read_text("utf-8")[-1000:]
    report: dict[str, Any] = json.loads(paths.report.read_text("utf-8"))
    return report


def _peak(report: dict[str, Any]) -> int:
    return max(sum(parts.values()) for parts in report["peaks"].values())


def offloaded(recipe: Recipe, run: Run) -> str:
    """Train with checkpoints on the device and on the host; returns how the peaks differ."""
    here, there = (run(recipe.with_("train.offload_checkpoints", moved)) for moved in (False, True))
    assert list(here.train.losses) == list(there.train.losses)
    if recipe.device.device == "cpu":
        return "the losses are equal; a CPU moves nothing"
    before, after = (max(history.memory.peak_bytes) for history in (here, there))
    assert after < before, (before, after)
    assert not there.warnings, there.warnings
    return f"peak {before / 2**20:.0f} -> {after / 2**20:.0f} MiB"


def same(one: Recipe, other: Recipe, run: Run, topic: str) -> str:
    """Train two recipes that must not differ; returns how far their losses are apart."""
    first, second = run(one), run(other)
    said = [warning.message for warning in second.warnings if warning.topic == topic]
    assert not said, said
    pairs = zip(second.train.losses, first.train.losses, strict=True)
    worst = max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)
    assert worst <= 5e-2, f"largest relative difference {worst:.2e}"
    return f"largest relative difference {worst:.1e}"


def _first_way() -> str:
    ways = packed_attentions("sdpa", torch.device("cuda"))
    assert len(ways) == 2, "this card is older than torch's flash kernel: rows are taken one by one"
    return f"{ways[0]} before {ways[1]}"


def faster(method: str, shape: tuple[int, int], device: str) -> str:
    """Time a few steps of each engine on the embedded model; returns how many times as long as ours they take."""
    bench_train.DEVICE = device
    ratios = bench_train.speed(method, *shape, steps=12 if device == "cuda" else 3, rounds=2 if device == "cuda" else 1)
    words = ", ".join(f"{name} {ratios[name]:.2f} x" if name in ratios else f"{name} not installed" for name in WANTED)
    short = [name for name, wanted in WANTED.items() if name in ratios and ratios[name] < wanted]
    assert not short or device == "cpu", f"{words}; wanted {WANTED}"
    return words


def _long(tiny: Recipe, device: str) -> Recipe:
    """Return a recipe with rows of many tokens on the embedded model, where activations weigh."""
    for path, value in {
        "model.base": "embedded",
        "data.path": "embedded",
        "model.dtype": "auto",
        "train.micro_batch": 1 if device == "cpu" else 8,
        "train.seq_len": 256 if device == "cpu" else 1024,
        "train.steps": 2,
        "train.packing": "on",
        "train.grad_checkpointing": True,
        "train.optimizer": "adamw_torch" if device == "cpu" else "paged_adamw_8bit",
    }.items():
        tiny = tiny.with_(path, value)
    return tiny
