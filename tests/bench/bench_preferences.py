"""What a pair of answers costs beside two rows, and when to measure the reference.

`python -m tests.bench.bench_preferences` prints it, for a small random Llama on this CPU with one thread. Steps are
timed in turns, so that a busy machine slows all alike, and the fastest of each counts. The last lines are the reason
why `studio.jobs.train.reference` measures all pairs before the first step.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.step_work import step_work
from studio.core.vram.setup import setup_of
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.batches import Batcher
from studio.jobs.train.objectives.of_recipe import objective_of
from studio.jobs.train.objectives.pairs import Pair
from studio.jobs.train.step_model import StepModel, evaluating
from studio.probe.pace import reference_share
from tests.fakes.tiny_model import tiny_config

PAIRS, ROUNDS, LENGTH, MICRO_BATCH = 24, 6, 256, 4
CPU = torch.device("cpu")
WIDE = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 8192,
}  # fmt: skip


def examples(shape: tuple[int, int]) -> list[Pair]:
    """Return pairs whose sides have so many tokens, least and most, one half of them an answer."""
    random = np.random.default_rng(3)

    def side() -> Example:
        size = int(random.integers(*shape, endpoint=True))
        ids = random.integers(0, 256, size).astype(np.int32)
        return Example(ids, np.where(np.arange(size) < size // 2, np.int32(IGNORED), ids))

    return [Pair.of(side(), side()) for _ in range(PAIRS)]


def seconds_of(act: Any) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = tiny_config(**WIDE)
    recipe = Recipe().with_("method", "lora").with_("train.micro_batch", MICRO_BATCH).with_("train.seq_len", LENGTH)
    recipe = recipe.with_("model.dtype", "fp32").with_("train.accumulation", 1)
    model = attach_adapter(LlamaForCausalLM(config), recipe.adapter, recompute="all")
    shape = shape_from_config(config.to_dict() | {"model_type": "llama"})
    models = {
        name: StepModel(model, "chunked", nullcontext, objective_of(recipe.with_("train.objective", name)))
        for name in ("sft", "dpo", "orpo")
    }
    full = examples((LENGTH, LENGTH))[:MICRO_BATCH]

    def step(name: str, rows: list[Any]) -> None:
        step_model = models[name]
        step_model.train()
        batch = step_model.objective.batch(rows, pad_id=0, device=CPU)
        (step_model(batch) / len(rows)).backward()
        step_model.zero_grad(set_to_none=True)

    def reference(groups: list[list[Any]]) -> None:
        with evaluating(models["dpo"]):
            for rows in groups:
                models["dpo"].reference(models["dpo"].objective.batch(rows, pad_id=0, device=CPU))

    acts = {
        "sft": lambda: step("sft", [side for pair in full for side in pair.sides]),
        "dpo": lambda: step("dpo", full),
        "orpo": lambda: step("orpo", full),
        "reference": lambda: reference([full]),
    }
    seen: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(ROUNDS + 1):
        for name, act in acts.items():
            taken = seconds_of(act)
            if turn:  # the first turn warms up
                seen[name].append(taken)
    base = min(seen["sft"])
    print(f"{MICRO_BATCH} pairs of 2 x {LENGTH} tokens beside {2 * MICRO_BATCH} supervised rows of {LENGTH}:")
    for name in acts:
        print(f"  {name:10} {min(seen[name]):.3f} s, {min(seen[name]) / base:.2f} of sft")
    setups = [setup_of(recipe.with_("train.objective", name)) for name in ("dpo", "sft")]
    pair, rows = step_work(shape, setups[0]), step_work(shape, replace(setups[1], micro_batch=2 * MICRO_BATCH))
    print(f"  plan: {pair.half + pair.single:.3g} operations for the pairs, {rows.half + rows.single:.3g} for the rows")
    print(f"  plan: the reference's pass takes {reference_share(shape, setups[0], PAIRS, PAIRS):.2f} of a step")

    uneven = examples((LENGTH // 8, LENGTH))
    batcher = Batcher(MICRO_BATCH, 0, CPU, objective=models["dpo"].objective)
    together = batcher.groups(uneven)
    as_they_come = [uneven[start : start + MICRO_BATCH] for start in range(0, PAIRS, MICRO_BATCH)]
    before, within = [], []
    for _ in range(ROUNDS):
        before.append(seconds_of(lambda: reference(together)))
        within.append(seconds_of(lambda: reference(as_they_come)))
    first, every = min(before), min(within)
    print(f"{PAIRS} pairs of {LENGTH // 8} to {LENGTH} tokens a side, the reference's passes:")
    for epochs in (0.5, 1, 3):
        print(
            f"  {epochs:g} epochs: {min(1.0, epochs) * first:.2f} s before the first step (only pairs that are seen), "
            f"{epochs * every:.2f} s in the steps"
        )


if __name__ == "__main__":
    main()
