"""Makes a `ModelShape` of a config.json's table. Every number is checked, and every error names its key."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from studio.core.checkpoint_tensors import CheckpointTensors, Tensors, checkpoint_tensors, settled
from studio.core.config_values import ConfigValues
from studio.core.errors import BadInput
from studio.core.experts_from_config import EXPERT_COUNTS, experts_of, sparse_layers
from studio.core.families import ALWAYS, FAMILIES, INSIDE, LEFT_OUT, NEVER, UNKNOWN, Family
from studio.core.hybrid_layers import HYBRIDS, doubt_about_kinds, hybrid_groups, layer_kinds
from studio.core.layer_parts import Heads, Latent, Linear
from studio.core.quantised_base import quantised_base
from studio.core.shape import Experts, Layer, LayerGroup, ModelShape
from studio.core.text import plain
from studio.core.uneven_layers import (
    GEMMAS,
    LLAMA_4,
    gemma_doubts,
    gemma_embedders,
    gemma_groups,
    gemma_outside,
    llama4_groups,
)
from studio.core.unknown_layers import facts_of, layers_of

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TOWERS = ("vision_config", "audio_config")
_WIDTHS = ("moe_intermediate_size", "intermediate_size")
_MOST_PARAMETERS = 50 * 10**12
_MOST_LAYERS = 1000
"""The deepest published models, merged from several, have some 300. Without a limit a hostile config could keep a
replay, which goes through every layer, busy for ever."""


def shape_from_config(config: Mapping[str, Any], tensors: Tensors | None = None) -> ModelShape:
    """Return the shape that a model's config describes.

    A family that is not in the table is sized from its tensors. Without them its config is read as a Llama's, and
    `readings` hold what else it may mean. Both ways the shape carries a doubt. Of a config with a vision or audio part
    the text model is read.

    Args:
        config: The table of its config.json.
        tensors: Shapes of its checkpoint's tensors by name, where they are known.

    Raises:
        BadInput: A size is missing, no number, or absurd; the message names the key.
    """
    text = _text_table(config)
    values = ConfigValues(text)
    name = values.word("model_type") or "unknown"
    if text is not config:
        values = ConfigValues(
            {**LEFT_OUT.get(name, {}), **{key: each for key, each in text.items() if each is not None}}
        )
    several = text is not config or any(key in config for key in _TOWERS)
    layers = values.whole(*_LAYERS, default=0, low=0, high=_MOST_LAYERS)
    found = checkpoint_tensors(tensors, layers, multimodal=several) if tensors else None
    hybrid = HYBRIDS.get(name)
    family = hybrid.family if hybrid else FAMILIES.get(name)
    if family is None:
        shape = _unknown(plain(name, one_line=True, limit=40), values, found)
    else:
        doubt = "" if hybrid else doubt_about_kinds(name, values)
        shape = _shape(name, family, values, [doubt] if doubt else [])
    if shape.parameters > _MOST_PARAMETERS:
        raise BadInput(f"the model's config describes {shape.parameters:.3g} parameters; its sizes cannot be right")
    if found:
        shape = settled(shape, found)
    if several:
        kept = gemma_embedders(name, config, shape.hidden)
        towers = max(0, found.towers - kept) if found else 0
        beside = f", {towers / 1e9:.2f} B parameters," if towers else ""
        said = f"towers for images or sound{beside} are on disk and not counted: a training on text leaves them out"
        shape = replace(shape, notes=(said,), tower_parameters=towers, other_parameters=shape.other_parameters + kept)
    return replace(shape, quantised=quantised_base(config))


def _text_table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config that may hold several models."""
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            # The head belongs to the whole model: there the outer config decides.
            tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
            return {**{k: config[k] for k in ("torch_dtype", "dtype") if k in config}, **inner, **tied}
    return config


def _unknown(name: str, values: ConfigValues, found: CheckpointTensors | None) -> ModelShape:
    """Return the shape of a family that is not in the table; where sizes differ by layer, the largest count."""
    values = values.with_({key: values.each(key) for key in _WIDTHS if isinstance(values.raw(key), list)})
    if found is None or not found.layers:
        doubt = (
            f"the architecture {name!r} is not known here: read as a Llama of its sizes; the range also holds what "
            "else they may mean"
        )
        return replace(_shape(name, UNKNOWN, values, [doubt]), readings=tuple(_readings(name, values)))
    doubt = (
        f"the architecture {name!r} is not known here: its sizes are those of its tensors, how its layers compute "
        "is taken to be as in a Llama"
    )
    values = values.with_(facts_of(found, values))
    shape = _shape(name, UNKNOWN, values, [doubt])
    groups, order = layers_of(found, values, shape.hidden, shape.groups[0].layer)
    shape = replace(shape, groups=groups, order=order)
    return replace(shape, readings=(replace(shape, fused_attention=False),))


