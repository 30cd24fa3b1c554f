"""The trace against real steps: every stage and every component, to the byte."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig

from studio.core.recipe import Recipe
from studio.jobs.measure.storages import Peaks, Storages
from studio.jobs.measure.trace import Target, run_engine, trace

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}


def recipe_of(**fields: Any) -> Recipe:
    recipe = Recipe()
    small = {"adapter.rank": 4, "train.micro_batch": 2, "train.seq_len": 96, "train.accumulation": 1}
    for path, value in {**small, **fields}.items():
        recipe = recipe.with_(path.replace("__", "."), value)
    assert recipe.problems() == ()
    return recipe


def measured(values: dict[str, Any], recipe: Recipe, dtype: str) -> Peaks:
    """The peaks of the same steps with real tensors on this CPU."""
    torch.manual_seed(0)
    storages = Storages()
    bnb.functional.name2qmap.clear()
    run_engine(AutoConfig.for_model(**values), recipe, Target("cpu", dtype), storages)
    return storages.log.peaks()


FAST = [
    {"method": "lora"},
    {"method": "lora", "train__grad_checkpointing": False},
    {"method": "qlora", "train__accumulation": 2, "train__optimizer": "adamw_8bit"},
    {"method": "qlora", "train__grad_checkpointing": False},
]
SLOW = [
    *(
        {"method": method, "train__grad_checkpointing": kept, "train__loss": loss, "model__dtype": dtype}
        for method in ("lora", "qlora")
        for kept in (True, False)
        for loss, dtype in (("full", "bf16"), ("chunked", "fp32"))
    ),
    {"method": "qlora", "model__double_quant": False, "adapter__dropout": 0.1, "train__optimizer": "paged_adamw_32bit"},
    {"method": "lora", "adapter__dora": True, "train__attention": "eager", "adapter__targets": ("q_proj", "v_proj")},
    {"method": "lora", "model__dtype": "fp16"},
    {"method": "qlora", "adapter__modules_to_save": "lm_head"},
]


@pytest.mark.parametrize(
    "fields",
    [*FAST, *(pytest.param(fields, marks=pytest.mark.slow) for fields in SLOW)],
    ids=lambda f: " ".join(map(str, f.values())),
)
def test_a_trace_has_every_byte_of_a_real_step(fields: dict[str, Any]) -> None:
    recipe = recipe_of(**fields)
    dtype = fields.get("model__dtype", "bf16")
    assert trace(recipe, LLAMA, Target("cpu", dtype)).log.peaks() == measured(LLAMA, recipe, dtype)
