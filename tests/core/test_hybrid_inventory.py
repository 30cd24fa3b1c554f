"""Every hybrid of the table against the modules that transformers itself builds, on the meta device."""

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from studio.core.errors import BadInput
from studio.core.hybrid_layers import HYBRIDS
from studio.core.shape_from_config import shape_from_config
from studio.core.trainable import AdaptedPart, trainable_parameters
from tests.core.test_shape_inventory import ROUTERS, SIZES, built

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 12, "mamba_d_head": 16, "mamba_chunk_size": 32}
SMALL: dict[str, dict[str, Any]] = {
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 48},
    "lfm2": {"full_attn_idxs": [1], "block_multiple_of": 16},
    "lfm2_moe": {
        **EXPERTS,
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "nemotron_h": {
        "head_dim": 16,
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
        "ssm_state_size": 12,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 48,
        "num_experts_per_tok": 2,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 12, "n_groups": 2, "chunk_size": 32},
    "mamba": {"state_size": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
    },
}


REAL: dict[str, tuple[str, dict[str, Any], float]] = {
    "Qwen3-Next-80B-A3B": ("qwen3_next", {}, 79.7),
    "Qwen3.5-27B": (
        "qwen3_5_text",
        {
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 64,
            "num_attention_heads": 24,
            "linear_num_value_heads": 48,
        },
        26.9,
    ),
    "Qwen3.5-35B-A3B": ("qwen3_5_moe_text", {}, 34.7),
    "LFM2-1.2B": (
        "lfm2",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "block_ff_dim": 12288,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        },
        1.17,
    ),
    "LFM2-8B-A1B": (
        "lfm2_moe",
        {
            "num_hidden_layers": 24,
            "layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
        },
        8.34,
    ),
    "Granite-4.0-H-Tiny": (
        "granitemoehybrid",
        {
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "intermediate_size": 512,
            "shared_intermediate_size": 1024,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "vocab_size": 100352,
            "tie_word_embeddings": True,
            "mamba_d_state": 128,
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        },
        6.94,
    ),
    "Granite-4.0-H-Small": (
        "granitemoehybrid",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 768,
            "shared_intermediate_size": 1536,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "vocab_size": 100352,
            "tie_word_embeddings": True,
            "mamba_d_state": 128,
            "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
        },
        32.2,
    ),
    "Nemotron-H-8B": (
        "nemotron_h",
        {"hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
        8.10,
    ),
    "Nemotron-3-Nano-30B-A3B": (
        "nemotron_h",
        {
            "hidden_size": 2688,
            "num_key_value_heads": 2,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "mamba_num_heads": 64,
        },
        31.6,
    ),
    "Falcon-H1-1.5B": (
        "falcon_h1",
        {
            "num_hidden_layers": 24,
            "hidden_size": 2048,
            "intermediate_size": 4608,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "vocab_size": 65537,
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "mamba_d_ssm": 3072,
        },
        1.55,
    ),
    "Falcon-H1-7B": (
        "falcon_h1",
        {
            "num_hidden_layers": 44,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "vocab_size": 130048,
            "mamba_n_heads": 24,
            "mamba_d_head": 128,
            "mamba_d_ssm": 3072,
        },
        7.59,
    ),
}
"""Sizes of published configs, each with its parameters in billions; what is left out is the default of transformers'
config class, which is made after that checkpoint."""


def config_of(family: str, **changes: Any) -> Any:
    sizes = {**SIZES, **SMALL[family], **changes}
    if family == "nemotron_h":
        sizes.pop("num_hidden_layers")
    return CONFIG_MAPPING[family](**sizes)


def described(config: Any) -> tuple[int, dict[str, set[tuple[int, int, bool]]]]:
    shape = shape_from_config(config.to_dict())
    maps: dict[str, set[tuple[int, int, bool]]] = {}
    for _, linear in shape.all_linears():
        maps.setdefault(linear.name, set()).add((linear.inputs, linear.outputs, linear.bias))
    return shape.parameters, maps