def _readings(name: str, values: ConfigValues) -> Iterator[ModelShape]:
    """Yield the least and the most that a config which is not understood may mean.

    Widths of experts and of dense layers may stand under each other's keys, half of the layers may be dense, and fused
    kernels may not compute its attention.
    """
    shape = _shape(name, UNKNOWN, values, [])
    widths = [values.whole(key, default=0, low=0) for key in _WIDTHS]
    least, most = min(filter(None, widths), default=1), max(widths, default=1)
    said = [key for key in _WIDTHS if key in values]
    narrow = _shape(name, UNKNOWN, values.with_({**dict.fromkeys(said, least), "tie_word_embeddings": True}), [])
    wide = _shape(name, UNKNOWN, values.with_({**dict.fromkeys(said, most), "tie_word_embeddings": False}), [])
    if shape.expert_parameters:
        dense = _shape(name, UNKNOWN, values.with_(dict.fromkeys(EXPERT_COUNTS, 0)), [])
        half = max(1, shape.layers // 2)
        groups = (LayerGroup(half, narrow.groups[0].layer), LayerGroup(shape.layers - half, dense.groups[0].layer))
        narrow = replace(narrow, groups=tuple(group for group in groups if group.count))
    yield narrow
    embeddings = shape.layers * _per_layer_embedding(values)
    yield replace(wide, other_parameters=wide.other_parameters + embeddings, fused_attention=False)


def _per_layer_embedding(values: ConfigValues) -> int:
    """Return the parameters of an embedding that each layer has for itself (Gemma 3n); 0 without one."""
    width = values.whole("hidden_size_per_layer_input", default=0, low=0)
    return width * values.whole("vocab_size_per_layer_input", "vocab_size", default=0, low=0)


def _shape(name: str, family: Family, values: ConfigValues, doubts: list[str]) -> ModelShape:
    said, hybrid, called, name = values, HYBRIDS.get(name), name, INSIDE.get(name, name)
    if hybrid:
        values = said.with_(hybrid.settled(said))
    hidden = values.whole("hidden_size", "n_embd", "d_model", high=1 << 20)
    layers = values.whole(*_LAYERS, high=_MOST_LAYERS)
    heads = values.whole("num_attention_heads", "n_head", "n_heads", high=1 << 16)
    divided = _latent_heads(values, heads) if family.latent else _heads(name, family, values, hidden, heads)
    capped = values.real("attn_logit_softcapping", family.attention_softcap) != 0
    # Outside of layers there are the final norm and, in a few families, a norm after the embedding.
    norm_width = hidden * family.norm_terms
    other = norm_width * (2 if family.embedding_norm else 1)
    learnt = 0
    if family.learnt_positions:
        learnt = values.whole(family.learnt_positions, "max_position_embeddings", default=2048)
    embedding_dropout = _drops(family, values, "embedding_dropout", "embd_pdrop")
    groups, order = _groups(name, family, said, values, (hidden, layers, divided))
    outer: tuple[Linear, ...] = ()
    if name in GEMMAS:
        outer, other = gemma_outside(name, values, hidden)
    return ModelShape(
        family=called,
        hidden=hidden,
        vocabulary=values.whole("padded_vocab_size", "vocab_size"),
        groups=groups,
        order=order,
        outer=outer,
        tied=values.flag("tie_word_embeddings", family.tied),
        head_bias=_bias(values, family.head_bias),
        other_parameters=other + hidden * learnt,
        alters_embedding=family.alters_embedding or family.embedding_norm or learnt > 0 or embedding_dropout,
        embedding_norm=family.embedding_norm,
        embedding_dropout=embedding_dropout,
        scaled_logits=family.scaled_logits,
        logit_softcap=values.real("final_logit_softcapping", family.logit_softcap) != 0,
        attention_softcap=capped,
        fused_attention=family.fused_attention and not capped and not (family.sinks and _drops_weights(family, values)),
        sinks=family.sinks,
        own_attention=family.own_attention,
        repeats_heads=family.repeats_heads or (name == "falcon" and values.flag("new_decoder_architecture", False)),
        positions=values.whole("max_position_embeddings", "n_positions", default=0, low=0),
        buffers=sum(group.count * group.layer.mixer.buffers for group in groups if group.layer.mixer),
        mask_bytes=learnt * learnt if family.holds_mask else 0,  # booleans, a byte each
        doubts=(*doubts, *gemma_doubts(name)),
    )


def _heads(name: str, family: Family, values: ConfigValues, hidden: int, heads: int) -> Heads:
    width = values.whole("head_dim", "kv_channels", default=max(1, hidden // heads), high=1 << 16)
    # Where the config names a head's width, heads times width need not be the hidden size (Gemma).
    # GLM 4.5 rounds it down.
    if "head_dim" not in values and "kv_channels" not in values and hidden % heads and name != "glm4_moe":
        raise BadInput(f"the model's config has hidden_size {hidden}, which {heads} attention heads do not divide")
    shared = _kv_heads(name, values, heads) if family.grouped else heads
    if heads % shared:
        raise BadInput(f"the model's config has {heads} attention heads, which {shared} key/value heads do not divide")
    return Heads(heads, shared, width, width)


def _latent_heads(values: ConfigValues, heads: int) -> Heads:
    """Return the heads of latent attention: a part of a query or key without positions, and one with them."""
    plain_part, rotary = (values.whole(f"qk_{part}_head_dim", high=1 << 16) for part in ("nope", "rope"))
    return Heads(heads, heads, plain_part + rotary, values.whole("v_head_dim", high=1 << 16))


def _kv_heads(name: str, values: ConfigValues, heads: int) -> int:
    if name in ("falcon", "gpt_bigcode"):
        if name == "falcon" and values.flag("new_decoder_architecture", False):
            return values.whole("num_kv_heads", "num_key_value_heads", default=heads, high=heads)
        return 1 if values.flag("multi_query", True) else heads
    return values.whole("num_key_value_heads", "num_kv_heads", "multi_query_group_num", default=heads, high=heads)


def _groups(
    name: str, family: Family, said: ConfigValues, values: ConfigValues, sizes: tuple[int, int, Heads]
) -> tuple[tuple[LayerGroup, ...], tuple[int, ...]]:
    """Return the layers kind by kind, in the order of the first layer of each kind, and a hybrid's layers in theirs."""
    layers = sizes[1]
    if name in GEMMAS:
        plain_values = values.with_({"intermediate_size": values.each("intermediate_size")})
        return gemma_groups(
            name,
            values,
            sizes[0],
            lambda heads: _layer(name, family, plain_values, (sizes[0], layers, heads), None),
        )
    routed = experts_of(name, family, values, sizes[0])
    if name == LLAMA_4:
        return llama4_groups(
            family, values, layers, lambda sparse: _layer(name, family, values, sizes, routed if sparse else None)
        )
    if hybrid := HYBRIDS.get(name):
        kinds = layer_kinds(name, hybrid, said)
        return hybrid_groups(
            hybrid, said, kinds, lambda sparse: _layer(name, family, values, sizes, routed if sparse else None)
        )
    sparse = sparse_layers(name, family, values, layers) if routed else []
    if not sparse:
        return (LayerGroup(layers, _layer(name, family, values, sizes, None)),), ()
    groups = [LayerGroup(len(sparse), _layer(name, family, values, sizes, routed))]
    if len(sparse) < layers:
        dense = LayerGroup(layers - len(sparse), _layer(name, family, values, sizes, None))
        groups = [dense, *groups] if sparse[0] else [*groups, dense]
    return tuple(groups), ()


def _layer(
    name: str, family: Family, values: ConfigValues, sizes: tuple[int, int, Heads], experts: Experts | None
) -> Layer:
    hidden, _, heads = sizes
    wiring, norms = _wiring(name, family, values)
    norm_parameters = norms * hidden * family.norm_terms
    if experts:
        norm_parameters += family.router_terms * experts.count
    if family.sinks:
        norm_parameters += heads.queries
    if family.activation == "xielu":
        norm_parameters += 2  # its two slopes
    latent = _latent(values) if family.latent else None
    if latent:
        norm_parameters += latent.queries + latent.keys
    rotary = _rotary(family, values)
    normed: Any = family.query_key_norm
    if name in ("glm4_moe", "cohere") and values.flag("use_qk_norm", False):
        normed = "head"
    # A norm per head has one weight for all query heads, and one for all key heads; Cohere's one for each.
    whole = (heads.queries + heads.keys) * heads.width
    per_head = {"head": whole if name == "cohere" else 2 * heads.width, "whole": whole, "": 0}
    return Layer(
        wiring=wiring,
        norm=family.norm,
        norm_parameters=norm_parameters + per_head[normed],
        input_norms=2 if wiring == "parallel" and norms == 2 else 1,
        qkv_split=family.qkv_split,
        query_key_norm=normed,
        heads=heads,
        qkv=_latent_projections(values, hidden, heads, latent) if latent else _qkv(family, values, hidden, heads),
        out=Linear(family.out, heads.outputs, hidden, _bias(values, family.out_bias)),
        mlp=_mlp(name, family, values, hidden, experts),
        gated=family.gated,
        activation=values.word("hidden_activation", "hidden_act", "activation_function", default=family.activation),
        latent=latent,
        rotary=rotary,
        rotary_form="halves" if not values.flag("rope_interleave", True) else family.rotary_form,
        rotary_wide=family.rotary_wide,
        rotary_joined=0 < rotary < 1 or family.rotary_joined,
        scaled_residual=family.scaled_residual,
        residual_dropout=_drops(family, values, "residual_dropout", "resid_pdrop", "hidden_dropout"),
        attention_dropout=_drops_weights(family, values),
        window=_window(values),
        experts=experts,
    )


def _drops_weights(family: Family, values: ConfigValues) -> bool:
    return _drops(family, values, "attention_dropout", "attn_pdrop")


def _drops(family: Family, values: ConfigValues, *keys: str) -> bool:
    """Whether a dropout is above 0, under any of the keys that families have for it."""
    said = [key for key in keys if key in values]
    return any(values.real(key, 0.0) > 0 for key in said) if said else family.dropout > 0


def _window(values: ConfigValues) -> int:
    """Return the sliding window in keys; 0 where the config has none or switches it off (Qwen 2 does both at once)."""
    if not values.flag("use_sliding_window", True):
        return 0
    return values.whole("sliding_window", default=0, low=0)


def _wiring(name: str, family: Family, values: ConfigValues) -> tuple[Any, int]:
    if name == "gpt_neox" and not values.flag("use_parallel_residual", True):
        return "pre", 2
    if name == "stablelm" and values.flag("use_parallel_residual", False):
        return "parallel", 1
    if name == "falcon":
        if values.flag("new_decoder_architecture", False):
            return "parallel", values.whole("num_ln_in_parallel_attn", default=2, high=2)
        if not values.flag("parallel_attn", True):
            return "pre", 2
    return family.wiring, family.norms


def _qkv(family: Family, values: ConfigValues, hidden: int, heads: Heads) -> tuple[Linear, ...]:
    bias = _bias(values, family.qkv_bias)
    outputs = (heads.queries * heads.width, heads.keys * heads.width, heads.keys * heads.value_width)
    if len(family.qkv) == 1:
        return (Linear(family.qkv[0], hidden, sum(outputs), bias),)
    return tuple(Linear(name, hidden, width, bias) for name, width in zip(family.qkv, outputs, strict=True))


def _latent(values: ConfigValues) -> Latent:
    return Latent(
        values.whole("q_lora_rank", default=0, low=0), values.whole("kv_lora_rank"), values.whole("qk_rope_head_dim")
    )


def _latent_projections(values: ConfigValues, hidden: int, heads: Heads, latent: Latent) -> tuple[Linear, ...]:
    """Return the projections of latent attention (DeepseekV3Attention.__init__)."""
    bias, queries = values.flag("attention_bias", False), heads.queries * heads.width
    whole = (Linear("q_proj", hidden, queries),)
    narrow = (Linear("q_a_proj", hidden, latent.queries, bias), Linear("q_b_proj", latent.queries, queries))
    plain_part = heads.width - latent.rotary
    return (
        *(narrow if latent.queries else whole),
        Linear("kv_a_proj_with_mqa", hidden, latent.keys + latent.rotary, bias),
        Linear("kv_b_proj", latent.keys, heads.queries * (plain_part + heads.value_width)),
    )


def _mlp(name: str, family: Family, values: ConfigValues, hidden: int, experts: Experts | None) -> tuple[Linear, ...]:
    bias = _bias(values, family.mlp_bias)
    if experts:
        inner = experts.shared_inner
        if not inner:
            return ()
    else:
        keys = ("intermediate_size_mlp",) if name == "llama4_text" else ()
        # Families without a gate have four times the hidden size where the config names no width. An unknown family may
        # be one of them.
        usual = None if family.gated and (name in FAMILIES or name in HYBRIDS) else 4 * hidden
        inner = values.whole(*keys, "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", default=usual)
    if not family.gated or len(family.mlp) == 2:
        wide = 2 * inner if family.gated else inner
        return (Linear(family.mlp[0], hidden, wide, bias), Linear(family.mlp[1], inner, hidden, bias))
    gate, up, down = family.mlp
    return Linear(gate, hidden, inner, bias), Linear(up, hidden, inner, bias), Linear(down, inner, hidden, bias)


def _rotary(family: Family, values: ConfigValues) -> float:
    nested = values.table("rope_parameters")
    default = nested.real("partial_rotary_factor", family.rotary) if nested else family.rotary
    if family.rotary == 0:
        return 0.0
    if "rotary_dim" in values:  # MiniMax M2 names the numbers that are turned, not their share
        default = values.real("rotary_dim", 0) / values.whole("head_dim", default=1)
    return min(1.0, max(0.0, values.real("partial_rotary_factor", values.real("rotary_pct", default))))


def _bias(values: ConfigValues, rule: str) -> bool:
    """Read a bias rule: always, never, or a config key with its default (`attention_bias=true`)."""
    if rule in (ALWAYS, NEVER):
        return rule == ALWAYS
    key, _, default = rule.partition("=")
    return values.flag(key, default == "true")
