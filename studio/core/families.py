"""How each family of architectures names its parts and how it connects them, as one table.

Sources: transformers 5.24 `models/*/configuration_*.py` (defaults) and `modeling_*.py` (modules, biases, norms); the
table is checked against the modules that transformers builds (tests/core/test_shape_inventory.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from studio.core.shape import Norm, Wiring

ALWAYS, NEVER = "always", "never"


@dataclass(frozen=True, slots=True)
class Family:
    """How a family is built; the defaults are Llama's.

    Attributes:
        wiring: Where the norms stand.
        norm: Which norm.
        norms: Norms over the hidden size in one layer.
        norm_terms: Parameters of a norm per dimension: 1 weight, 2 with a bias, 0 without either.
        query_key_norm: Norm of queries and keys: per head, or over all heads.
        qkv: Names of the projections to queries, keys and values; one name where they are fused.
        qkv_split: Whether the output of a fused projection is split or chunked; else it is sliced.
        out: Name of the projection back.
        mlp: Names of the MLP's projections.
        gated: Whether one half of the MLP gates the other.
        activation: The activation, if the config does not name one.
        qkv_bias: Whether queries, keys and values have a bias: always, never, or the config key that decides it
            (`key=true` where it is true by default).
        out_bias: The same for the projection back.
        mlp_bias: The same for the MLP.
        head_bias: The same for the head.
        tied: Whether head and embedding share their weights, if the config does not say.
        rotary: Fraction of a head with rotary positions, if the config does not say; 0 without them.
        rotary_wide: Whether they are applied in fp32.
        rotary_joined: Whether the rotated part of a head is joined with the rest even where no rest is left.
        learnt_positions: Config key of the number of learnt positions; empty without them.
        embedding_norm: Whether the embedding is normed.
        scaled_residual: Whether each block's output is multiplied by a number (Granite).
        dropout: Dropout of embeddings, block outputs and attention weights, if the config does not say.
        holds_mask: Whether the model holds a causal mask of all its positions.
        alters_embedding: Whether the model multiplies the embedding module's output (learnt positions alter it too).
        scaled_logits: Whether it multiplies or divides its logits by a number.
        logit_softcap: Soft cap of the logits, if the config does not say; 0 without one.
        attention_softcap: Soft cap of attention scores, if the config does not say; 0 without one.
        fused_attention: Whether transformers supports sdpa for it, or our loop puts its sinks into sdpa's kernels.
        sinks: Whether each head has a learnt number in its softmax that attends to nothing.
        latent: Whether its attention is latent (DeepSeek V2).
        rotary_form: How numbers of a head are turned against each other (`Layer.rotary_form`).
        grouped: Whether there may be fewer key and value heads than query heads.
        own_attention: Whether its layers call attention themselves, not through transformers' interface.
        repeats_heads: Whether they repeat keys and values for every query head first (modeling_chatglm.py of THUDM).
        expert_inner: Config key of the width inside a routed expert.
        shared_inner: Config key of the width inside the expert that every token visits; empty without one.
        shared_count: Config key of the number of such experts, each as wide as a routed one; empty without them.
        shared_default: Their number, if the config does not say.
        dense_first: Layers at the beginning that are dense, if the config does not say.
        router_terms: Parameters of the router per expert, beside its weights.
        chooser: Name of the router or shared gate that peft's all-linear adapts; empty where it adapts none.
        experts_adapted_by_all: Whether peft's all-linear adapts the fused experts too.
    """

    wiring: Wiring = "pre"
    norm: Norm = "rms"
    norms: int = 2
    norm_terms: int = 1
    query_key_norm: Literal["", "head", "whole"] = ""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_split: bool = False
    out: str = "o_proj"
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    gated: bool = True
    activation: str = "silu"
    qkv_bias: str = "attention_bias"
    out_bias: str = "attention_bias"
    mlp_bias: str = "mlp_bias"
    tied: bool = False
    head_bias: str = NEVER
    rotary: float = 1.0
    rotary_wide: bool = False
    rotary_joined: bool = False
    learnt_positions: str = ""
    embedding_norm: bool = False
    scaled_residual: bool = False
    dropout: float = 0.0
    holds_mask: bool = False
    alters_embedding: bool = False
    scaled_logits: bool = False
    logit_softcap: float = 0.0
    attention_softcap: float = 0.0
    fused_attention: bool = True
    sinks: bool = False
    latent: bool = False
    rotary_form: Literal["halves", "parts", "pairs", "complex"] = "halves"
    grouped: bool = True
    own_attention: bool = False
    repeats_heads: bool = False
    expert_inner: str = "intermediate_size"
    shared_inner: str = ""
    shared_count: str = ""
    shared_default: int = 0
    dense_first: int = 0
    router_terms: int = 0
    chooser: str = ""
    experts_adapted_by_all: bool = False


OWN_NORM = frozenset({"helium", "llama4_text"})
"""Families whose RMS norm is written otherwise than Llama's, though it computes the same."""
OWN_ROTARY = frozenset(
    {"olmo", "olmo2", "olmo3", "ernie4_5", "ernie4_5_moe", "helium", "minimax_m2", "gemma3n_text", "gemma4_text"}
)
"""Families that turn the halves of whole heads by other code than Llama's."""

