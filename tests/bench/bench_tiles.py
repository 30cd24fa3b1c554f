"""MLPs of a long row in tiles and whole: processor seconds of a training step, side by side.

Run: `python -m tests.bench.bench_tiles`, about two minutes. One thread, turns taken, the least of each.
"""

import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from studio.core.recipe import AdapterSection
from studio.jobs.base.model_class import decoder_layers
from studio.jobs.train.adapter import attach_adapter

TOKENS, TURNS = 8192, 4
LLAMA = {
    "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


def step_seconds(model: Any) -> float:
    """Return the processor seconds of a forward and a backward."""
    ids = torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    model(input_ids=ids).logits.square().mean().backward()
    return time.process_time() - began


def model_of(*, tiled: bool) -> Any:
    """Return a small Llama with an adapter, its layers checkpointed."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    adapted = attach_adapter(base, AdapterSection(rank=16), recompute="all").train()
    for _, layer in () if tiled else decoder_layers(adapted.get_base_model()):
        del layer.mlp.forward  # type: ignore[attr-defined]
    return adapted


def main() -> None:
    """Print both and their ratio."""
    torch.set_num_threads(1)
    models = {name: model_of(tiled=name == "tiles") for name in ("whole", "tiles")}
    taken = [{name: step_seconds(model) for name, model in models.items()} for _ in range(TURNS)]
    seconds = {name: min(turn[name] for turn in taken) for name in models}
    print(
        f"{TOKENS} tokens: whole {seconds['whole']:.2f} s, tiles {seconds['tiles']:.2f} s of processor time;", end=" "
    )
    print(f"ratio {seconds['tiles'] / seconds['whole']:.3f}")


if __name__ == "__main__":
    main()
