"""Reads the layers of an architecture that is not in the table of families from its checkpoint's tensors.

Weights are told exactly: every linear map by its name and shape, experts, norms. How a layer computes them is not in a
header, and is taken to be what most decoders do; the shape says so as a doubt. Names of maps are conventions that
nearly all families keep; what does not keep them counts with its parameters and as a target, but not with activations.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from studio.core.checkpoint_tensors import CheckpointTensors, Tensors, parameters_of
from studio.core.config_values import ConfigValues
from studio.core.layer_parts import Heads, Latent, Linear
from studio.core.shape import Experts, Layer, LayerGroup

_EXPERT = re.compile(r"(?:.*\.)?experts\.(?P<number>\d{1,9})\.(?P<rest>.+)")
_ATTENTION = ("attn", "attention")
_APART = (("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv"), ("query", "key", "value"))
_INTO, _FROM = "kv_a_proj_with_mqa", "kv_b_proj"
"""Projections of latent attention (DeepSeek V2)."""
_JOINED = ("qkv_proj", "query_key_value", "qkv", "Wqkv", "c_attn", "W_pack")
_BACK = ("o_proj", "out_proj", "wo", "dense", "c_proj", "proj")


def facts_of(tensors: CheckpointTensors, config: ConfigValues) -> dict[str, Any]:
    """Return sizes that the tensors settle, under a config's usual keys."""
    facts: dict[str, Any] = {"num_hidden_layers": len(tensors.layers), "tie_word_embeddings": not tensors.head}
    if tensors.embedding:
        facts["vocab_size"], facts["hidden_size"] = tensors.embedding[0], tensors.embedding[-1]
    heads = config.whole("num_attention_heads", "n_head", "n_heads", default=0, low=0, high=1 << 16)
    if not heads:
        facts["num_attention_heads"] = 1  # it has no attention
    first = next(iter(tensors.layers.values()))
    maps = dict(_maps(first))
    names = {_last(path): shape for path, shape in maps.items() if _is_attention(path)}
    apart = next((group for group in _APART if set(group) <= names.keys()), None)
    if apart and heads:
        width = names[apart[0]][0] // heads
        facts["head_dim"] = max(1, width)
        facts["num_key_value_heads"] = max(1, names[apart[1]][0] // max(1, width))
    wide = [shape for path, shape in maps.items() if not _is_attention(path)]
    facts["intermediate_size"] = max((max(shape) for shape in wide), default=1)
    return facts


def layers_of(
    tensors: CheckpointTensors, config: ConfigValues, hidden: int, usual: Layer
) -> tuple[tuple[LayerGroup, ...], tuple[int, ...]]:
    """Return the layers kind by kind, and the kind of each.

    Args:
        tensors: The checkpoint's tensors.
        config: The model's config, for what tensors do not say: experts that a token visits.
        hidden: Width of the residual stream.
        usual: A layer with everything else: norms, activation, positions, heads.
    """
    kinds: dict[Layer, int] = {}
    order = []
    for each in tensors.layers.values():
        layer = _layer(each, config, hidden, usual)
        order.append(kinds.setdefault(layer, len(kinds)))
    groups = tuple(LayerGroup(order.count(number), layer) for layer, number in kinds.items())
    return groups, tuple(order) if len(groups) > 1 else ()


def _layer(tensors: Tensors, config: ConfigValues, hidden: int, usual: Layer) -> Layer:
    experts = _experts(tensors, config, hidden)
    maps = {path: shape for path, shape in _maps(tensors) if not (experts and _is_router(path, shape, experts, hidden))}
    attention = {path: shape for path, shape in maps.items() if _is_attention(path)}
    qkv, out = _projections(attention, tensors)
    rest = {path: shape for path, shape in maps.items() if not (qkv and path in attention)}
    mlp, gated = _fed_forward(rest, tensors, hidden)
    used = {linear.name for linear in (*qkv, *((out,) if out else ()), *mlp)}
    beside = tuple(_linear(path, shape, tensors) for path, shape in maps.items() if _last(path) not in used)
    counted = sum(one.weights + one.biases for one in (*qkv, *((out,) if out else ()), *mlp, *beside))
    if experts:
        counted += experts.weights(hidden) + hidden * experts.count
    latent, heads = _latent(attention, usual.heads.queries)
    made = replace(
        usual,
        latent=latent,
        heads=heads or usual.heads,
        rotary_form="pairs" if latent else usual.rotary_form,
        qkv=qkv,
        out=out,
        mlp=mlp,
        gated=gated,
        experts=experts,
        beside=beside,
        query_key_norm="head" if any("q_norm" in name or "query_layernorm" in name for name in tensors) else "",
    )
    return replace(made, norm_parameters=max(0, parameters_of(tensors) - counted))


def _maps(tensors: Tensors) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the linear maps outside routed experts: path of the module and `[outputs, inputs]`."""
    for name, shape in tensors.items():
        if name.endswith(".weight") and len(shape) == 2 and not _EXPERT.fullmatch(name):
            yield name.removesuffix(".weight"), shape


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _is_attention(path: str) -> bool:
    return any(word in part for part in path.split(".")[:-1] for word in _ATTENTION)


def _is_router(path: str, shape: tuple[int, ...], experts: Experts, hidden: int) -> bool:
    return shape == (experts.count, hidden) and not _is_attention(path)


def _linear(path: str, shape: tuple[int, ...], tensors: Mapping[str, Any]) -> Linear:
    return Linear(_last(path), shape[1], shape[0], f"{path}.bias" in tensors)


def _projections(maps: Tensors, tensors: Tensors) -> tuple[tuple[Linear, ...], Linear | None]:
    """Return the projections to queries, keys and values and the one back; nothing where they are not told by name."""
    named = {_last(path): path for path in maps}
    back = next((named[name] for name in _BACK if name in named), None)
    if back is None:
        return (), None
    out = _linear(back, maps[back], tensors)
    if {_INTO, _FROM} <= named.keys():
        present = [name for name in ("q_proj", "q_a_proj", "q_b_proj", _INTO, _FROM) if name in named]
        return tuple(_linear(named[name], maps[named[name]], tensors) for name in present), out
    for names in _APART:
        if set(names) <= named.keys():
            return tuple(_linear(named[name], maps[named[name]], tensors) for name in names), out
    for name in _JOINED:
        if name in named:
            return (_linear(named[name], maps[named[name]], tensors),), out
    return (), None


def _fed_forward(maps: Tensors, tensors: Tensors, hidden: int) -> tuple[tuple[Linear, ...], bool]:
    """Return an MLP by its shapes: two maps or one into a width and one back; and whether it has a gate."""
    into = [path for path, (outputs, inputs) in maps.items() if inputs == hidden and outputs != hidden]
    back = [path for path, (outputs, inputs) in maps.items() if outputs == hidden and inputs != hidden]
    for path in back:
        inner = maps[path][1]
        pair = [one for one in into if maps[one][0] == inner and _parent(one) == _parent(path)]
        wide = [one for one in into if maps[one][0] == 2 * inner and _parent(one) == _parent(path)]
        chosen = pair if len(pair) in {1, 2} else wide[:1]
        if chosen:
            # Of two equal maps it does not matter which is the gate.
            made = tuple(_linear(one, maps[one], tensors) for one in (*sorted(chosen), path))
            return made, len(pair) != 1
    return (), True


def _latent(maps: Tensors, queries: int) -> tuple[Latent | None, Heads | None]:
    """Return the widths of latent attention with its heads, where the projections have the names that it has."""
    named = {_last(path): shape for path, shape in maps.items()}
    asked = named.get("q_b_proj") or named.get("q_proj")
    into, back, out = named.get(_INTO), named.get(_FROM), named.get("o_proj")
    if not (asked and into and back and out) or asked[0] % queries or out[1] % queries:
        return None, None
    narrow = named["q_a_proj"][0] if "q_a_proj" in named else 0
    latent = Latent(narrow, back[1], max(1, into[0] - back[1]))
    return latent, Heads(queries, queries, asked[0] // queries, out[1] // queries)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _experts(tensors: Tensors, config: ConfigValues, hidden: int) -> Experts | None:
    """Return the routed experts of a layer: single maps by their number, or stacks `[experts, .., ..]`."""
    numbers: dict[int, list[int]] = {}
    for name, shape in tensors.items():
        if (match := _EXPERT.fullmatch(name)) and not name.endswith("bias"):
            numbers.setdefault(int(match["number"]), []).append(math.prod(shape))
    stacks = [shape for shape in tensors.values() if len(shape) == 3 and hidden in shape[1:]]
    if len(numbers) >= 2:
        count, sizes = len(numbers), max(numbers.values(), key=sum)
    elif stacks:
        count, sizes = stacks[0][0], [math.prod(shape[1:]) for shape in stacks]
    else:
        return None
    gated = len(sizes) != 2 or sizes[0] != sizes[1]
    keys = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_top_k")
    per_token = config.whole(*keys, default=min(2, count), high=1 << 12)
    inner = max(1, sum(sizes) // ((2 + gated) * hidden))
    return Experts(count, min(per_token, count), inner, gated=gated)