LLAMA = Family()
UNKNOWN = Family(expert_inner="moe_intermediate_size")
"""What a family that is not in the table is read as."""
_NO_BIAS = Family(qkv_bias=NEVER, out_bias=NEVER, mlp_bias=NEVER)
_GEMMA = Family(norm="rms_wide", tied=True, activation="gelu_pytorch_tanh", mlp_bias=NEVER)
_GEMMA_SANDWICH = replace(_GEMMA, wiring="sandwich", norms=4)
_GPT = Family(
    norm="layer",
    norm_terms=2,
    qkv=("query_key_value",),
    out="dense",
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    gated=False,
    activation="gelu",
    qkv_bias=ALWAYS,
    out_bias=ALWAYS,
    mlp_bias=ALWAYS,
)
_GLM = Family(
    mlp=("gate_up_proj", "down_proj"), qkv_bias="attention_bias=true", out_bias=NEVER, mlp_bias=NEVER, rotary=0.5
)
_COHERE = Family(
    wiring="parallel", norm="centred", norms=1, mlp_bias=NEVER, tied=True, rotary_wide=True, scaled_logits=True
)
_GRANITE = Family(scaled_residual=True, alters_embedding=True, scaled_logits=True)
_DEEPSEEK_MOE = Family(
    mlp_bias=NEVER, expert_inner="moe_intermediate_size", shared_count="n_shared_experts", shared_default=1
)
_LATENT = replace(_DEEPSEEK_MOE, latent=True, rotary_form="pairs")
_RELU2 = Family(mlp=("up_proj", "down_proj"), gated=False, activation="relu2")