@pytest.mark.parametrize("family", sorted(HYBRIDS))
def test_a_hybrid_has_the_modules_that_transformers_builds(family: str):
    config = config_of(family)
    parameters, maps = built(config)
    counted, known = described(config)
    assert known == {name: sizes for name, sizes in maps.items() if name not in ROUTERS}
    assert counted == parameters


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_next", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
        ("qwen3_next", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3_5_text", {"layer_types": ["full_attention"] * 2 + ["linear_attention"] * 2}),
        ("lfm2", {"block_auto_adjust_ff_dim": False, "conv_bias": True}),
        ("lfm2", {"layer_types": ["conv", "conv"]}),
        ("granitemoehybrid", {"num_local_experts": 0, "mamba_n_groups": 2, "mamba_proj_bias": True}),
        ("granitemoehybrid", {"position_embedding_type": "rope", "attention_bias": True, "mamba_conv_bias": False}),
        ("nemotron_h", {"moe_latent_size": 24, "mlp_bias": True, "use_bias": True}),
        (
            "falcon_h1",
            {"mamba_rms_norm": True, "projectors_bias": True, "mamba_proj_bias": True, "attention_bias": True},
        ),
        ("falcon_h1", {"mamba_d_ssm": None, "mamba_d_head": "auto"}),
        ("bamba", {"attn_layer_indices": None, "mlp_bias": True}),
        ("mamba2", {"use_bias": True, "use_conv_bias": False}),
        ("mamba", {"use_bias": True, "time_step_rank": 6}),
    ],
)
def test_what_a_hybrids_config_switches_is_followed(family: str, changes: dict[str, Any]):
    config = config_of(family, **changes)
    parameters, maps = built(config)
    counted, known = described(config)
    assert known == {name: sizes for name, sizes in maps.items() if name not in ROUTERS}
    assert counted == parameters


def test_the_kinds_of_layers_are_known_in_their_order():
    shape = shape_from_config(config_of("qwen3_next").to_dict())
    assert shape.kinds == (0, 0, 0, 1)
    assert [group.count for group in shape.groups] == [3, 1]
    mixers = [group.layer.mixer for group in shape.groups]
    assert mixers[0] is not None
    assert mixers[0].kind == "delta"
    assert mixers[1] is None
    shape = shape_from_config(config_of("nemotron_h").to_dict())
    assert shape.kinds == (0, 1, 2, 3, 0)
    assert [bool(group.layer.mixer) for group in shape.groups] == [True, False, False, False]
    assert [bool(group.layer.attention) for group in shape.groups] == [False, False, True, False]


@pytest.mark.parametrize("name", sorted(REAL))
def test_a_published_hybrid_has_its_published_size(name: str):
    family, sizes, billions = REAL[name]
    config = CONFIG_MAPPING[family](**sizes)
    counted = shape_from_config(config.to_dict()).parameters
    assert counted == built(config)[0]
    assert counted / 1e9 == pytest.approx(billions, rel=0.005)


def test_kinds_of_layers_that_a_family_does_not_have_are_counted_with_doubt():
    sizes = {**SIZES, "model_type": "llama"}
    assert not shape_from_config({**sizes, "layer_types": ["full_attention", "sliding_attention"]}).doubts
    (doubt,) = shape_from_config({**sizes, "layer_types": ["full_attention", "linear_attention"]}).doubts
    assert "linear_attention" in doubt


def test_a_kind_that_a_hybrid_does_not_have_is_refused():
    values = config_of("qwen3_next").to_dict()
    with pytest.raises(BadInput, match="layer kind 'sliding_attention'"):
        shape_from_config({**values, "layer_types": ["sliding_attention"] * 4})
    with pytest.raises(BadInput, match="kinds of 3 layers, but has 4"):
        shape_from_config({**values, "layer_types": ["full_attention"] * 3})


def test_all_linear_and_a_layer_of_a_hybrid_train_what_that_layer_has():
    shape = shape_from_config(config_of("qwen3_5_text").to_dict())
    assert trainable_parameters(shape, AdaptedPart("all-linear", 4, layers=(3,))) == 4 * sum(
        linear.inputs + linear.outputs for linear in shape.groups[1].layer.linears
    )
    assert trainable_parameters(shape, AdaptedPart(("in_proj_qkv",), 4, layers=(3,))) == 0
    ranked = AdaptedPart(("in_proj_qkv", "out_proj"), 4, rank_pattern=(("linear_attn.out_proj", 8),))
    mixer = shape.groups[0].layer.mixer
    assert mixer is not None
    assert trainable_parameters(shape, ranked) == 3 * (
        4 * (mixer.inputs[0].inputs + mixer.inputs[0].outputs) + 8 * (mixer.out.inputs + mixer.out.outputs)
    )
