"""The estimate of attention with sinks against traces of the real step, with a dense block in the place of the experts.

Experts have estimates and tests of their own; here they would hide what attention takes.
"""

from dataclasses import replace
from typing import Any

import pytest
import transformers.models.gpt_oss.modeling_gpt_oss as gpt_oss
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from studio.core.gpu_catalogue import find_gpu
from studio.core.layer_parts import Linear
from studio.core.measured import height
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.core.stock.estimate import estimate_stock
from studio.core.stock.setup import StockSetup
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.loop import attention_kernel, mask_count, own_loop
from studio.core.vram.setup import Setup, setup_of
from studio.core.vram.stages import stages_of
from studio.jobs.measure.trace import Target, trace
from tests.bench.trace_settings import recipe_of

GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 2000,
    "sliding_window": 128,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    "tie_word_embeddings": False,
}
"""gpt-oss-20b with 2 of its 24 layers and a small vocabulary."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Dense(LlamaMLP):
    """A dense block with the signature of the experts'."""

    def __init__(self, config: Any) -> None:
        config.mlp_bias, config.hidden_act = False, "silu"
        super().__init__(config)

    def forward(self, x: Tensor) -> Any:
        """Return the output, and no router's scores."""
        return super().forward(x), None


def dense_shape() -> ModelShape:
    shape = shape_from_config(GPT_OSS)
    (group,) = shape.groups
    hidden, inner, heads = 2880, 2880, 64
    mlp = (Linear("gate_proj", hidden, inner), Linear("up_proj", hidden, inner), Linear("down_proj", inner, hidden))
    layer = replace(group.layer, experts=None, mlp=mlp, norm_parameters=2 * hidden + heads)
    return replace(shape, groups=(replace(group, layer=layer),))


FAST: list[dict[str, Any]] = [{"method": "lora", "seq_len": 1024, "recompute": "none"}]
SLOW: list[dict[str, Any]] = [
    {"method": "qlora", "seq_len": 2048},
    {"method": "qlora", "seq_len": 1024, "recompute": "none", "micro_batch": 2},
    {"method": "lora", "seq_len": 96, "micro_batch": 8, "recompute": "none"},
    {"method": "lora", "seq_len": 1024, "dtype": "fp16", "recompute": "none"},
    {"method": "qlora", "seq_len": 2048, "dtype": "fp16"},
    {"method": "lora", "seq_len": 1024, "dtype": "fp32", "recompute": "none"},
    {"method": "lora", "seq_len": 1024, "attention": "eager"},
    {"method": "lora", "seq_len": 512, "attention": "eager", "micro_batch": 2, "recompute": "none"},
]


@pytest.mark.parametrize("settings", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_estimate_is_what_a_traced_step_takes(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(gpt_oss, "GptOssMLP", Dense)
    recipe = recipe_of({**settings, "targets": TARGETS})
    dtype = settings.get("dtype", "bf16")
    # In fp16 on a card that has no flash kernel, as fp16 is what such cards compute in.
    capability = (7, 5) if dtype == "fp16" else (8, 0)
    shape, setup = dense_shape(), setup_of(recipe)
    kernel = attention_kernel(shape, setup, find_gpu("T4") if dtype == "fp16" else None)
    assert kernel == settings.get("attention", "flash" if dtype == "bf16" else "efficient")
    peaks = trace(recipe, GPT_OSS, Target("cuda", dtype, capability)).log.peaks()
    stages = stages_of(shape, setup, own_loop(shape, setup.kind, kernel)).by_name
    assert max(stages.values()) == pytest.approx(max(map(height, peaks.values())), rel=0.02)


def test_gpt_oss_20b_is_planned_as_it_was_traced() -> None:
    """24 layers and all of its vocabulary; a trace of that took a minute and gave 12.40 GiB."""
    shape = shape_from_config({**GPT_OSS, "num_hidden_layers": 24, "layer_types": None, "vocab_size": 201088})
    setup = Setup(seq_len=2048, rank=16, targets=TARGETS, optimizer="paged_adamw_8bit")
    assert estimate_vram(shape, setup).allocated.expected == pytest.approx(12.40 * 2**30, rel=0.005)
    assert estimate_vram(shape, replace(setup, attention="eager")).allocated.expected > 13.9 * 2**30


def test_windows_take_no_mask_where_the_flash_kernel_knows_them() -> None:
    shape, setup = dense_shape(), Setup(seq_len=2048)
    assert mask_count(shape, setup, "flash") == 0
    assert mask_count(shape, setup, "efficient") == mask_count(shape, setup, "cpu") == 1
    assert mask_count(shape, setup, "eager") == 2
    assert mask_count(shape, Setup(seq_len=96), "efficient") == 0


def test_the_plan_says_eager_only_where_it_is() -> None:
    shape = shape_from_config(GPT_OSS)
    fused, eager = (estimate_vram(shape, Setup(attention=name, seq_len=4096)) for name in ("sdpa", "eager"))
    assert fused.kernel == "flash"
    assert not any("eager" in note for note in fused.notes)
    assert eager.allocated.expected > fused.allocated.expected
    stock = estimate_stock(shape, StockSetup(seq_len=4096))
    assert stock.kernel == "eager", "transformers alone has nothing else"
    assert any("eager" in note for note in stock.notes)
    dropping = shape_from_config({**GPT_OSS, "attention_dropout": 0.1})
    said = estimate_vram(dropping, Setup(seq_len=4096))
    assert said.kernel == "eager"
    assert any("eager" in note for note in said.notes)
