"""What a row of the table of families is made of: sizes that are shared, and what the hub has of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HIDDEN, VOCABULARY = 64, 320
"""Inputs of every linear map are a multiple of 64, as NF4's blocks want; the tokenizer has 259 of the tokens."""

Values = dict[str, Any]
TOKENS: Values = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
TEXT: Values = {
    **TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
HEAD_16: Values = {"head_dim": 16}
EXPERTS: Values = {"num_experts": 4, "num_experts_per_tok": 2}
MLA: Values = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
DEEPSEEK: Values = {
    **MLA,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
MAMBA: Values = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 64}
DELTA_NET: Values = {
    **HEAD_16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
VISION: Values = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION: Values = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": HIDDEN,
}
QWEN_TOKENS: Values = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
WRITTEN_BY_TRANSFORMERS_5 = {"qwen3_5", "qwen3_5_moe", "gemma4", "ministral3", "glm4_moe_lite"}
"""Families whose first checkpoints were written by transformers 5, with its words."""
M_ROPE: Values = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}

_WIDER: dict[str, int] = {
    **dict.fromkeys(
        (
            *("hidden_size", "intermediate_size", "intermediate_size_mlp", "block_ff_dim", "moe_intermediate_size"),
            *("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"),
            *("mamba_d_ssm", "out_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"),
        ),
        16,
    ),
    **dict.fromkeys(
        (
            *("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size", "state_size"),
            *("q_lora_rank", "kv_lora_rank"),
        ),
        8,
    ),
    **dict.fromkeys(
        (
            *(
                "num_attention_heads",
                "num_key_value_heads",
                "num_heads",
                "head_dim",
                "global_head_dim",
                "mrope_section",
            ),
            *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
            *("mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim", "n_groups"),
            *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "hidden_size_per_layer_input"),
        ),
        4,
    ),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "vocab_offset"), 100),
}
"""By how much each size grows: hidden size 1024, 16 heads of 64, 16 experts, 32 thousand tokens."""


def widened(values: Mapping[str, Any]) -> Values:
    """Return a config's values with the widths of a real model; layers, and what each of them is, stay."""
    return {key: _wider(value, _WIDER.get(key, 1)) for key, value in values.items()}


def _wider(value: Any, factor: int) -> Any:
    if isinstance(value, Mapping):
        return widened(value)
    if isinstance(value, list):
        return [_wider(item, factor) for item in value]
    return value * factor if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How a family's checkpoint is made.

    Attributes:
        model_type: transformers' name of its config.
        architecture: The class that its `architectures` names.
        values: The config's values; those of `text_config` and so on are tables in it.
        hub: Words of the hub's config that transformers does not write; None takes one away.
        unread: Tensors that the hub has beside those that the class loads, such as multi-token prediction: how their
            names begin, and how those begin whose values they repeat.
        named: How names of tensors begin on the hub, by how transformers writes them.
        mxfp4: Whether experts lie in MXFP4, as gpt-oss is published.
    """

    model_type: str
    architecture: str
    values: Mapping[str, Any] = field(default_factory=dict)
    hub: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    mxfp4: bool = False


_OF_THE_HUB = ("hub", "unread", "named", "mxfp4")


def text(model_type: str, architecture: str, **changes: Any) -> Checkpoint:
    """Return a decoder of `TEXT` with changes; words of `hub`, `unread` and `named` are the checkpoint's own."""
    hub = {name: changes.pop(name) for name in _OF_THE_HUB if name in changes}
    return Checkpoint(model_type, architecture, {**TEXT, **changes}, **hub)


def with_images(model_type: str, architecture: str, text: Values, vision: Values, **changes: Any) -> Checkpoint:
    """Return a checkpoint with towers beside the decoder; the rest as for `text`."""
    hub = {name: changes.pop(name) for name in _OF_THE_HUB if name in changes}
    return Checkpoint(
        model_type, architecture, {"text_config": {**TEXT, **text}, "vision_config": vision, **changes}, **hub
    )


def next_tokens(prefix: str, layer: str, source: str) -> Values:
    """Return the tensors of multi-token prediction as DeepSeek names them: one layer more, with ends of its own."""
    norms = {f"{prefix}{layer}.{name}.weight": "model.norm.weight" for name in ("enorm", "hnorm", "shared_head.norm")}
    return {
        f"{prefix}{layer}.": f"{prefix}{source}.",
        **norms,
        f"{prefix}{layer}.eh_proj.weight": f"{prefix}0.mlp.down_proj.weight",
        f"{prefix}{layer}.embed_tokens.weight": "model.embed_tokens.weight",
    }
