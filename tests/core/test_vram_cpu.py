"""`device="cpu"`: predicted tensor bytes beside real training steps on this machine, within 2 %."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from studio.core.measured import height
from studio.core.recipe import AdapterSection, Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup, setup_of
from studio.jobs.measure.storages import Storages
from studio.jobs.measure.trace import Target, run_engine
from studio.jobs.train.adapter import attach_adapter
from studio.probe.models import find_base
from tests.core.test_vram_real_step import RANK, SHAPE, four_bit, tracked_peak

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAIN = Setup(method="lora", rank=RANK, micro_batch=2, seq_len=384, device="cpu")


def real_step(setup: Setup, values: dict[str, Any]) -> int:
    """Return the peak of tracked bytes of a real forward and backward on a model of random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    base = AutoModelForCausalLM.from_config(config, attn_implementation=setup.attention).to(DTYPES[setup.dtype])
    if setup.quantised:
        four_bit(base, DTYPES[setup.dtype])
    section = AdapterSection(rank=setup.rank, dropout=setup.dropout, dora=setup.dora)
    model = attach_adapter(base, section, recompute=setup.recompute)
    return tracked_peak(model, setup, DTYPES[setup.dtype], values["vocab_size"])


def predicted_step(setup: Setup, values: dict[str, Any]) -> int:
    """Return the same as predicted; a lone step has no optimizer state yet."""
    estimate = estimate_vram(shape_from_config(values), setup)
    stages = dict(estimate.stages)
    return max(stages["forward"], stages["loss"], stages["backward"]) - estimate.components.optimizer


CASES = [
    {},
    {"recompute": "none", "dropout": 0.1},
    {"recompute": 1, "method": "qlora", "dropout": 0.1},
    {"recompute": 3, "vocab_size": 8192},
    {"vocab_size": 8192},
    {"vocab_size": 8192, "loss": "full"},
    {"dtype": "fp32", "vocab_size": 8192},
    {"dtype": "fp32", "recompute": "none", "dropout": 0.1, "loss": "full"},
    {"attention": "eager"},
    {"attention": "eager", "recompute": "none"},
    {"method": "qlora", "vocab_size": 8192},
    {"method": "qlora", "recompute": "none", "loss": "full"},
    {"method": "qlora", "double_quant": True, "dropout": 0.1},
    {"micro_batch": 1, "seq_len": 1024},
    {"rank": 64},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()) or "plain")
def test_a_llama_on_a_cpu(changes: dict[str, Any]) -> None:
    changes = dict(changes)
    values = {"model_type": "llama", **SHAPE, "vocab_size": changes.pop("vocab_size", 512)}
    setup = replace(PLAIN, **changes)
    assert predicted_step(setup, values) == pytest.approx(real_step(setup, values), rel=0.02)


FAMILIES = ["qwen3", "phi3", "gpt_neox"]
MORE_FAMILIES = [
    "qwen2",
    "mistral",
    "gemma3_text",
    "phi",
    "olmo",
    "olmo2",
    "granite",
    "stablelm",
    "glm",
    "cohere",
    "nemotron",
]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["all", "none", 2])
@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)])
def test_other_families_on_a_cpu(family: str, recompute: Any) -> None:
    values = {
        "model_type": family,
        **SHAPE,
        "head_dim": 32,
        "vocab_size": 512,
        "sliding_window": 512,
        "pad_token_id": 0,
    }
    setup = replace(PLAIN, recompute=recompute)
    assert predicted_step(setup, values) == pytest.approx(real_step(setup, values), rel=0.02)


def whole_run(values: dict[str, Any], **fields: Any) -> tuple[int, int]:
    """Return predicted and real peak of two optimizer steps and a held-out batch, from load to evaluation."""
    recipe = Recipe().with_("device.device", "cpu").with_("train.seq_len", 256).with_("train.accumulation", 1)
    for name, value in fields.items():
        recipe = recipe.with_(name.replace("__", "."), value)
    storages = Storages()
    run_engine(AutoConfig.for_model(**values), recipe, Target("cpu", recipe.model.dtype), storages)
    real = max(height(parts) for parts in storages.log.peaks().values())
    return estimate_vram(shape_from_config(values), setup_of(recipe)).allocated.expected, real


TINY = {"model_type": "llama", **SHAPE, "vocab_size": 512}
RUNS: list[dict[str, Any]] = [
    {"method": "lora", "model__dtype": "bf16"},
    {"method": "qlora", "model__dtype": "bf16", "train__accumulation": 2, "adapter__rank": 64},
    {"method": "lora", "model__dtype": "fp32", "train__recompute": "none", "train__loss": "full"},
]


@pytest.mark.parametrize("fields", RUNS, ids=lambda fields: " ".join(map(str, fields.values())))
def test_a_whole_run_on_a_cpu(fields: dict[str, Any]) -> None:
    predicted, real = whole_run(TINY, **fields)
    assert predicted == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("recompute", ["all", "none", 1, 2])
def test_the_backward_ends_at_the_first_layer_with_an_adapter(recompute: Any) -> None:
    """Layers before it keep nothing: here two short convolutions, which have neither queries nor values."""
    kinds = ["conv", "conv", "full_attention", "conv", "full_attention"]
    values = {"model_type": "lfm2", **SHAPE, "vocab_size": 512, "num_hidden_layers": 5, "layer_types": kinds}
    fields = {"adapter__targets": ("q_proj", "v_proj"), "train__recompute": recompute}
    predicted, real = whole_run(values, method="lora", model__dtype="bf16", **fields)
    assert predicted == pytest.approx(real, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("recompute", ["all", "none"])
def test_a_whole_run_of_the_embedded_model(method: str, recompute: Any) -> None:
    values = find_base("embedded").config
    assert values is not None
    predicted, real = whole_run(values, method=method, model__dtype="bf16", train__recompute=recompute)
    assert predicted == pytest.approx(real, rel=0.005)
