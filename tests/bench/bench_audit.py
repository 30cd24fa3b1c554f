"""What an audit costs: memory of the walk over a model that is far larger, and time against two plain forward passes.

    python -m tests.bench.bench_audit [--memory-gb 4] [--memory-tokens 512] [--time-gb 1] [--time-tokens 4096]

Memory: a synthetic Llama of 4 GB in bf16, in 16 bit and in NF4, one block in memory; the promise is two blocks, the
hidden states and 500 MB, libraries included. Time: a synthetic Llama that fits as a whole in fp32; the walk of two
variants (reading, rounding and scoring included) against two forward passes of the loaded model with its loss, whose
loading and rounding are not counted. CPU seconds, each way in its own process: set OMP_NUM_THREADS=1 on a busy machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROW_TOKENS = 128
HIDDEN, WIDE, VOCABULARY = 2048, 8192, 32000
BLOCK_BYTES = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 3 * HIDDEN * WIDE)


def make(folder: Path, size_bytes: float) -> Path:
    """Write a model of about this size, a shard a block; all blocks hold the same numbers."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from tests.fakes.tiny_model import tiny_tokenizer

    blocks = max(2, round((size_bytes - 4 * VOCABULARY * HIDDEN) / BLOCK_BYTES))
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=VOCABULARY, num_hidden_layers=blocks, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).mul_(0.02).to(torch.bfloat16)

    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE),
    }  # fmt: skip
    block = {f"{name}.weight": noise(*shape) for name, shape in shapes.items()}
    block |= {
        f"{name}.weight": torch.ones(HIDDEN).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")
    }
    outer = {"model.embed_tokens.weight": noise(VOCABULARY, HIDDEN), "lm_head.weight": noise(VOCABULARY, HIDDEN)}
    outer["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    files = {"model-outer.safetensors": outer}
    files |= {
        f"model-{place:03d}.safetensors": {f"model.layers.{place}.{name}": t for name, t in block.items()}
        for place in range(blocks)
    }
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def rows_of(tokens: int) -> list[Any]:
    """Return random rows of 128 tokens with labels everywhere."""
    from studio.jobs.base.data.rows import Example

    draw = np.random.default_rng(0)
    made = [draw.integers(0, VOCABULARY, ROW_TOKENS).astype(np.int32) for _ in range(max(1, tokens // ROW_TOKENS))]
    return [Example(ids, ids.copy()) for ids in made]


def walk(folder: Path, tokens: int, forms: Sequence[str] = ("16-bit", "nf4")) -> dict[str, float]:
    """Carry some forms through all blocks and score them."""
    from studio.jobs.audit.__main__ import return_large_blocks
    from studio.jobs.audit.blocks import parts_of
    from studio.jobs.audit.figures import cost_of
    from studio.jobs.audit.variants import folder_variants
    from studio.jobs.audit.walk import Walk
    from studio.jobs.base.weights.folder_weights import FolderWeights

    return_large_blocks()  # as the job's process does
    began = time.process_time()
    weights = FolderWeights.of(folder)
    parts, variants, rows = parts_of(weights.clean), folder_variants(weights, forms), rows_of(tokens)
    cpu = torch.device("cpu")
    expected = cost_of(parts, variants, rows, device=cpu, alone=False, stored_bytes=2).memory_bytes
    walked = Walk(parts, variants, rows, device=cpu)
    walked.run(lambda fraction, detail: None, lambda carried: False)
    scores = walked.scores()
    hidden = sum(states.nbytes for batches in walked.carried.hidden.values() for states in batches)
    finals = len(variants) * sum(len(row.input_ids) - 1 for row in rows_of(tokens)) * HIDDEN * 4
    took = time.process_time() - began
    return {
        "seconds": took, "hidden_bytes": hidden + finals, "kl": float(scores["nf4"].kl.mean()),
        "expected_bytes": expected,
    }  # fmt: skip


@torch.no_grad()
def plain(folder: Path, tokens: int) -> dict[str, float]:
    """Run the loaded model twice, as it is and with rounded weights, and take the loss."""
    from transformers import AutoModelForCausalLM

    from tests.jobs.audit_cases import rounded

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.stack([torch.from_numpy(row.input_ids).long() for row in rows_of(tokens)])
    seconds = 0.0
    for change in (None, rounded("nf4")):
        for name, module in model.named_modules():
            if change is not None and type(module) is torch.nn.Linear and name != "lm_head":
                module.weight.data = change(name, module.weight.data)
        began = time.process_time()
        for part in ids.split(1024 // ROW_TOKENS):
            model(input_ids=part, labels=part)
        seconds += time.process_time() - began
    return {"seconds": seconds}


def peak_bytes() -> int:
    """Return the highest resident set of this process; `getrusage` would begin at that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def measured(way: str, folder: Path, tokens: int) -> dict[str, float]:
    """Run one way in a process of its own; adds its peak resident set."""
    command = [sys.executable, "-m", "tests.bench.bench_audit", "--way", way, str(folder), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", nargs=3, metavar=("WAY", "FOLDER", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--memory-gb", type=float, default=4.0)
    parser.add_argument("--memory-tokens", type=int, default=512)
    parser.add_argument("--time-gb", type=float, default=1.0)
    parser.add_argument("--time-tokens", type=int, default=4096)
    args = parser.parse_args()
    if args.way:
        way, folder, tokens = args.way
        found = {"walk": walk, "plain": plain}[way](Path(folder), int(tokens))
        print(json.dumps({**found, "peak_bytes": peak_bytes()}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.memory_gb:
            made = make(Path(folder) / "large", args.memory_gb * 1e9)
            size = sum(path.stat().st_size for path in made.glob("*.safetensors"))
            found = measured("walk", made, args.memory_tokens)
            allowed = 2 * BLOCK_BYTES + found["hidden_bytes"] + 500e6
            print(
                f"memory: {size / 1e9:.2f} GB model, {args.memory_tokens} tokens, 2 variants: peak resident "
                f"{found['peak_bytes'] / 1e6:.0f} MB of {allowed / 1e6:.0f} MB allowed (2 blocks of "
                f"{BLOCK_BYTES / 1e6:.0f} MB, hidden states {found['hidden_bytes'] / 1e6:.0f} MB, 500 MB), "
                f"estimated before: {found['expected_bytes'] / 1e6:.0f} MB; {found['seconds']:.0f} CPU s",
                flush=True,
            )
        if args.time_gb:
            made = make(Path(folder) / "small", args.time_gb * 1e9)
            walked, passed = (measured(way, made, args.time_tokens) for way in ("walk", "plain"))
            ratio = walked["seconds"] / passed["seconds"]
            print(
                f"time: {args.time_gb:.1f} GB model, {args.time_tokens} tokens, 2 variants: walk "
                f"{walked['seconds']:.1f} CPU s, two plain forward passes {passed['seconds']:.1f}: {ratio:.2f} times; "
                f"peak resident {walked['peak_bytes'] / 1e6:.0f} and {passed['peak_bytes'] / 1e6:.0f} MB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
