"""The estimate of families with forms of their own beside traces of real steps: latent attention, xIELU, Gemma 4."""

from typing import Any

import pytest

from studio.core.measured import height
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.jobs.measure.trace import Target, trace
from tests.bench.trace_settings import recipe_of

SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ROUTED = {"moe_intermediate_size": 512, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
DEEPSEEK = {
    **ROUTED,
    "num_key_value_heads": 8,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GEMMA = {
    "hidden_size": 1536,
    "head_dim": 256,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "apertus": {},
    "ernie4_5_moe": {"moe_intermediate_size": 512, "moe_num_experts": 8, "moe_k": 2},
    "dots1": {**ROUTED, "first_k_dense_replace": 1},
    "gemma4_text": {
        **GEMMA,
        "num_hidden_layers": 6,
        "layer_types": GEMMA["layer_types"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 8192,
    },
    "gemma3n_text": {**GEMMA, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 8192},
}
CHECKPOINTED = {"method": "lora", "seq_len": 1024, "micro_batch": 2}
KEPT = {"method": "qlora", "seq_len": 512, "recompute": "none"}


def compared(family: str, settings: dict[str, Any]) -> tuple[int, Any]:
    """Return the traced peak and the estimated range of live tensors."""
    config = {**SIZES, "model_type": family, **FAMILIES[family]}
    latent = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    usual = ("q_proj", "k_proj", "v_proj", "o_proj")
    recipe = recipe_of({**settings, "targets": latent if "q_lora_rank" in config else usual})
    peaks = trace(recipe, config, Target("cuda", recipe.model.dtype)).log.peaks()
    estimate = estimate_vram(shape_from_config(config), setup_of(recipe))
    return max(map(height, peaks.values())), estimate.allocated


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text"])
def test_a_step_that_keeps_everything(family: str) -> None:
    traced, estimated = compared(family, KEPT)
    assert estimated.expected == pytest.approx(traced, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma3n_text"}))
def test_a_step_that_computes_layers_again(family: str) -> None:
    traced, estimated = compared(family, CHECKPOINTED)
    assert estimated.expected == pytest.approx(traced, rel=0.02)


@pytest.mark.slow
def test_what_is_counted_roughly_is_in_its_range() -> None:
    """Gemma 3n: what its residual streams hold beside the layers is not followed."""
    traced, estimated = compared("gemma3n_text", CHECKPOINTED)
    assert estimated.low <= traced <= estimated.high
    assert estimated.expected == pytest.approx(traced, rel=0.15)
