"""Every family of the table against the modules that transformers itself builds, on the meta device."""

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

from studio.core.families import FAMILIES, INSIDE
from studio.core.recipe import AdapterSection
from studio.core.shape_from_config import shape_from_config
from studio.core.trainable import AdaptedPart, trainable_parameters
from studio.jobs.train.adapter import attach_adapter

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "pad_token_id": 0,
}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 160, "vocab_size": 320},
}
EXPERTS = {"num_experts_per_tok": 2}
ROUTED = {**EXPERTS, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT = {
    **ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "granitemoe": {"num_local_experts": 4, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, **EXPERTS},
    "olmoe": {"num_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 2, **EXPERTS},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, **EXPERTS},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 2, **EXPERTS},
}
"""Mixtures for which peft has names of its own for what all-linear adapts."""
UNMAPPED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1},
    "glm4_moe_lite": LATENT,
    "mistral4": LATENT,
    "glm4_moe": {**ROUTED, "head_dim": 16},
    "dots1": {**ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "minimax_m2": {"num_local_experts": 4, "head_dim": 16, **EXPERTS},
    "phimoe": {"num_local_experts": 4, **EXPERTS},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
}
GEMMAS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [160, 96, 160, 96],
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 32,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 32,
    },
}
HEAD_DIM = {
    *("gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe", "glm", "glm4", "seed_oss", "helium", "ernie4_5"),
    *("cohere2", "nemotron", "mistral", "ministral", "ministral3", "hunyuan_v1_dense"),
}
NOT_IN_TRANSFORMERS = {"chatglm"}
ONLY_INSIDE = {"mistral4": Mistral4ForCausalLM}
"""Text models that transformers builds inside a model of images alone, so that no Auto class knows them."""
ROUTERS = {"router", "shared_expert_gate", "wg", "proj"}
"""Small linear maps that choose experts: the shape counts their weights with the experts."""


def config_of(family: str, **changes: Any) -> Any:
    sizes = {
        **OTHER_SIZES.get(family, SIZES),
        **MORE.get(family, {}),
        **UNMAPPED.get(family, {}),
        **GEMMAS.get(family, {}),
    }
    if family in HEAD_DIM:
        sizes["head_dim"] = 16
    return CONFIG_MAPPING[family](**{**sizes, **changes})


def built(config: Any) -> tuple[int, dict[str, set[tuple[int, int, bool]]]]:
    """Return the parameters and, by name, the linear maps of a real model, its head left out."""
    with torch.device("meta"):
        known = ONLY_INSIDE.get(config.model_type)
        model = known(config) if known else AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    maps: dict[str, set[tuple[int, int, bool]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            path, _, last = name.rpartition(".")
            last = path.rpartition(".")[2] if last.isdigit() else last
            maps.setdefault(last, set()).add((module.in_features, module.out_features, module.bias is not None))
    return sum(parameter.numel() for parameter in model.parameters()), maps


def described(config: Any) -> tuple[int, dict[str, set[tuple[int, int, bool]]]]:
    shape = shape_from_config(config.to_dict())
    assert not shape.doubts or config.model_type == "gemma3n_text"  # its activations are, its sizes are not
    maps: dict[str, set[tuple[int, int, bool]]] = {}
    for _, linear in shape.all_linears():
        maps.setdefault(linear.name, set()).add((linear.inputs, linear.outputs, linear.bias))
    return shape.parameters, maps


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NOT_IN_TRANSFORMERS - set(INSIDE)))
def test_a_family_has_the_modules_that_transformers_builds(family: str):
    config = config_of(family)
    parameters, maps = built(config)
    counted, known = described(config)
    assert counted == parameters
    assert known == {name: sizes for name, sizes in maps.items() if name not in ROUTERS}


@pytest.mark.parametrize("family", sorted(name for name in INSIDE if name.endswith("_text")))
def test_a_text_model_inside_another_is_built_like_its_namesake(family: str):
    more = {**MORE.get(INSIDE[family], {}), **UNMAPPED.get(INSIDE[family], {})}
    heads = {"head_dim": 16} if INSIDE[family] in HEAD_DIM else {}
    config = CONFIG_MAPPING[family](**{**SIZES, **heads, **more})
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    maps: dict[str, set[tuple[int, int, bool]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = (module.in_features, module.out_features, module.bias is not None)
            maps.setdefault(name.rpartition(".")[2], set()).add(size)
    shape = shape_from_config(config.to_dict())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters - shape.head_parameters == parameters
    known: dict[str, set[tuple[int, int, bool]]] = {}
    for _, linear in shape.all_linears():
        known.setdefault(linear.name, set()).add((linear.inputs, linear.outputs, linear.bias))
    assert known == maps


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"head_dim": 32}),
        ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
        ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
        ("starcoder2", {"use_bias": False}),
        ("gpt_bigcode", {"multi_query": False}),
        ("glm", {"attention_bias": False}),
        ("apertus", {"attention_bias": True}),
        ("deepseek_v2", {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True}),
        ("deepseek_v3", {"first_k_dense_replace": 0, "n_shared_experts": 3}),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"]}),
        ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
        ("ernie4_5_moe", {"moe_layer_start_index": 0, "moe_layer_interval": 2, "use_bias": True}),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0, "tie_word_embeddings": False}),
        ("llama4_text", {"moe_layers": [0]}),
        ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}),
        (
            "gemma4_text",
            {
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
                "hidden_size_per_layer_input": 0,
            },
        ),
        ("gemma3n_text", {"intermediate_size": 96, "layer_types": None, "num_hidden_layers": 10}),
        ("phimoe", {"attention_bias": True, "lm_head_bias": True}),
    ],
)
def test_what_a_config_switches_is_followed(family: str, changes: dict[str, Any]):
    config = config_of(family, **changes)
    parameters, maps = built(config)
    assert described(config) == (parameters, {name: sizes for name, sizes in maps.items() if name not in ROUTERS})


@pytest.mark.parametrize("family", ["llama", "phi3", "falcon", *MORE])
def test_all_linear_trains_what_peft_trains(family: str):
    # With dense layers between sparse ones peft 0.21 loses the dense MLPs of this family; real ones have none.
    config = config_of(family, **({"decoder_sparse_step": 1} if family == "qwen3_moe" else {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shape = shape_from_config(config.to_dict())
    trained = trainable_parameters(shape, AdaptedPart("all-linear", 4, as_peft=True))
    assert trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", sorted({*MORE, *UNMAPPED} - set(ONLY_INSIDE)))
@pytest.mark.parametrize("targets", ["all-linear", ("all-linear", "experts"), ("q_proj", "experts.down_proj")], ids=str)
def test_a_mixture_trains_what_is_asked(family: str, targets: str | tuple[str, ...]):
    """Routed experts only where they are named, routers never; as our engine attaches it and plain peft loads it."""
    config = config_of(family)
    if "q_proj" in targets and "q_lora_rank" in UNMAPPED.get(family, {}):
        targets = ("q_b_proj", "experts.down_proj")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = attach_adapter(model, AdapterSection(rank=4, targets=targets), recompute="none")
    shape = shape_from_config(config.to_dict())
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable_parameters(shape, AdaptedPart(targets, 4)) == sum(trained.values())
    assert not [name for name in trained if re.search(r"\.(router|gate|shared_expert_gate)\.", name)]
    assert any(".experts." in name for name in trained) == (targets != "all-linear")
