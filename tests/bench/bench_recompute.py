"""What layers computed again cost on this processor, and save: `python -m tests.bench.bench_recompute [STEPS]`.

One model of random weights takes the same step with none of its layers computed again, with some, and with all. Peaks
are tracked bytes of a real step beside the estimate. Seconds are this process's own on one thread, the least of many
steps that take turns; beside them stands what the plan's count of operations makes of the seconds with all layers.
"""

import sys
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from studio.core.recipe import AdapterSection, Recompute
from studio.core.shape_from_config import shape_from_config
from studio.core.step_work import step_work
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.step_model import StepModel
from tests.core.test_vram_real_step import tracked_peak

VALUES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "tie_word_embeddings": False,
}
SETUP = Setup(method="lora", rank=16, micro_batch=2, seq_len=512, dtype="fp32", device="cpu")
COUNTS: tuple[Recompute, ...] = ("none", 2, 4, 6, "all")


def model_of(recompute: Recompute) -> Any:
    """Return the model with its adapter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**VALUES)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    return attach_adapter(base, AdapterSection(rank=SETUP.rank), recompute=recompute)


def main() -> None:
    """Print a line for each number of layers."""
    torch.set_num_threads(1)
    steps, shape = int(sys.argv[1]) if len(sys.argv) > 1 else 9, shape_from_config(VALUES)
    ids = torch.randint(0, VALUES["vocab_size"], (SETUP.micro_batch, SETUP.seq_len))
    batch = {"input_ids": ids, "labels": ids.clone()}
    models = [StepModel(model_of(count), SETUP.loss, lambda: torch.autocast("cpu", enabled=False)) for count in COUNTS]
    seconds = [float("inf")] * len(COUNTS)
    for _ in range(steps):
        for place, model in enumerate(models):
            began = time.process_time()
            model.train()(batch).backward()
            seconds[place] = min(seconds[place], time.process_time() - began)
            model.zero_grad()
    print(f"{'again':>6}{'seconds':>9}{'planned':>9}{'':>8}{'peak, MiB':>11}{'planned':>9}")
    every = step_work(shape, replace(SETUP, recompute="all")).operations_per_token
    for count, taken in zip(COUNTS, seconds, strict=True):
        setup = replace(SETUP, recompute=count)
        planned = seconds[-1] * step_work(shape, setup).operations_per_token / every
        stages = dict((estimate := estimate_vram(shape, setup)).stages)
        expected = max(stages[name] for name in ("forward", "loss", "backward")) - estimate.components.optimizer
        peak = tracked_peak(model_of(count), setup, torch.float32, VALUES["vocab_size"])
        print(
            f"{count!s:>6}{taken:9.3f}{planned:9.3f}{taken / planned - 1:+8.1%}"
            f"{peak / 2**20:11.1f}{expected / 2**20:9.1f}{expected / peak - 1:+8.2%}"
        )


if __name__ == "__main__":
    main()
