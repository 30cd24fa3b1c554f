"""What a merge costs: our job, its merge without the checks, peft in bf16 and `cp`, on a synthetic Llama in bf16.

    python -m tests.bench.bench_merge [FOLDER] [GB] [--without-peft] [--rounds N]

Makes a checkpoint of about GB (2) in shards and a rank-16 adapter on all linear layers in a temporary folder inside
FOLDER (where that holds `base` and `adapter` already, those are taken), then runs the ways in turn, each in its own
process, files flushed to the disk in all of them; a first `cp` that is not counted warms the page cache. "start" is the
imports, "check" our verification; "work" is what lies between. Resident is the process's own peak, libraries included.
Where there are several rounds, the median of each way follows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from studio.core.events import Phase

_SHARD_BYTES = 10**9


def make(folder: Path, size_bytes: float) -> tuple[Path, Path]:
    """Write base and adapter, tensor by tensor; returns both folders."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from studio.jobs.base.weights.skeleton import build_clean
    from studio.jobs.base.weights.tensor_files import bytes_of
    from studio.jobs.merge.shards import OpenShard, lay_out
    from studio.jobs.merge.steps import Output
    from tests.fakes.tiny_model import tiny_tokenizer

    base, adapter = folder / "base", folder / "adapter"
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
        num_hidden_layers=max(2, round((size_bytes - 2.6e8) / 1.22e8)), tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    clean = build_clean(base)
    outputs = [Output(name, torch.bfloat16, tuple(p.shape)) for name, p in clean.named_parameters()]
    shards = lay_out(outputs, _SHARD_BYTES)
    noise = torch.randn(2**22).mul_(0.02).to(torch.bfloat16)
    for shard in shards:
        file = OpenShard(base, shard)
        for output in shard.outputs:
            size = torch.Size(output.shape).numel()
            with file.writing(output.key) as stretch:
                stretch.write(bytes_of(noise.roll(size).repeat(size // len(noise) + 1)[:size]))
        file.close()
    places = {output.key: shard.name for shard in shards for output in shard.outputs}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    adapted = get_peft_model(clean, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
    weights = {
        name.replace(".default", ""): torch.randn(p.shape) * 0.02
        for name, p in adapted.named_parameters()
        if ".lora_" in name
    }
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors")
    adapted.peft_config["default"].save_pretrained(adapter)
    return base, adapter


def ours(base: Path, adapter: Path, out: Path) -> Iterator[str]:
    """The whole job, with its checks, in the libraries that its own process loads."""
    from studio.jobs.merge.__main__ import without_bitsandbytes

    with without_bitsandbytes():
        from studio.jobs.merge.job import merge_run
        from studio.runs.layout import RunPaths
        from studio.runs.log import read_events
        from studio.runs.requests import MergeRequest
        from studio.runs.worker import Worker

        yield "start"
        run = RunPaths(out.with_name("run"))
        run.root.mkdir()
        with Worker(run) as worker:
            merge_run(worker, MergeRequest(str(adapter), str(base), str(out)))
    assert out.is_dir()
    phases = [event for event in read_events(run.events) if isinstance(event, Phase)]
    checking = [event.at for event in phases if event.name == "checking"]
    (saving,) = [event.at for event in phases if event.name == "saving"]
    yield f"check {saving - checking[0]}"


def peft(base: Path, adapter: Path, out: Path) -> Iterator[str]:
    """Load all in bf16, merge, save; not the fp32 sum, which takes twice this memory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    yield "start"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True).save_pretrained(out)
    _flush(out)


def copying(base: Path, adapter: Path, out: Path) -> Iterator[str]:
    """`cp`."""
    del adapter
    yield "start"
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    _flush(out)


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


WAYS: dict[str, Callable[[Path, Path, Path], Iterator[str]]] = {"cp": copying, "ours": ours, "peft, bf16": peft}


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall seconds of the parts, and the peak of resident bytes."""

    start: float
    work: float
    check: float
    resident: float


def measure(way: str, folder: Path) -> Cost:
    """Return what one way costs, in its own process."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    began = time.monotonic()
    words = [sys.executable, "-W", "ignore", "-m", "tests.bench.bench_merge", str(folder), "--way", way]
    words += ["--began", str(began)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds = time.monotonic() - began
    shutil.rmtree(out, ignore_errors=True)
    start, check, resident = (float(word) for word in done.stdout.split()[-3:])
    return Cost(start, seconds - start - check, check, resident)


def _once(way: str, folder: Path, began: float) -> None:
    """Run one way here; print seconds of start, counted from the process's own, and check, and peak resident bytes."""
    start, check = 0.0, 0.0
    for said in WAYS[way](folder / "base", folder / "adapter", folder / "out"):
        if said == "start":
            start = time.monotonic() - began
        else:
            check = float(said.split()[1])
    print(start, check, _peak_resident_bytes())


def _peak_resident_bytes() -> int:
    """From the kernel's own counter: `getrusage` would hand down the peak of the process that started this one."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("gb", nargs="?", type=float, default=2.0)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--began", type=float, default=0.0, help="of a way: the monotonic clock when it was started")
    args = parser.parse_args()
    if args.way:
        _once(args.way, args.folder, args.began)
        return
    with _checkpoint(args.folder, args.gb) as folder:
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB; largest tensor 131 MB, in fp32 262 MB")
        print(f"{'':12}{'start':>7}{'work':>8}{'x cp':>7}{'check':>8}{'resident MB':>13}")
        measure("cp", folder)
        seen: dict[str, list[Cost]] = {way: [] for way in WAYS if not (args.without_peft and way == "peft, bf16")}
        for _ in range(args.rounds):
            for way, costs in seen.items():
                costs.append(measure(way, folder))
                _tell(way, costs[-1], seen["cp"][-1].work)
        if args.rounds > 1:
            print("medians")
            copied = median(cost.work for cost in seen["cp"])
            for way, costs in seen.items():
                _tell(way, Cost(*(median(getattr(cost, part) for cost in costs) for part in Cost.__slots__)), copied)


@contextmanager
def _checkpoint(given: Path | None, gb: float) -> Iterator[Path]:
    if given is not None and (given / "base").is_dir() and (given / "adapter").is_dir():
        yield given
        return
    with tempfile.TemporaryDirectory(dir=given) as place:
        make(Path(place), gb * 1e9)
        yield Path(place)


def _tell(way: str, cost: Cost, copied: float) -> None:
    figures = f"{cost.start:7.1f}{cost.work:8.1f}{cost.work / copied:7.2f}{cost.check:8.1f}"
    print(f"{way:12}{figures}{cost.resident / 1e6:13.0f}", flush=True)


if __name__ == "__main__":
    main()
