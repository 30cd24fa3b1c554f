"""Reading all weights of a base for its fingerprint: how fast, what threads win, and what it adds to loading the model.

Run: `python -m tests.bench.bench_weights [GIGABYTES [FOLDER]]`, on a quiet machine with room on the disk. Writes a
Llama of random bf16 weights, and removes it. "cold" asks the system to drop the file's pages first, as far as it does.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import xxhash

from studio.probe import weight_sums as module
from studio.probe.weight_sums import weight_sums

_ROUNDS = 3
_LOAD = """
import sys, time
import torch
from transformers import AutoModelForCausalLM
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(sum(float(p.view(-1)[::1024].float().sum()) for p in model.parameters()) and time.perf_counter() - began)
"""
"""Loaded weights are mapped: a number of every page is looked at, so that all of them are read."""


def main() -> None:
    """Make a model, measure, remove it."""
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    place = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="bench-weights-", dir=place))
    os.environ["LORA_STUDIO_HOME"] = str(folder / "home")
    try:
        files = _make(folder / "model", gigabytes)
        size = sum(path.stat().st_size for path in files) / 1e9
        print(f"{size:.2f} GB in {len(files)} files, {os.cpu_count()} processors, xxhash {xxhash.VERSION}")
        _threads(files, size)
        _beside_loading(folder / "model", files)
        time.sleep(module._YOUNG_SECONDS)
        weight_sums(files)
        print(f"known from before: {1000 * _seconds(lambda: weight_sums(files)):.1f} ms")
    finally:
        shutil.rmtree(folder)


def _threads(files: list[Path], size: float) -> None:
    usual = module._threads
    for state in ("cold", "warm"):
        print(f"{state}, GB/s: read alone " + _rates(lambda: _read(files), files, size, state))
        for threads in (1, 2, 4, 8):
            module._threads = lambda threads=threads: threads  # type: ignore[assignment,misc]
            print(f"  {threads} threads " + _rates(lambda: _sums(files), files, size, state))
    module._threads = usual


def _beside_loading(folder: Path, files: list[Path]) -> None:
    for _ in range(_ROUNDS):
        _drop(files)
        alone = _load(folder)
        _drop(files)
        summed = _seconds(lambda: _sums(files))
        after = _load(folder)
        print(f"load cold {alone:.1f} s; fingerprint cold {summed:.1f} s and then load {after:.1f} s")


def _sums(files: list[Path]) -> None:
    shutil.rmtree(module.cache_root(), ignore_errors=True)
    weight_sums(files)


def _rates(work: Callable[[], None], files: list[Path], size: float, state: str) -> str:
    rates = []
    for _ in range(_ROUNDS):
        if state == "cold":
            _drop(files)
        rates.append(f"{size / _seconds(work):.2f}")
    return ", ".join(rates)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _read(files: list[Path]) -> None:
    room = memoryview(bytearray(module._READ_BYTES))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def _drop(files: list[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _load(folder: Path) -> float:
    done = subprocess.run([sys.executable, "-c", _LOAD, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _make(folder: Path, gigabytes: float) -> list[Path]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_hidden_layers=max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / 47.2e6)),
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(0x3C00, 0x3D00)
    model.save_pretrained(folder, max_shard_size="1GB")
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # pages that were not written yet cannot be dropped
        os.close(descriptor)
    return sorted(folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
