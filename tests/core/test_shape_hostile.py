"""Configs that are corrupt, absurd or made to hurt: a shape, or an error that names the key; never anything else."""

from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup

CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
KEYS = [
    *CONFIG,
    "head_dim",
    "tie_word_embeddings",
    "rope_parameters",
    "sliding_window",
    "final_logit_softcapping",
    "hidden_act",
    "attention_bias",
    "mlp_only_layers",
    "decoder_sparse_step",
    "shared_expert_intermediate_size",
    "dtype",
    "partial_rotary_factor",
]
ABSURD: list[Any] = [
    -1, 0, 0.5, 1e308, 10**30, float("nan"), float("inf"), float("-inf"), True, "12", "\x1b[31m", [], [1], ["x"], {},
    {"a": {"b": [{}]}}, 2**26, 2**63,
]  # fmt: skip


@pytest.mark.parametrize(
    "family", ["llama", "qwen2_moe", "gpt_oss", "falcon", "llama4_text", "\x1b]0;never heard of\a"]
)
@pytest.mark.parametrize("key", KEYS)
def test_an_absurd_value_gives_a_shape_or_an_error_that_names_its_key(family: str, key: str) -> None:
    for value in ABSURD:
        try:
            shape = shape_from_config({**CONFIG, "model_type": family, key: value})
            estimate = estimate_vram(shape, Setup())
        except BadInput as error:
            words = str(error)
            # Sizes that only together are absurd name what they make: heads that do not divide, or parameters.
            named = {"hidden_size", "heads", "parameters", "intermediate_size"} if key in CONFIG else {key}
            assert any(name in words for name in (key, *named)), words
            assert words.isprintable(), words
        else:
            assert 0 < estimate.allocated.expected <= estimate.device.high < 2**80
            assert all(note.isprintable() for note in estimate.notes)


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(BadInput, match=key):
        shape_from_config({"model_type": "llama", **{n: v for n, v in CONFIG.items() if n not in (key, "num_experts")}})


def test_which_layers_hold_experts_takes_no_longer_for_a_hostile_list() -> None:
    config = {
        **CONFIG,
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 9,
    }
    for step, dense, sparse in ((1, [], 9), (1, [0, 0, 8, 99, -1], 7), (2, [1, 2], 3), (10, [], 0)):
        shape = shape_from_config({**config, "decoder_sparse_step": step, "mlp_only_layers": dense})
        counted = sum(group.count for group in shape.groups if group.layer.experts)
        assert (counted, shape.layers) == (sparse, 9)
    llama4 = {**config, "model_type": "llama4_text", "interleave_moe_layer_step": 4, "intermediate_size_mlp": 64}
    assert [group.count for group in shape_from_config(llama4).groups] == [7, 2]


def test_a_width_of_four_times_the_hidden_size_is_some_families_own_default() -> None:
    config = {**CONFIG, "model_type": "falcon"}
    del config["intermediate_size"], config["num_experts"]
    assert shape_from_config(config).groups[0].layer.mlp[0].outputs == 4 * 256
