"""Shapes from configs: known sizes, several models in one config, and configs that are damaged or hostile."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.core.errors import BadInput, StudioError
from studio.core.shape_from_config import shape_from_config
from studio.core.trainable import AdaptedPart, adapted, check_adapted, check_rank, target_names, trainable_parameters
from tests.core.published_rows import DATA, compared, shapes
from tests.examples import examples

CONFIGS: dict[str, dict[str, Any]] = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
}


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if "_parameters" in config])
def test_published_parameter_counts(name: str):
    assert shapes()[name].parameters == CONFIGS[name]["_parameters"]


def test_trained_parameters_are_those_that_peft_counted():
    counted = [item for item in compared() if "trainable_parameters" in item.row and not item.unlike]
    assert len(counted) >= 20
    for item in counted:
        trained = trainable_parameters(shapes()[item.row["model"]], item.setup.adapted)
        assert trained == item.row["trainable_parameters"], item.row["id"]


def test_a_config_with_several_models_is_read_for_its_text_and_says_so():
    config = {
        "model_type": "mistral3",
        "vision_config": {},
        "dtype": "bfloat16",
        "text_config": {**TINY, "model_type": "mistral"},
    }
    shape = shape_from_config(config)
    assert (shape.family, shape.hidden) == ("mistral", 64)
    assert not shape.doubts
    assert any("towers for images" in note for note in shape.notes)


def test_an_unknown_family_is_a_doubt_and_not_an_error():
    shape = shape_from_config({**TINY, "model_type": "next_year\x1b[31m"})
    assert "next_year" in shape.doubts[0]
    assert "\x1b" not in shape.doubts[0]


def test_a_window_that_is_switched_off_is_none():
    assert shape_from_config({**TINY, "sliding_window": 128}).groups[0].layer.window == 128
    off = {**TINY, "model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}
    assert shape_from_config(off).groups[0].layer.window == 0


def test_dropouts_of_the_model_itself():
    """GPTBigCode drops a tenth where its config does not say so; others nothing."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 96}
    config = {"model_type": "gpt_bigcode", **sizes}
    for said, drops in (({}, True), ({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, False)):
        shape = shape_from_config({**config, **said})
        layer = shape.groups[0].layer
        assert (shape.embedding_dropout, layer.residual_dropout, layer.attention_dropout) == (drops,) * 3
        assert shape.mask_bytes == 96 * 96
    phi = {**TINY, "model_type": "phi"}
    for said, drops in (({}, False), ({"resid_pdrop": 0.1, "embd_pdrop": 0.1}, True)):
        shape = shape_from_config({**phi, **said})
        assert (shape.embedding_dropout, shape.groups[0].layer.residual_dropout) == (drops, drops)
        assert shape.alters_embedding == drops
        assert shape.mask_bytes == 0


def test_sparse_and_dense_layers_are_two_groups():
    config = {
        **TINY,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 6,
        "num_experts": 8,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    }
    groups = shape_from_config(config).groups
    assert [(group.count, group.layer.experts is not None) for group in groups] == [(4, False), (2, True)]


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "64", 1.5, True, 10**12, [64], {}, float("nan"), float("inf")])
def test_a_damaged_size_is_refused_by_name(key: str, value: Any):
    with pytest.raises(BadInput, match=key if value is not None else "config"):
        shape_from_config({**TINY, key: value})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_attention_heads": 5}, "64, which 5"),
        ({"num_key_value_heads": 3}, "4 attention heads, which 3"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"sliding_window": -4}, "sliding_window"),
        (
            {"hidden_size": 2**19, "num_attention_heads": 2**10, "num_hidden_layers": 999, "intermediate_size": 2**26},
            "cannot be",
        ),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict[str, Any], found: str):
    with pytest.raises(BadInput, match=found):
        shape_from_config({**TINY, **changes})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=examples(300))
@given(
    st.dictionaries(
        st.sampled_from([*TINY, "head_dim", "num_experts", "mlp_only_layers", "text_config", "rope_parameters"]),
        json_values,
    )
)
def test_no_config_ends_in_anything_but_a_shape_or_a_clear_error(config: dict[str, Any]):
    for table in (config, {**TINY, **config}):
        with contextlib.suppress(StudioError):
            assert shape_from_config(table).parameters > 0


def test_targets():
    shape = shape_from_config(TINY)
    assert len(target_names(shape, "all-linear")) == 7
    assert target_names(shape, ("self_attn.q_proj", "lm_head")) == {"q_proj", "lm_head"}
    assert [linear.name for _, linear in adapted(shape, frozenset({"lm_head"}))] == ["lm_head"]
    with pytest.raises(BadInput, match=r"gate_up_proj.*perhaps gate_proj"):
        target_names(shape, ("gate_up_proj",))


def test_a_rank_above_every_target_is_refused():
    shape = shape_from_config(TINY)
    names = target_names(shape, "all-linear")
    check_rank(shape, names, 64)
    with pytest.raises(BadInput, match=r"65.*64"):
        check_rank(shape, names, 65)


def test_what_a_training_would_refuse_is_refused_before_it():
    shape = shape_from_config(TINY)
    last = shape.layers - 1
    check_adapted(shape, AdaptedPart("all-linear", 8, rank_pattern=(("q_proj", 4), ("layers.0.*", 2)), layers=(last,)))
    with pytest.raises(BadInput, match=rf"layer {last + 1}; this model has {last + 1}.*0 to {last}"):
        check_adapted(shape, AdaptedPart("all-linear", 8, layers=(0, last + 1)))
    with pytest.raises(BadInput, match=r"rank_pattern names 'v_proj'.*some of: k_proj, q_proj"):
        check_adapted(shape, AdaptedPart(("q_proj", "k_proj"), 8, rank_pattern=(("v_proj", 4),)))
    with pytest.raises(BadInput, match=r"65.*64"):
        check_adapted(shape, AdaptedPart("all-linear", 65))
    with pytest.raises(BadInput, match=r"targets names 'nosuch'"):
        check_adapted(shape, AdaptedPart("nosuch", 8))
