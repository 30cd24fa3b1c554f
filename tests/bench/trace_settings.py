"""The rows of the grid of traces: models, how many of their layers, and settings. Imports no torch."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from studio.core.recipe import FIELDS, Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.loop import attention_kernel, own_loop
from studio.core.vram.setup import setup_of
from studio.core.vram.stages import stages_of

DATA = Path(__file__).parents[1] / "data"
TRACES = DATA / "traces.json"

PHI_3_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "pad_token_id": 32000,
}
QWEN_2_5_32B = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
OLMO_2_1B = {
    "model_type": "olmo2",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 100352,
    "tie_word_embeddings": False,
}
STABLELM_2_1_6B = {
    "model_type": "stablelm",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25,
    "use_qkv_bias": True,
    "vocab_size": 100352,
    "tie_word_embeddings": False,
}
QWEN_3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
OWN = {
    "Qwen3-30B-A3B": QWEN_3_30B_A3B,
    "Phi-3-mini-4k": PHI_3_MINI,
    "gemma-3-1b": GEMMA_3_1B,
    "Qwen2.5-32B": QWEN_2_5_32B,
    "OLMo-2-1B": OLMO_2_1B,
    "stablelm-2-1_6b": STABLELM_2_1_6B,
}

SHALLOW = {
    "Llama-3.2-1B": 4,
    "Qwen2.5-1.5B": 4,
    "Qwen3-4B": 4,
    "gemma-2b": 3,
    "gemma-2-2b": 4,
    "gemma-3-1b": 6,
    "Mistral-7B-v0.1": 3,
    "Phi-3-mini-4k": 4,
    "PowerLM-3b": 4,
    "falcon-7b": 3,
    "phi-1_5": 4,
    "OLMo-2-1B": 4,
    "stablelm-base-alpha-3b": 3,
    "stablelm-2-1_6b": 4,
    "Qwen3-30B-A3B": 2,
    "Mixtral-8x7B": 2,
}
"""Model and how many of its layers are traced."""

SETTINGS: tuple[dict[str, Any], ...] = (
    {"method": "qlora", "seq_len": 2048, "optimizer": "paged_adamw_8bit"},
    {"method": "lora", "seq_len": 1024, "micro_batch": 2, "rank": 8},
    {"method": "qlora", "seq_len": 512, "micro_batch": 4, "rank": 64, "loss": "full", "optimizer": "adamw_8bit"},
    {"method": "lora", "seq_len": 512, "recompute": "none", "rank": 32, "optimizer": "paged_adamw_32bit"},
    {"method": "qlora", "seq_len": 1024, "recompute": "none", "micro_batch": 2, "double_quant": False},
    {"method": "lora", "seq_len": 768, "micro_batch": 3, "loss": "full", "accumulation": 4, "optimizer": "adamw_8bit"},
    {"method": "qlora", "seq_len": 384, "dropout": 0.05, "rank": 128, "accumulation": 2, "dtype": "fp16"},
    {"method": "lora", "seq_len": 1536, "attention": "eager", "rank": 16},
    {"method": "qlora", "seq_len": 4096, "rank": 4, "micro_batch": 1, "loss": "full"},
    {"method": "lora", "seq_len": 256, "micro_batch": 8, "recompute": "none", "loss": "full", "dropout": 0.1},
)
PER_MODEL = 5
OF_EXPERTS = ("Qwen3-30B-A3B", "Mixtral-8x7B")
ATTENTION_ONLY = {"targets": ("q_proj", "v_proj")}
"""For mixtures of experts."""

SELDOM: tuple[dict[str, Any], ...] = (
    {"method": "qlora", "seq_len": 4096, "offload_checkpoints": True},
    {"method": "lora", "seq_len": 2048, "offload_checkpoints": True, "loss": "full"},
    {"method": "qlora", "seq_len": 1024, "precision": "model.layers.0=16bit"},
    {"method": "qlora", "seq_len": 1024, "quant_type": "fp4", "rank_pattern": "down_proj=64"},
    {"method": "lora", "seq_len": 1024, "layers": "0-1"},
    {"method": "lora", "seq_len": 1024, "targets": ("q_proj", "v_proj"), "rslora": True},
    {"method": "lora", "seq_len": 1024, "dora": True},
    {"method": "qlora", "seq_len": 1024, "micro_batch": 2, "dora": True},
    {"method": "lora", "seq_len": 1024, "targets": ("q_proj", "v_proj", "lm_head")},
    {"method": "lora", "seq_len": 1024, "modules_to_save": "lm_head"},
    {"method": "lora", "seq_len": 1024, "modules_to_save": "down_proj"},
    {"method": "qlora", "seq_len": 1024, "modules_to_save": "norm"},
)
"""What recipes seldom ask for, on one model."""

UNTIED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Mistral-7B-v0.1", {"method": "qlora", "seq_len": 1024, "targets": ("q_proj", "lm_head"), "loss": "full"}),
    ("Mistral-7B-v0.1", {"method": "qlora", "seq_len": 1024, "modules_to_save": "lm_head, embed_tokens"}),
    ("Mistral-7B-v0.1", {"method": "lora", "seq_len": 1024, "modules_to_save": "embed_tokens", "loss": "full"}),
    (
        "Mistral-7B-v0.1",
        {
            **{"method": "lora", "seq_len": 1024, "modules_to_save": "lm_head", "loss": "full"},
            "recompute": "none",
        },
    ),
    (
        "Qwen2.5-1.5B",
        {"method": "lora", "seq_len": 512, "dora": True, "recompute": "none", "dropout": 0.05},
    ),
    (
        "Mistral-7B-v0.1",
        {"method": "qlora", "seq_len": 2048, "dora": True, "recompute": "none", "dropout": 0.05},
    ),
    ("gemma-2b", {"method": "qlora", "seq_len": 4096, "dora": True, "rank": 8, "dropout": 0.05}),
    ("Qwen3-30B-A3B", {"method": "lora", "seq_len": 512}),
    ("Qwen3-30B-A3B", {"method": "qlora", "seq_len": 2048, "micro_batch": 2}),
    ("Qwen3-30B-A3B", {"method": "qlora", "seq_len": 1024, "recompute": "none"}),
    ("Mixtral-8x7B", {"method": "lora", "seq_len": 512, "rank": 8}),
)
"""The same on models whose head is their own, or very wide, and on mixtures."""

WITH_EXPERTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Qwen3-30B-A3B", {"method": "qlora", "seq_len": 1024, "targets": ("q_proj", "experts")}),
    ("Qwen3-30B-A3B", {"method": "lora", "seq_len": 512, "targets": ("experts.down_proj",), "rank": 8}),
    (
        "Mixtral-8x7B",
        {"method": "qlora", "seq_len": 512, "targets": ("q_proj", "experts"), "recompute": "none"},
    ),
    ("Mixtral-8x7B", {"method": "qlora", "seq_len": 2048, "precision": "experts.down_proj=16bit"}),
)
"""Mixtures whose routed experts are adapted too, or held in two formats."""

PARTLY = (
    ("Llama-3.2-1B", {"method": "qlora", "seq_len": 2048, "recompute": 1}),
    (
        "Llama-3.2-1B",
        {
            **{"method": "lora", "seq_len": 1024, "micro_batch": 2, "dropout": 0.05, "optimizer": "adamw_8bit"},
            "recompute": 3,
        },
    ),
    (
        "Qwen2.5-1.5B",
        {"method": "qlora", "seq_len": 1024, "recompute": 2, "offload_checkpoints": True, "accumulation": 4},
    ),
    ("gemma-2-2b", {"method": "qlora", "seq_len": 1024, "recompute": 3, "loss": "full"}),
    ("gemma-3-1b", {"method": "lora", "seq_len": 768, "recompute": 4}),
    ("Qwen3-30B-A3B", {"method": "qlora", "seq_len": 512, "recompute": 1}),
    ("Llama-3.2-1B", {"method": "qlora", "seq_len": 2048, "recompute": 2, "keep_dequantised": True}),
)
"""Some layers computed again, the others with their activations kept."""

FULL_DEPTH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Llama-3.1-8B", {"method": "qlora", "seq_len": 2048, "optimizer": "paged_adamw_8bit"}),
    (
        "Llama-3.1-8B",
        {"method": "qlora", "seq_len": 2048, "optimizer": "paged_adamw_8bit", "keep_dequantised": True},
    ),
    ("Llama-3.1-8B", {"method": "lora", "seq_len": 2048, "optimizer": "paged_adamw_8bit"}),
    ("Llama-2-13b-hf", {"method": "qlora", "seq_len": 2048, "optimizer": "paged_adamw_8bit"}),
    ("Qwen2.5-0.5B", {"method": "qlora", "seq_len": 2048, "optimizer": "paged_adamw_8bit"}),
    ("gemma-3-1b", {"method": "qlora", "seq_len": 2048, "rank": 8}),
    ("SmolLM2-135M", {"method": "lora", "seq_len": 1024, "micro_batch": 4, "recompute": "none"}),
    ("TinyLlama-1.1B", {"method": "lora", "seq_len": 2048, "micro_batch": 2, "loss": "full", "accumulation": 8}),
)

STREAMED: tuple[tuple[str, int | None, dict[str, Any]], ...] = (
    ("Llama-3.2-1B", 4, {"method": "lora", "seq_len": 1024, "stream": 2, "recompute": "none"}),
    ("Mistral-7B-v0.1", 4, {"method": "qlora", "seq_len": 1024, "stream": 3, "modules_to_save": "embed_tokens"}),
    ("gemma-2-9b", 4, {"method": "qlora", "seq_len": 1024, "stream": 3, "precision": "model.layers.3=16bit"}),
    ("Qwen3-30B-A3B", 3, {"method": "qlora", "seq_len": 1024, "stream": 3, "targets": ("q_proj", "experts")}),
    ("Llama-3.1-8B", None, {"method": "lora", "seq_len": 2048, "optimizer": "paged_adamw_8bit", "stream": 32}),
    ("Llama-2-13b-hf", None, {"method": "lora", "seq_len": 2048, "optimizer": "paged_adamw_8bit", "stream": 40}),
    ("Qwen2.5-32B", None, {"method": "lora", "seq_len": 2048, "optimizer": "paged_adamw_8bit", "stream": 64}),
    ("Llama-3.1-70B", None, {"method": "qlora", "seq_len": 2048, "optimizer": "paged_adamw_8bit", "stream": 80}),
    ("Llama-3.1-8B", None, {"method": "qlora", "seq_len": 512, "optimizer": "paged_adamw_8bit", "stream": 32}),
)
"""Streamed bases."""

PRECISION: tuple[tuple[str, int | None, dict[str, Any]], ...] = (
    ("Llama-3.2-1B", 4, {"method": "qlora", "seq_len": 2048, "precision": "layers.1=16bit, layers.3.mlp=int8"}),
    ("Qwen2.5-1.5B", 4, {"method": "qlora", "seq_len": 1024, "recompute": "none", "precision": "*=int8"}),
    ("gemma-2-2b", 4, {"method": "qlora", "seq_len": 1024, "micro_batch": 2, "precision": "mlp=16bit"}),
    (
        "Mistral-7B-v0.1",
        3,
        {"method": "qlora", "seq_len": 1024, "dropout": 0.05, "precision": "self_attn=16bit, *=int8"},
    ),
    (
        "Qwen3-30B-A3B",
        2,
        {"method": "qlora", "seq_len": 1024, "precision": "layers.0.mlp.experts=16bit, self_attn=int8"},
    ),
    (
        "Llama-3.1-8B",
        None,
        {"method": "qlora", "seq_len": 2048, "optimizer": "paged_adamw_8bit", "precision": "layers.0-7=16bit"},
    ),
    (
        "Llama-3.1-8B",
        None,
        {"method": "qlora", "seq_len": 2048, "optimizer": "paged_adamw_8bit", "precision": "*=int8"},
    ),
)
"""Bases held in several precisions."""

_SECTIONS = {
    "model": {"dtype", "double_quant", "quant_type", "precision", "stream"},
    "adapter": {"rank", "dropout", "targets", "layers", "rank_pattern", "rslora", "dora", "modules_to_save"},
    "train": {
        *("seq_len", "micro_batch", "accumulation", "optimizer", "recompute", "loss", "attention"),
        "offload_checkpoints",
        "keep_dequantised",
    },
}


def rows() -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """Yield the model's name, how many of its layers, and the settings; every model gets its own part of the table."""
    for number, (model, layers) in enumerate(SHALLOW.items()):
        of_experts = model in OF_EXPERTS
        for offset in range(2 if of_experts else PER_MODEL):
            settings = SETTINGS[(number * 3 + offset * 2 + offset // 5) % len(SETTINGS)]
            yield model, layers, {**settings, **ATTENTION_ONLY} if of_experts else settings
    for settings in SELDOM:
        yield "Llama-3.2-1B", SHALLOW["Llama-3.2-1B"], settings
    for model, settings in (*UNTIED, *WITH_EXPERTS, *PARTLY):
        yield model, SHALLOW[model], settings
    for model, settings in FULL_DEPTH:
        yield model, None, settings
    yield from (*STREAMED, *PRECISION)


def config_of(model: str, layers: int | None) -> dict[str, Any]:
    """Return a model's config with so many layers, or all."""
    known = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8")) | OWN
    config = {key: value for key, value in known[model].items() if not key.startswith("_")}
    if layers is not None:
        config["num_hidden_layers"] = layers
        config.pop("layer_types", None)
    return config


def recipe_of(settings: dict[str, Any]) -> Recipe:
    """Return the recipe of a row; what it does not name is the recipe's default, but for one micro-batch per step."""
    recipe = Recipe().with_("train.accumulation", 1).with_("model.dtype", "bf16")
    for name, value in settings.items():
        section = next((f"{section}." for section, names in _SECTIONS.items() if name in names), "")
        path = f"{section}{name}"
        recipe = recipe.with_(path, FIELDS[path].kind.read(value) if isinstance(value, str) else value)
    assert recipe.problems() == (), recipe.problems()
    return recipe


def estimated_peak(row: dict[str, Any]) -> int:
    """Return the estimate of a row: bytes of live tensors on a card of compute capability 8.0."""
    return max(estimated_stages(row).values())


def estimated_stages(row: dict[str, Any]) -> dict[str, int]:
    """Return the same stage by stage."""
    shape = shape_from_config(config_of(row["model"], row["layers"]))
    setup = setup_of(recipe_of(row["settings"]))
    loop = own_loop(shape, setup.kind, attention_kernel(shape, setup, None))
    return stages_of(shape, setup, loop).by_name
