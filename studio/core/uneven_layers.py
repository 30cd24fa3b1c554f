"""Families whose layers differ from each other: Gemma 3n, Gemma 4 and Llama 4.

Gemma's have heads of two widths, share keys and values, and have an input of their own. Llama 4's are dense or have
experts, and have positions or, in their place, tempered queries.

Sources: transformers 5.24 configuration_gemma3n.py, configuration_gemma4.py, configuration_llama4.py
(`Llama4TextConfig.__post_init__`) and their modeling files; checked against the modules that transformers builds
(tests/core/test_shape_inventory.py).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from studio.core.config_values import ConfigValues
from studio.core.experts_from_config import sparse_layers
from studio.core.families import Family
from studio.core.layer_parts import Heads, Linear
from studio.core.shape import Experts, Layer, LayerGroup

LLAMA_4 = "llama4_text"
GEMMAS = ("gemma3n_text", "gemma4_text")
_STREAMS = "altup_num_inputs"
_FULL = "full_attention"
_EMBEDDERS = (("vision_config", 2048, 128), ("audio_config", 1536, 128))
"""Of each of a Gemma 3n's embedders the config, and transformers' defaults of its width and of its vocabulary."""


def gemma_groups(
    name: str, values: ConfigValues, hidden: int, layer: Callable[[Heads], Layer]
) -> tuple[tuple[LayerGroup, ...], tuple[int, ...]]:
    """Return the layers kind by kind, and of each layer the number of its kind.

    Args:
        name: Which of `GEMMAS`.
        values: The config.
        hidden: Width of the residual stream.
        layer: Returns a layer of these heads with everything that all layers have.
    """
    layers = values.whole("num_hidden_layers")
    kinds = _kinds(name, values, layers)
    inners = values.wholes("intermediate_size") if isinstance(values.raw("intermediate_size"), list) else ()
    shared = values.whole("num_kv_shared_layers", default=15 if name == "gemma3n_text" else 0, low=0, high=layers)
    sparse = _sparse(values, layers) if name == "gemma3n_text" else range(0)
    numbers: dict[Layer, int] = {}
    order = []
    for index in range(layers):
        inner = inners[index] if index < len(inners) else values.each("intermediate_size")
        reuses = index >= layers - shared
        made = (_third if name == "gemma3n_text" else _fourth)(
            _own_values(values, index), hidden, layer, (kinds[index], reuses, inner, index in sparse)
        )
        order.append(numbers.setdefault(made, len(numbers)))
    groups = tuple(LayerGroup(order.count(number), one) for one, number in numbers.items())
    return groups, tuple(order) if len(groups) > 1 else ()


def gemma_doubts(name: str) -> tuple[str, ...]:
    """Return why the estimate of a Gemma is less certain than usual."""
    if name != "gemma3n_text":
        return ()
    return ("what layers of Gemma 3n hold on the way back is counted roughly: traces differ by up to 3 %",)


def gemma_outside(name: str, values: ConfigValues, hidden: int) -> tuple[tuple[Linear, ...], int]:
    """Return the linear maps outside the layers, and the parameters there beside them, embedding and head."""
    layers, width = values.whole("num_hidden_layers"), _per_layer_width(values)
    outer: tuple[Linear, ...] = ()
    other = hidden  # the final norm
    if width:
        outer = (Linear("per_layer_model_projection", hidden, layers * width),)
        other += width + layers * width * values.whole("vocab_size_per_layer_input", default=262_144)
    if name == "gemma3n_text":
        streams = values.whole(_STREAMS, default=4) - 1
        projections = ("altup_projections", "altup_unembed_projections")
        outer += tuple(Linear(one, hidden, hidden, copies=streams) for one in projections)
    return outer, other


def gemma_embedders(name: str, config: Mapping[str, Any], hidden: int) -> int:
    """Return the parameters of a whole Gemma 3n through which text goes as well: the embedders of images and sound.

    Gemma3nModel.forward looks up every token in them, and takes what they give where the token is theirs.

    Args:
        name: Which family.
        config: The whole model's config.
        hidden: Width of the language model.
    """
    total = 0
    for key, width, rows in _EMBEDDERS if name == "gemma3n_text" else ():
        table = config.get(key)
        if isinstance(table, Mapping):
            values = ConfigValues(table)
            inner = values.whole("hidden_size", default=width)
            total += inner * (values.whole("vocab_size", default=rows) + 2 + hidden)  # two norms, and a projection
    return total


def _sparse(values: ConfigValues, layers: int) -> Collection[int]:
    """Return the layers in which most numbers of the MLP's gate are set to zero: the first ten of a deep model."""
    said = values.raw("activation_sparsity_pattern")
    if isinstance(said, list):
        return {index for index, share in enumerate(said) if share}
    return range(10 if layers > 10 else 0)


def _own_values(values: ConfigValues, index: int) -> ConfigValues:
    """Return the config as it is for one layer, where transformers 5 wrote what differs layer by layer."""
    each = values.raw("per_layer_config")
    own = (each.get(str(index)) or each.get(index)) if isinstance(each, Mapping) else None
    if not isinstance(own, Mapping):
        return values
    said = ConfigValues(own)
    widths = {"global_head_dim": said.raw("head_dim"), "num_global_key_value_heads": said.raw("num_key_value_heads")}
    return values.with_({key: value for key, value in widths.items() if value is not None})


def _per_layer_width(values: ConfigValues) -> int:
    return values.whole("hidden_size_per_layer_input", default=256, low=0)


