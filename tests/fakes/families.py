"""Tiny random checkpoints of many families, in the form in which the hub holds them.

A row of `FAMILIES` is the class that a checkpoint's `architectures` names, and the sizes of its config. transformers
builds it and writes it: its classes convert keys as they load, and `save_pretrained` writes them back as the hub has
them. What it does not write, the hub's config words and tensors that no class loads, is added here.

To write them into a folder: `python -m tests.fakes.families FOLDER [NAME ...]`.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.fakes.tiny_model import tiny_tokenizer

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
MAMBA: Values = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
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
    """

    model_type: str
    architecture: str
    values: Mapping[str, Any] = field(default_factory=dict)
    hub: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)


_OF_THE_HUB = ("hub", "unread", "named")


def _text(model_type: str, architecture: str, **changes: Any) -> Checkpoint:
    hub = {name: changes.pop(name) for name in _OF_THE_HUB if name in changes}
    return Checkpoint(model_type, architecture, {**TEXT, **changes}, **hub)


def _with_images(model_type: str, architecture: str, text: Values, vision: Values, **changes: Any) -> Checkpoint:
    hub = {name: changes.pop(name) for name in _OF_THE_HUB if name in changes}
    return Checkpoint(
        model_type, architecture, {"text_config": {**TEXT, **text}, "vision_config": vision, **changes}, **hub
    )


def _next_tokens(prefix: str, layer: str, source: str) -> Values:
    """Return the tensors of multi-token prediction as DeepSeek names them: one layer more, with ends of its own."""
    norms = {f"{prefix}{layer}.{name}.weight": "model.norm.weight" for name in ("enorm", "hnorm", "shared_head.norm")}
    return {
        f"{prefix}{layer}.": f"{prefix}{source}.",
        **norms,
        f"{prefix}{layer}.eh_proj.weight": f"{prefix}0.mlp.down_proj.weight",
        f"{prefix}{layer}.embed_tokens.weight": "model.embed_tokens.weight",
    }


