"""Families at the sizes of real models: what transformers builds of its own defaults, and published configs."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from studio.core.families import LEFT_OUT
from studio.core.shape_from_config import shape_from_config

DEFAULTS: dict[str, float] = {
    "apertus": 7.0,
    "deepseek_v3": 671.0,
    "ernie4_5_moe": 21.8,
    "gemma3n_text": 6.8,
    "gemma4_text": 5.1,
    "glm4_moe_lite": 29.9,
    "gpt_oss": 116.8,
    "llama4_text": 107.8,
    "minimax_m2": 228.7,
    "olmoe": 13.4,
    "phimoe": 41.9,
    "smollm3": 3.1,
}
"""Billions of parameters of what transformers' defaults build; most are a published model's sizes."""
GEMMA_3_12B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
GEMMA_4_31B: dict[str, Any] = {
    "model_type": "gemma4_text",
    "attention_k_eq_v": True,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_size": 5376,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_global_key_value_heads": 4,
    "num_hidden_layers": 60,
    "num_key_value_heads": 16,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "vocab_size": 262144,
}


def built(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_defaults_have_the_parameters_that_transformers_builds(family: str) -> None:
    config = CONFIG_MAPPING[family]()
    parameters = shape_from_config(config.to_dict()).parameters
    assert parameters == built(config)
    assert parameters / 1e9 == pytest.approx(DEFAULTS[family], abs=0.06)


def test_a_published_config_that_leaves_sizes_out() -> None:
    shape = shape_from_config(GEMMA_3_12B)
    assert shape.parameters == built(CONFIG_MAPPING["gemma3_text"](**GEMMA_3_12B["text_config"]))
    assert (shape.vocabulary, shape.doubts) == (262208, ())


def test_a_published_config_of_two_widths_of_head() -> None:
    shape = shape_from_config(GEMMA_4_31B)
    assert shape.parameters == built(CONFIG_MAPPING["gemma4_text"](**GEMMA_4_31B))
    assert {heads.width for heads in shape.each_heads} == {256, 512}


@pytest.mark.parametrize("family", sorted(LEFT_OUT))
def test_what_is_left_out_is_what_transformers_takes(family: str) -> None:
    default = CONFIG_MAPPING[family]().to_dict()
    for key, value in LEFT_OUT[family].items():
        own = default[key]
        assert value == (own[0] if isinstance(own, list) else own), key
