"""The estimate against real training steps of our own engine on a CPU: every storage's birth and death is tracked.

What a CPU does differently is outside these cases: its unfused dropout mask, and temporaries inside one operator, which
no dispatch sees (logsumexp's in the chunked loss).
"""

import gc
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from studio.core.measured import height
from studio.core.recipe import AdapterSection
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.setup import Setup
from studio.jobs.measure.storages import Storages
from studio.jobs.measure.weightless import frozen_tensors
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.step_model import StepModel
from tests.core.loops import staged

pytestmark = pytest.mark.slow

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
RANK = 8


def four_bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer but the head by a real NF4 one with double quantisation."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            parent, _, last = name.rpartition(".")
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype)
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            setattr(model.get_submodule(parent), last, layer.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def one_step(setup: Setup, dtype: torch.dtype, vocabulary: int) -> int:
    """Return the peak of tracked bytes of a real step, optimizer state left out."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, vocab_size=vocabulary, max_position_embeddings=2048)
    base = LlamaForCausalLM(config).to(dtype)
    if setup.quantised:
        four_bit(base, dtype)
    section = AdapterSection(rank=setup.rank, dropout=setup.dropout, dora=setup.dora)
    model = attach_adapter(base, section, recompute=setup.recompute)
    return tracked_peak(model, setup, dtype, vocabulary)


def tracked_peak(model: Any, setup: Setup, dtype: torch.dtype, vocabulary: int) -> int:
    """Return the peak of tracked bytes of one forward and backward."""
    step = StepModel(model, setup.loss, lambda: torch.autocast("cpu", dtype=dtype, enabled=setup.autocast)).train()
    ids = torch.randint(0, vocabulary, (setup.micro_batch, setup.seq_len))
    batch = {"input_ids": ids, "labels": ids.clone()}  # a mask comes with rows that it hides something of
    gc.collect()
    with Storages() as storages:
        storages.claim(frozen_tensors(model), "base")
        step(batch).backward()
    return max(map(height, storages.log.peaks().values()))


def predicted(setup: Setup, vocabulary: int) -> int:
    shape = shape_from_config({"model_type": "llama", **SHAPE, "vocab_size": vocabulary})
    stages = staged(shape, setup, "flash", workspace=0)
    return max(stages.peaks[1:4]) - stages.standing.resident


# Without checkpointing the chunked loss peaks in a temporary of the hidden states that a CPU trace does not see.
_LOSSES = [
    ("all", 4096, "full"),
    ("all", 512, "full"),
    ("all", 512, "chunked"),
    ("none", 4096, "full"),
    ("none", 512, "full"),
]


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("recompute", "vocabulary", "loss"), _LOSSES)
def test_a_real_step(method: Any, dtype: Any, recompute: Any, vocabulary: int, loss: Any):
    setup = Setup(
        method=method,
        rank=RANK,
        micro_batch=2,
        seq_len=384,
        recompute=recompute,
        loss=loss,
        dtype=dtype,
    )
    measured = one_step(setup, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], vocabulary)
    assert predicted(setup, vocabulary) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("recompute", ["all", "none"])
def test_dora_is_roughly_known(recompute: Any):
    setup = Setup(
        method="lora",
        rank=RANK,
        dora=True,
        micro_batch=2,
        seq_len=384,
        loss="full",
        recompute=recompute,
    )
    measured = one_step(setup, torch.bfloat16, 512)
    assert predicted(setup, 512) == pytest.approx(measured, rel=0.06)


def test_dropout_and_recomputed_layers_go_together():
    """Input casts that were left out of the forward alone made torch refuse the recomputation."""
    setup = Setup(method="lora", rank=RANK, dropout=0.1, micro_batch=1, seq_len=64, loss="full")
    assert one_step(setup, torch.bfloat16, 512) > 0


@pytest.mark.parametrize("recompute", ["all", "none"])
def test_a_mixture_of_experts_with_adapted_attention(recompute: Any):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=512,
        num_experts=8,
        num_experts_per_tok=2,
    )
    setup = Setup(
        method="lora",
        rank=RANK,
        targets=("q_proj", "v_proj"),
        micro_batch=2,
        seq_len=384,
        loss="full",
        recompute=recompute,
    )
    base = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    section = AdapterSection(rank=RANK, targets=("q_proj", "v_proj"))
    model = attach_adapter(base, section, recompute=recompute)
    stages = staged(shape_from_config(config.to_dict()), setup, "flash", workspace=0)
    expected = max(stages.peaks[1:4]) - stages.standing.resident
    assert expected == pytest.approx(tracked_peak(model, setup, torch.bfloat16, 512), rel=0.02)