FAMILIES: dict[str, Checkpoint] = {
    # Dense decoders.
    "llama": _text("llama", "LlamaForCausalLM"),
    "mistral": _text("mistral", "MistralForCausalLM", sliding_window=None, **HEAD_16),
    "qwen2": _text("qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": _text("qwen3", "Qwen3ForCausalLM", tie_word_embeddings=True, **HEAD_16),
    "smollm3": _text("smollm3", "SmolLM3ForCausalLM", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]),
    "phi": _text("phi", "PhiForCausalLM", num_key_value_heads=4),
    "phi3": _text("phi3", "Phi3ForCausalLM", sliding_window=2047),
    "gemma": _text("gemma", "GemmaForCausalLM", num_key_value_heads=1, **HEAD_16),
    "gemma2": _text("gemma2", "Gemma2ForCausalLM", query_pre_attn_scalar=16, **HEAD_16),
    "gemma3_text": _text(
        "gemma3_text",
        "Gemma3ForCausalLM",
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
        **HEAD_16,
    ),
    "olmo": _text("olmo", "OlmoForCausalLM", num_key_value_heads=4),
    "olmo2": _text("olmo2", "Olmo2ForCausalLM"),
    "olmo3": _text("olmo3", "Olmo3ForCausalLM", layer_types=["sliding_attention", "full_attention"]),
    "granite": _text(
        "granite",
        "GraniteForCausalLM",
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
    ),
    "stablelm": _text("stablelm", "StableLmForCausalLM", use_qkv_bias=True, partial_rotary_factor=0.25),
    "gpt_neox": _text("gpt_neox", "GPTNeoXForCausalLM", rotary_pct=0.25),
    "falcon": Checkpoint(
        "falcon",
        "FalconForCausalLM",
        {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bias": False},
    ),
    "starcoder2": _text("starcoder2", "Starcoder2ForCausalLM", sliding_window=512),
    "cohere": _text("cohere", "CohereForCausalLM", use_qk_norm=True),
    "cohere2": _text(
        "cohere2", "Cohere2ForCausalLM", sliding_window=512, layer_types=["sliding_attention", "full_attention"]
    ),
    "glm": _text("glm", "GlmForCausalLM", **HEAD_16),
    "glm4": _text("glm4", "Glm4ForCausalLM", **HEAD_16),
    "exaone4": _text(
        "exaone4", "Exaone4ForCausalLM", sliding_window=512, layer_types=["sliding_attention", "full_attention"]
    ),
    "nemotron": _text("nemotron", "NemotronForCausalLM"),
    "seed_oss": _text("seed_oss", "SeedOssForCausalLM", attention_bias=True, **HEAD_16),
    "apertus": _text("apertus", "ApertusForCausalLM"),
    "ernie4_5": _text("ernie4_5", "Ernie4_5ForCausalLM", **HEAD_16),
    "helium": _text("helium", "HeliumForCausalLM", **HEAD_16),
    "hunyuan_v1_dense": _text("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", **HEAD_16),
    "arcee": _text("arcee", "ArceeForCausalLM"),
    "ministral3": _text("ministral3", "Ministral3ForCausalLM", **HEAD_16),
    # Mixtures of experts.
    "mixtral": _text("mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _text(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
        **EXPERTS,
    ),
    "qwen3_moe": _text(
        "qwen3_moe", "Qwen3MoeForCausalLM", moe_intermediate_size=64, norm_topk_prob=True, **HEAD_16, **EXPERTS
    ),
    "olmoe": _text("olmoe", "OlmoeForCausalLM", **EXPERTS),
    "granitemoe": _text("granitemoe", "GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "phimoe": _text("phimoe", "PhimoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": _text(
        "gpt_oss",
        "GptOssForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"],
        **HEAD_16,
    ),
    "deepseek_v2": _text("deepseek_v2", "DeepseekV2ForCausalLM", **{**DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": _text(
        "deepseek_v3", "DeepseekV3ForCausalLM", unread=_next_tokens("model.layers.", "2", "1"), **DEEPSEEK
    ),
    "glm4_moe": _text(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        use_qk_norm=True,
        unread=_next_tokens("model.layers.", "2", "1"),
        **HEAD_16,
    ),
    "glm4_moe_lite": _text(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        unread=_next_tokens("model.layers.", "2", "1"),
        **MLA,
    ),
    "ernie4_5_moe": _text(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=64,
        moe_num_shared_experts=1,
    ),
    "minimax": _text(
        "minimax",
        "MiniMaxForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=32,
        layer_types=["linear_attention", "full_attention"],
        **HEAD_16,
    ),
    "minimax_m2": _text("minimax_m2", "MiniMaxM2ForCausalLM", num_local_experts=4, num_experts_per_tok=2, **HEAD_16),
    "lfm2_moe": _text(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        num_hidden_layers=3,
        num_dense_layers=1,
        moe_intermediate_size=64,
        layer_types=["conv", "conv", "full_attention"],
        **EXPERTS,
    ),
    "qwen3_next": _text(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        unread={"mtp.layers.0.": "model.layers.1.", "mtp.norm.weight": "model.norm.weight"},
        **DELTA_NET,
        **EXPERTS,
    ),
    # Hybrids: recurrent layers, convolutions.
    "lfm2": _text(
        "lfm2",
        "Lfm2ForCausalLM",
        intermediate_size=192,
        block_multiple_of=64,
        layer_types=["conv", "full_attention"],
        hub={"intermediate_size": None, "block_ff_dim": 192, "layer_types": None, "full_attn_idxs": [1]},
    ),
    "granite4_hybrid": _text(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
        **MAMBA,
    ),
    "nemotron_h": _text(
        "nemotron_h",
        "NemotronHForCausalLM",
        num_hidden_layers=None,
        layers_block_type=["mamba", "mlp", "attention", "moe"],
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        hub={"layers_block_type": None, "hybrid_override_pattern": "M-*E", "num_hidden_layers": 4},
    ),
    "falcon_h1": _text("falcon_h1", "FalconH1ForCausalLM", **{**MAMBA, "mamba_d_ssm": 128, "mamba_expand": 2}),
    "bamba": _text("bamba", "BambaForCausalLM", attn_layer_indices=[1], **MAMBA),
    "mamba2": Checkpoint(
        "mamba2",
        "Mamba2ForCausalLM",
        {
            **TOKENS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    # Language models inside multimodal checkpoints.
    "gemma3": _with_images(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
            "model_type": "gemma3_text",
            **HEAD_16,
        },
        {**VISION, "image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"},
        named={"vision_tower.": "vision_tower.vision_model."},
        hub={"text_config": {"rope_parameters": None, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}},
        mm_tokens_per_image=4,
        boi_token_index=300,
        eoi_token_index=301,
        image_token_index=302,
    ),
    "gemma3n": _with_images(
        "gemma3n",
        "Gemma3nForConditionalGeneration",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 300,
            "hidden_size_per_layer_input": 64,
            "laurel_rank": 64,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "intermediate_size": [128] * 4,
            "model_type": "gemma3n_text",
            **HEAD_16,
        },
        {"hidden_size": 2048, "vocab_size": 8, "vocab_offset": 300, "model_type": "gemma3n_vision"},
        audio_config={
            "hidden_size": 32,
            "vocab_size": 8,
            "vocab_offset": 308,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 4],
            "model_type": "gemma3n_audio",
        },
    ),
    "gemma4": _with_images(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 64,
            "final_logit_softcapping": 30.0,
            "global_head_dim": 32,
            "model_type": "gemma4_text",
            **HEAD_16,
        },
        {
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 16,
            "use_clipped_linears": True,
            "model_type": "gemma4_vision",
        },
        audio_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [8, 4],
            "output_proj_dims": 32,
            "model_type": "gemma4_audio",
        },
        hub={"text_config": {"per_layer_config": None, "global_head_dim": 32}},
        boi_token_id=300,
        eoi_token_id=301,
        image_token_id=302,
        video_token_id=303,
        boa_token_id=304,
        eoa_token_index=305,
        audio_token_id=306,
    ),
    "mistral3": _with_images(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "sliding_window": None, **HEAD_16},
        {**VISION, "image_size": 16, "patch_size": 4, "head_dim": 16, "model_type": "pixtral"},
        image_token_index=300,
    ),
    "ministral3_vision": _with_images(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {"model_type": "ministral3", "tie_word_embeddings": True, **HEAD_16},
        {**VISION, "image_size": 16, "patch_size": 4, "head_dim": 16, "model_type": "pixtral"},
        image_token_index=300,
    ),
    "qwen2_5_vl": _with_images(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {"model_type": "qwen2_5_vl_text", **M_ROPE},
        {**QWEN_VISION, "fullatt_block_indexes": [0], "window_size": 16},
        **QWEN_TOKENS,
    ),
    "qwen3_vl": _with_images(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {"model_type": "qwen3_vl_text", **HEAD_16, **M_ROPE},
        {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    ),
    "qwen3_vl_moe": _with_images(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {"model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 64, **HEAD_16, **EXPERTS, **M_ROPE},
        {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    ),
    "qwen3_5": _with_images(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        {"model_type": "qwen3_5_text", **DELTA_NET},
        {**QWEN_VISION, "num_position_embeddings": 16},
        unread={
            "mtp.layers.0.": "model.language_model.layers.1.",
            "mtp.norm.weight": "model.language_model.norm.weight",
        },
        hub={"text_config": {"mtp_num_hidden_layers": 1, "full_attention_interval": 2}},
        **QWEN_TOKENS,
    ),
    "qwen3_5_moe": _with_images(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        {
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            **DELTA_NET,
            **EXPERTS,
        },
        {**QWEN_VISION, "num_position_embeddings": 16},
        unread={
            "mtp.layers.0.": "model.language_model.layers.1.",
            "mtp.norm.weight": "model.language_model.norm.weight",
        },
        hub={"text_config": {"mtp_num_hidden_layers": 1, "full_attention_interval": 2}},
        **QWEN_TOKENS,
    ),
    "internvl": _with_images(
        "internvl",
        "InternVLForConditionalGeneration",
        {"model_type": "qwen2"},
        {**VISION, "image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"},
        image_token_id=300,
        tie_word_embeddings=False,
    ),
    "llava": _with_images(
        "llava",
        "LlavaForConditionalGeneration",
        {"model_type": "llama"},
        {**VISION, "image_size": 16, "patch_size": 4, "projection_dim": 32, "model_type": "clip_vision_model"},
        named={"vision_tower.": "vision_tower.vision_model."},
        image_token_index=300,
    ),
    "llama4": _with_images(
        "llama4",
        "Llama4ForConditionalGeneration",
        {
            "model_type": "llama4_text",
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 256,
            **HEAD_16,
        },
        {
            **VISION,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "model_type": "llama4_vision_model",
        },
        boi_token_index=300,
        eoi_token_index=301,
        image_token_index=302,
    ),
}


def config_of(name: str) -> Any:
    """Return transformers' config of a family."""
    made = FAMILIES[name]
    values = {key: value for key, value in made.values.items() if value is not None or key == "sliding_window"}
    return CONFIG_MAPPING[made.model_type](**values)


class StandInTower(PreTrainedModel):
    """Stands for Gemma 3n's vision tower, a model of timm, which need not be installed."""

    config_class = Gemma3nVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.timm_model = nn.ModuleDict({"conv_stem": nn.Conv2d(3, 8, 3)})
        self.post_init()


@contextmanager
def without_timm() -> Iterator[None]:
    """Let transformers build Gemma 3n where timm and pillow are not installed."""
    classes = AutoModel._model_mapping
    AutoModel.register(Gemma3nVisionConfig, StandInTower, exist_ok=True)
    try:
        yield
    finally:
        del classes._extra_content[Gemma3nVisionConfig]


def make_family(folder: Path, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a family's checkpoint, weights, tokenizer and template, and return its folder."""
    made = FAMILIES[name]
    torch.manual_seed(0)
    with without_timm():
        model = getattr(transformers, made.architecture)(config_of(name)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases, norms and gates too: all-equal ones hide mistakes.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    _name_as_on_the_hub(folder / "model.safetensors", made)
    _configure_as_on_the_hub(folder / "config.json", made)
    return folder


def _name_as_on_the_hub(path: Path, made: Checkpoint) -> None:
    if not (made.named or made.unread):
        return
    tensors = load_file(path)
    for written, on_hub in made.named.items():
        tensors = {
            on_hub + key.removeprefix(written) if key.startswith(written) else key: value
            for key, value in tensors.items()
        }
    for begins, source in made.unread.items():
        found = {key: value for key, value in tensors.items() if key.startswith(source)}
        assert found, source
        tensors |= {begins + key.removeprefix(source): value.clone() for key, value in found.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _configure_as_on_the_hub(path: Path, made: Checkpoint) -> None:
    config = json.loads(path.read_text())
    if made.model_type not in WRITTEN_BY_TRANSFORMERS_5:
        config["torch_dtype"] = config.pop("dtype")
        for table in (config, *(value for value in config.values() if isinstance(value, dict))):
            _as_before_transformers_5(table)
    path.write_text(json.dumps(_overlaid(config, made.hub), indent=2))


def _as_before_transformers_5(table: Values) -> None:
    """Write rotary positions as older versions did: their values beside the others, not in a table of their own."""
    rope = table.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type") == "default" and "mrope_section" not in rope:
        table |= {key: value for key, value in table.pop("rope_parameters").items() if key != "rope_type"}


def _overlaid(config: Values, hub: Mapping[str, Any]) -> Values:
    made = {**config}
    for key, value in hub.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = _overlaid(made.get(key, {}), value) if isinstance(value, dict) else value
    return made


if __name__ == "__main__":
    for word in sys.argv[2:] or FAMILIES:
        make_family(Path(sys.argv[1]) / word, word)
