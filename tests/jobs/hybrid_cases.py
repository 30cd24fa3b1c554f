"""Tiny random hybrids: models whose layers carry a state or a short convolution beside, or instead of, attention."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.fakes.tiny_model import tiny_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 258,
}
_MIXTURE: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_DELTA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "attn_output_gate": True,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _COMMON | _DELTA,
    "qwen3_next": _COMMON
    | _DELTA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "lfm2": _COMMON
    | {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 128,
    },
    "lfm2_moe": _COMMON
    | {
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "conv_L_cache": 3,
        "num_dense_layers": 1,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granitemoehybrid": _COMMON
    | _MAMBA
    | {
        "num_hidden_layers": 2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 128,
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
    },
    "nemotron_h": _COMMON
    | {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "expand": 2,
        "chunk_size": 16,
    },
    "falcon_h1": _COMMON
    | _MAMBA
    | {
        "num_hidden_layers": 2,
        "mamba_d_ssm": 128,
        "lm_head_multiplier": 0.5,
        "embedding_multiplier": 5.6,
        "ssm_multipliers": [0.35, 0.25, 0.35, 0.5, 0.35],
        "mlp_multipliers": [0.88, 0.58],
        "key_multiplier": 0.4,
    },
    "mamba": {
        "vocab_size": 259,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_rank": 8,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "pad_token_id": 258,
        "tie_word_embeddings": False,
    },
    "mamba2": {
        "vocab_size": 259,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
        "conv_kernel": 4,
        "expand": 2,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "pad_token_id": 258,
        "tie_word_embeddings": False,
    },
    "bamba": _COMMON | _MAMBA | {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "jamba": _COMMON
    | {
        "num_hidden_layers": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
    },
    "falcon_mamba": {
        "vocab_size": 259,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_rank": 8,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "pad_token_id": 258,
        "tie_word_embeddings": False,
    },
}


def config_of(family: str) -> Any:
    """Return the config of a tiny model of a family."""
    return AutoConfig.for_model(family, **HYBRIDS[family])


def make_hybrid(folder: Path, family: str, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model folder of a family, weights, tokenizer and template, and return it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0 if "lm_head" in name else 3.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
