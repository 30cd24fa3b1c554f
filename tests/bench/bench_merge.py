"""What a merge costs: our job, its merge without the checks, peft in bf16 and `cp`, on a synthetic Llama in bf16.

    python -m tests.bench.bench_merge [FOLDER] [GB] [--without-peft]

Makes a checkpoint of about GB (2) in shards and a rank-16 adapter on all linear layers in FOLDER (a temporary one),
then runs each way in its own process. The page cache is warm for all. Wall seconds include the imports; resident is the
process's own peak, libraries included. A computed tensor takes seven times its size in bf16: read, made fp32, its delta
twice.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

_SHARD_BYTES = 10**9


def make(folder: Path, size_bytes: float) -> tuple[Path, Path]:
    """Write base and adapter, tensor by tensor; returns both folders."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from studio.jobs.base.skeleton import build_clean
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
    for shard in shards:
        file = OpenShard(base, shard)
        for output in shard.outputs:
            file.write_tensor(torch.randn(output.shape).mul_(0.02).to(torch.bfloat16))
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


def ours(base: Path, adapter: Path, out: Path) -> None:
    """The whole job, with its checks."""
    from studio.jobs.merge.job import merge_run
    from studio.runs.job import MergeRequest
    from studio.runs.layout import RunPaths
    from studio.runs.worker import Worker

    run = RunPaths(out.with_name("run"))
    run.root.mkdir()
    with Worker(run) as worker:
        merge_run(worker, MergeRequest(str(adapter), str(base), str(out)))
    assert out.is_dir()


def merging(base: Path, adapter: Path, out: Path) -> None:
    """Our merge alone."""
    from studio.jobs.base.skeleton import build_skeleton
    from studio.jobs.base.tensor_files import TensorFiles
    from studio.jobs.merge.shards import SHARD_BYTES
    from studio.jobs.merge.steps import MergeSteps
    from studio.jobs.merge.write_steps import write_steps
    from studio.probe.adapter_folder import find_adapter

    steps = MergeSteps(build_skeleton(base, find_adapter(adapter)), TensorFiles(base))
    write_steps(steps, out, "", limit_bytes=SHARD_BYTES, tell=lambda done, name: None, stopping=lambda: False)


def peft(base: Path, adapter: Path, out: Path) -> None:
    """Load all in bf16, merge, save; not the fp32 sum, which takes twice this memory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True).save_pretrained(out)


def copying(base: Path, adapter: Path, out: Path) -> None:
    """`cp`, flushed to the disk as ours is."""
    del adapter
    shutil.copytree(base, out)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {
    "cp": copying, "ours, merge": merging, "ours, whole job": ours, "peft, bf16": peft,
}  # fmt: skip


def measure(way: str, folder: Path) -> tuple[float, float]:
    """Return wall seconds and peak resident bytes of one way in its own process."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    began = time.monotonic()
    words = [sys.executable, "-W", "ignore", "-m", "tests.bench.bench_merge", str(folder), "--way", way]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds = time.monotonic() - began
    shutil.rmtree(out, ignore_errors=True)
    return seconds, float(done.stdout.split()[-1])


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
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        WAYS[args.way](args.folder / "base", args.folder / "adapter", args.folder / "out")
        print(_peak_resident_bytes())
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        base, _ = make(folder, args.gb * 1e9)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        largest = 2048 * 8192 * 2
        print(f"{size / 1e9:.2f} GB; largest computed tensor {largest / 1e6:.0f} MB")
        print(f"{'':18}{'seconds':>9}{'x cp':>7}{'resident MB':>13}")
        copied = 0.0
        for way in WAYS:
            if way == "peft, bf16" and args.without_peft:
                continue
            seconds, resident = measure(way, folder)
            copied = copied or seconds
            print(f"{way:18}{seconds:9.1f}{seconds / copied:7.2f}{resident / 1e6:13.0f}", flush=True)


if __name__ == "__main__":
    main()