def _kinds(name: str, values: ConfigValues, layers: int) -> tuple[str, ...]:
    """Return the kind of attention of each layer; the last one of Gemma 4 always sees everything."""
    every = 5 if name == "gemma3n_text" else 6
    usual = tuple("sliding_attention" if (index + 1) % every else _FULL for index in range(layers))
    said = values.words("layer_types")
    kinds = said if len(said) == layers else usual
    return (*kinds[:-1], _FULL) if name == "gemma4_text" else kinds


def _third(
    values: ConfigValues, hidden: int, layer: Callable[[Heads], Layer], kind: tuple[str, bool, int, bool]
) -> Layer:
    """Return a layer of Gemma 3n: Gemma3nTextDecoderLayer."""
    attention, reuses, inner, sparse = kind
    width = values.whole("head_dim", default=256)
    heads = Heads(values.whole("num_attention_heads"), values.whole("num_key_value_heads"), width, width)
    made = _sharing(layer(heads), reuses, joined=False)
    streams, rank = values.whole(_STREAMS, default=4), values.whole("laurel_rank", default=64)
    beside = (
        Linear("linear_left", hidden, rank),
        Linear("linear_right", rank, hidden),
        Linear("modality_router", hidden, streams),
        Linear("prediction_coefs", streams, streams * streams),
        Linear("correction_coefs", streams, streams),
    )
    return replace(
        made,
        mlp=_mlp(made, hidden, inner),
        per_layer=_own_input(values, hidden),
        beside=beside,
        sparse_gate=sparse,
        streams=streams,
        window=made.window if attention != _FULL else 0,
        # Norms of the router's input, of Laurel's output and of the layer's own input, and the scale of corrections.
        norm_parameters=made.norm_parameters + 4 * hidden,
    )


def _fourth(
    values: ConfigValues, hidden: int, layer: Callable[[Heads], Layer], kind: tuple[str, bool, int, bool]
) -> Layer:
    """Return a layer of Gemma 4: Gemma4TextDecoderLayer."""
    attention, reuses, inner, _ = kind
    full = attention == _FULL
    width = values.whole("head_dim", default=256)
    keys = values.whole("num_key_value_heads")
    joined = full and values.flag("attention_k_eq_v", False)
    if full:
        width = values.whole("global_head_dim", default=512)
        keys = values.whole("num_global_key_value_heads", default=keys) if joined else keys
    made = _sharing(layer(Heads(values.whole("num_attention_heads"), keys, width, width)), reuses, joined=joined)
    doubled = reuses and values.flag("use_double_wide_mlp", False)
    own = _own_input(values, hidden)
    experts = _experts(values, hidden) if values.flag("enable_moe_block", False) else None
    norms = made.norm_parameters + (hidden if own else 0)
    if experts:
        norms += 4 * hidden + experts.count  # three norms, the router's scale of its input and of each expert
    return replace(
        made,
        mlp=_mlp(made, hidden, inner * (1 + doubled)),
        per_layer=own,
        experts=experts,
        window=0 if full else made.window,
        norm_parameters=norms,
    )


def _sharing(layer: Layer, reuses: bool, *, joined: bool) -> Layer:
    """Return a layer without projections to keys and values where it takes those of a layer before it.

    Args:
        layer: One with all three.
        reuses: Whether it takes them.
        joined: Whether its keys are its values too.
    """
    layer = replace(layer, value_norm=True)
    if reuses:
        norms = layer.norm_parameters - layer.heads.width
        return replace(layer, qkv=layer.qkv[:1], keys_from="before", norm_parameters=norms)
    return replace(layer, qkv=layer.qkv[:2], keys_from="values") if joined else layer


def _mlp(layer: Layer, hidden: int, inner: int) -> tuple[Linear, ...]:
    gate, up, down = layer.mlp
    return replace(gate, outputs=inner), replace(up, outputs=inner), replace(down, inputs=inner)


def _own_input(values: ConfigValues, hidden: int) -> tuple[Linear, ...]:
    width = _per_layer_width(values)
    return (
        (Linear("per_layer_input_gate", hidden, width), Linear("per_layer_projection", width, hidden)) if width else ()
    )


def _experts(values: ConfigValues, hidden: int) -> Experts:
    count = values.whole("num_experts", high=2048)
    visited = values.whole("top_k_experts", "num_experts_per_tok", default=8, high=count)
    return Experts(count, visited, values.whole("moe_intermediate_size"), chooser=Linear("proj", hidden, count))


def llama4_groups(
    family: Family, values: ConfigValues, layers: int, layer: Callable[[bool], Layer]
) -> tuple[tuple[LayerGroup, ...], tuple[int, ...]]:
    """Return the layers kind by kind, and of each layer the number of its kind.

    Args:
        family: How Llama 4 is built.
        values: The config.
        layers: Number of layers.
        layer: Returns a layer, with experts or dense, with everything that all layers have.
    """
    sparse = sparse_layers(LLAMA_4, family, values, layers)
    every = values.whole("no_rope_layer_interval", default=4)
    said = values.wholes("no_rope_layers")  # of each layer 1 where it has positions
    kinds = values.words("layer_types")
    chunk = values.whole("attention_chunk_size", default=8192, low=0)
    numbers: dict[Layer, int] = {}
    order = []
    for index in range(layers):
        turned = bool(said[index]) if index < len(said) else (index + 1) % every != 0
        chunked = kinds[index] == "chunked_attention" if index < len(kinds) else turned
        one = replace(
            layer(index in sparse),
            query_key_norm="plain" if turned and values.flag("use_qk_norm", True) else "",
            rotary=1.0 if turned else 0.0,
            tempered=not turned and values.flag("attn_temperature_tuning", True),
            window=chunk if chunked else 0,
        )
        order.append(numbers.setdefault(one, len(numbers)))
    groups = tuple(LayerGroup(order.count(number), one) for one, number in numbers.items())
    return groups, tuple(order) if len(groups) > 1 else ()
