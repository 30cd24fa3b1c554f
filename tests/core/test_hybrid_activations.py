"""What hybrids hold in a step: the estimate against traces of the training job's own step on fake tensors.

The traced code is PyTorch's own, which runs where causal-conv1d, flash-linear-attention and mamba-ssm are not
installed. Most of what these small models hold are activations of their mixers.
"""

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from studio.core.measured import height
from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import setup_of
from studio.jobs.measure.trace import Target, trace

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "pad_token_id": 0}
DELTA = {
    **ATTENTION,
    "head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MAMBA = {**ATTENTION, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_chunk_size": 128}
SMALL: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**DELTA, "hidden_size": 128, "intermediate_size": 256},
    "qwen3_next": {
        **DELTA,
        "hidden_size": 128,
        "intermediate_size": 256,
        "mlp_only_layers": [0, 1, 2, 3],
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "lfm2": {
        **ATTENTION,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "granitemoehybrid": {
        **MAMBA,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "shared_intermediate_size": 256,
        "mamba_n_groups": 2,
    },
    "nemotron_h": {
        **ATTENTION,
        "hidden_size": 128,
        "intermediate_size": 512,
        "head_dim": 32,
        "layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 64,
        "ssm_state_size": 32,
        "n_groups": 2,
    },
    "falcon_h1": {**MAMBA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "mamba_d_ssm": 256},
    "bamba": {
        **MAMBA,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
    },
    "mamba2": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "vocab_size": 512,
        "num_heads": 4,
        "head_dim": 64,
        "state_size": 32,
        "n_groups": 2,
        "chunk_size": 128,
    },
    "mamba": {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 512, "intermediate_size": 128, "state_size": 16},
    "jamba": {
        **ATTENTION,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 1,
    },
}


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
SPARSE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"mlp_only_layers": [], "shared_expert_intermediate_size": 64, "num_hidden_layers": 4, **EXPERTS},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "n_routed_experts": 8,
        "moe_shared_expert_intermediate_size": 128,
        "moe_latent_size": 48,
        **EXPERTS,
    },
}


def values_of(family: str, *, sparse: bool = False) -> dict[str, Any]:
    sizes = {**SMALL[family], **(SPARSE[family] if sparse else {})}
    values: dict[str, Any] = CONFIG_MAPPING[family](**sizes).to_dict()
    values.pop("time_step_limit", None)  # holds an infinity, which a config.json cannot
    return values


def recipe_of(**fields: Any) -> Recipe:
    recipe = Recipe()
    small = {"adapter.rank": 4, "train.accumulation": 1, "model.dtype": "bf16", "method": "lora"}
    for path, value in {**small, **fields}.items():
        recipe = recipe.with_(path.replace("__", "."), value)
    assert recipe.problems() == ()
    return recipe


def both(family: str, *, sparse: bool = False, **fields: Any) -> tuple[int, VramEstimate]:
    """Return the highest traced bytes, and the estimate."""
    values, recipe = values_of(family, sparse=sparse), recipe_of(**fields)
    shape = shape_from_config(values)
    assert not shape.doubts
    peaks = trace(recipe, values, Target("cuda", "bf16")).log.peaks()
    return max(map(height, peaks.values())), estimate_vram(shape, setup_of(recipe))


def rows(batch: int, length: int, checkpointing: bool, method: str = "lora") -> dict[str, Any]:
    return {
        "train__micro_batch": batch,
        "train__seq_len": length,
        "train__recompute": "all" if checkpointing else "none",
        "method": method,
    }


# With dense layers in the place of experts peft 0.21 loses the dense MLPs of this family.
MIXERS = {"adapter__targets": ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj")}
FAST = [("granitemoehybrid", rows(1, 160, False))]
SLOW = [
    ("qwen3_5_text", rows(2, 200, True)),
    ("qwen3_5_text", rows(1, 512, False, "qlora")),
    ("qwen3_next", {**rows(2, 256, True), **MIXERS}),
    ("qwen3_next", {**rows(1, 130, False), **MIXERS}),
    ("lfm2", rows(4, 256, False)),
    ("lfm2", rows(1, 1024, True, "qlora")),
    ("granitemoehybrid", rows(2, 512, True, "qlora")),
    ("nemotron_h", rows(1, 300, False)),
    ("nemotron_h", rows(2, 256, True)),
    ("falcon_h1", rows(2, 256, False)),
    ("falcon_h1", rows(1, 2048, True)),
    ("bamba", rows(2, 300, True)),
    ("mamba2", rows(1, 256, False)),
    ("mamba2", rows(4, 128, True)),
    ("mamba", rows(2, 48, False)),
    ("jamba", rows(1, 64, True)),
]


@pytest.mark.parametrize(
    ("family", "fields"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else " ".join(str(part) for part in value.values() if not isinstance(part, tuple))
    ),
)
def test_a_hybrid_holds_what_its_step_holds(family: str, fields: dict[str, Any]) -> None:
    traced, estimate = both(family, **fields)
    assert estimate.allocated.expected == pytest.approx(traced, rel=0.02)
    assert estimate.allocated.low <= traced <= estimate.allocated.high


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(SPARSE))
@pytest.mark.parametrize("fields", [rows(1, 256, False), rows(2, 128, True, "qlora")], ids=["lora", "qlora"])
def test_a_hybrid_with_experts_holds_what_its_step_holds(family: str, fields: dict[str, Any]) -> None:
    traced, estimate = both(family, sparse=True, **fields)
    assert estimate.allocated.expected == pytest.approx(traced, rel=0.02)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1", "mamba"])
def test_the_low_end_leaves_room_for_kernels_and_a_note_says_so(family: str) -> None:
    shape = shape_from_config(values_of(family))
    estimate = estimate_vram(shape, setup_of(recipe_of(**rows(2, 1024, False))))
    assert any("with the kernels of" in note for note in estimate.notes)
    assert estimate.allocated.low < estimate.allocated.expected
    states = estimate_vram(shape, setup_of(recipe_of(**rows(4, 1024, False))))
    spared = states.allocated.expected - states.allocated.low
    assert spared > estimate.allocated.expected - estimate.allocated.low  # more rows, more that a kernel need not keep


def test_a_row_twice_as_long_as_its_chunks_is_padded_to_whole_chunks() -> None:
    shape = shape_from_config(values_of("granitemoehybrid"))  # chunks of 128

    def peak(length: int) -> int:
        return estimate_vram(shape, setup_of(recipe_of(**rows(1, length, False)))).allocated.expected

    assert peak(257) - peak(256) > 20 * (peak(256) - peak(255))