_BY_NAME: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": _NO_BIAS,
    "ministral": _NO_BIAS,
    "ministral3": _NO_BIAS,
    "qwen2": replace(_NO_BIAS, qkv_bias=ALWAYS),
    "qwen3": Family(query_key_norm="head", mlp_bias=NEVER),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA_SANDWICH, logit_softcap=30.0, attention_softcap=50.0),
    "gemma3_text": replace(_GEMMA_SANDWICH, query_key_norm="head"),
    "gemma3n_text": replace(_GEMMA_SANDWICH, query_key_norm="head", logit_softcap=30.0),
    "gemma4_text": replace(_GEMMA_SANDWICH, query_key_norm="head"),
    "phi": replace(
        _GPT,
        wiring="parallel",
        norms=1,
        qkv=LLAMA.qkv,
        mlp=("fc1", "fc2"),
        activation="gelu_new",
        rotary=0.5,
        head_bias=ALWAYS,
    ),
    "phi3": replace(_NO_BIAS, qkv=("qkv_proj",), mlp=("gate_up_proj", "down_proj"), rotary_joined=True),
    "falcon": replace(
        _GPT,
        wiring="parallel",
        norms=1,
        tied=True,
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        own_attention=True,
    ),
    "gpt_neox": replace(
        _GPT,
        wiring="parallel",
        qkv_bias="attention_bias=true",
        out_bias="attention_bias=true",
        rotary=0.25,
        grouped=False,
        qkv_split=True,
    ),
    "bloom": replace(_GPT, tied=True, rotary=0.0, embedding_norm=True, grouped=False, fused_attention=False),
    "gpt_bigcode": replace(
        _GPT,
        qkv=("c_attn",),
        qkv_split=True,
        out="c_proj",
        mlp=("c_fc", "c_proj"),
        activation="gelu_pytorch_tanh",
        tied=True,
        rotary=0.0,
        learnt_positions="n_positions",
        dropout=0.1,
        holds_mask=True,
    ),
    "starcoder2": replace(
        _GPT,
        qkv=LLAMA.qkv,
        out="o_proj",
        mlp=("c_fc", "c_proj"),
        activation="gelu_pytorch_tanh",
        qkv_bias="use_bias=true",
        out_bias="use_bias=true",
        mlp_bias="use_bias=true",
        tied=True,
    ),
    "granite": _GRANITE,
    "olmo": Family(norm="layer_wide", norm_terms=0, mlp_bias=NEVER),
    "olmo2": Family(wiring="post", norm="rms_wide", query_key_norm="whole", mlp_bias=NEVER),
    "olmo3": Family(wiring="post", norm="rms_wide", query_key_norm="whole", mlp_bias=NEVER),
    "exaone4": replace(_NO_BIAS, wiring="post", query_key_norm="head"),
    "stablelm": Family(
        norm="layer", norm_terms=2, qkv_bias="use_qkv_bias", out_bias=NEVER, mlp_bias=NEVER, rotary=0.25
    ),
    "smollm3": Family(tied=True),
    "glm": _GLM,
    "glm4": replace(_GLM, wiring="sandwich", norms=4),
    "chatglm": replace(
        _GLM,
        qkv=_GPT.qkv,
        out="dense",
        mlp=_GPT.mlp,
        qkv_bias="add_qkv_bias",
        out_bias="add_bias_linear",
        mlp_bias="add_bias_linear",
        repeats_heads=True,
    ),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "nemotron": replace(_RELU2, norm="layer_plain", norm_terms=2, rotary=0.5),
    "arcee": _RELU2,
    "seed_oss": Family(qkv_bias="attention_bias=true", out_bias="attention_out_bias"),
    "ernie4_5": Family(qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", tied=True),
    "helium": Family(out_bias=NEVER),
    "hunyuan_v1_dense": Family(query_key_norm="head", mlp_bias=NEVER),
    "apertus": replace(_RELU2, query_key_norm="head", mlp_bias=NEVER, activation="xielu"),
    # Mixtures of experts: the fields describe what lies outside the experts.
    "mixtral": replace(_NO_BIAS, chooser="gate", experts_adapted_by_all=True),
    "qwen2_moe": replace(
        _NO_BIAS,
        qkv_bias=ALWAYS,
        expert_inner="moe_intermediate_size",
        shared_inner="shared_expert_intermediate_size",
        chooser="shared_expert_gate",
    ),
    "qwen3_moe": Family(
        query_key_norm="head",
        mlp_bias=NEVER,
        expert_inner="moe_intermediate_size",
        chooser="gate",
        experts_adapted_by_all=True,
    ),
    "olmoe": Family(query_key_norm="whole", mlp_bias=NEVER, chooser="gate", experts_adapted_by_all=True),
    "granitemoe": _GRANITE,
    "gpt_oss": Family(
        norm="rms_wide",
        router_terms=1,
        qkv_bias="attention_bias=true",
        out_bias="attention_bias=true",
        mlp_bias=NEVER,
        rotary_form="parts",
        sinks=True,
    ),
    "llama4_text": Family(mlp_bias=NEVER, shared_inner="intermediate_size", chooser="router", rotary_form="complex"),
    "deepseek_v2": replace(_LATENT, mlp_bias="mlp_bias", shared_default=2, rotary_form="complex"),
    "deepseek_v3": replace(_LATENT, dense_first=3),
    "glm4_moe_lite": replace(_LATENT, dense_first=1),
    "mistral4": _LATENT,
    "glm4_moe": replace(_DEEPSEEK_MOE, out_bias=NEVER, dense_first=1, rotary=0.5),
    "dots1": replace(_DEEPSEEK_MOE, query_key_norm="head", shared_default=0),
    "ernie4_5_moe": Family(
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        tied=True,
        head_bias="use_bias",
        expert_inner="moe_intermediate_size",
        shared_count="moe_num_shared_experts",
        shared_default=2,
        dense_first=1,
        router_terms=1,
    ),
    "minimax_m2": replace(_NO_BIAS, query_key_norm="whole"),
    "phimoe": Family(norm="layer", norm_terms=2, mlp_bias=NEVER, head_bias="lm_head_bias"),
    "hunyuan_v1_moe": Family(query_key_norm="head", mlp_bias=NEVER, shared_inner="intermediate_size", chooser="wg"),
}
INSIDE = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
    "glm4v_moe_text": "glm4_moe",
}
"""Text models of multimodal ones that are built as another family's."""
FAMILIES: Mapping[str, Family] = {**_BY_NAME, **{name: _BY_NAME[same] for name, same in INSIDE.items()}}
"""Keyed by transformers' `model_type` (of the text model, where a config has several)."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KEYS = (*_SIZES, "num_key_value_heads", "head_dim")
LEFT_OUT: Mapping[str, Mapping[str, int]] = {
    "gemma3_text": dict(zip(_KEYS, (262208, 2304, 9216, 26, 8, 4, 256), strict=True)),
    "gemma3n_text": dict(zip(_KEYS, (262400, 2048, 16384, 35, 8, 2, 256), strict=True)),
    "gemma4_text": dict(zip(_KEYS, (262144, 2304, 9216, 30, 8, 4, 256), strict=True)),
    "llama": dict(zip(_SIZES, (32000, 4096, 11008, 32, 32), strict=True)),
    "mistral": dict(zip(_SIZES, (32000, 4096, 14336, 32, 32), strict=True)),
}
"""Sizes that configs of multimodal models leave out for their text model, where they are transformers' own defaults."""
