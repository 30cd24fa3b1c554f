"""Families whose layers mix tokens by a state or a short convolution, alone or among layers of attention, as one table.

Sources: transformers 5.24 `models/*/configuration_*.py` and `modeling_*.py`; the table is checked against the modules
that transformers builds (tests/core/test_hybrid_inventory.py). What their layers hold while they run is said by
`studio.core.vram.mixers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from studio.core.config_values import ConfigValues
from studio.core.errors import BadInput
from studio.core.families import NEVER, Family
from studio.core.layer_parts import Heads, Linear, Mixer
from studio.core.mixers_from_config import (
    FALCON_KEYS,
    GRANITE_KEYS,
    MAMBA2_KEYS,
    NEMOTRON_KEYS,
    jamba,
    joined_delta,
    mamba,
    mamba2,
    separate_delta,
    short_convolution,
)
from studio.core.shape import Experts, Layer, LayerGroup
from studio.core.text import plain

Settings = Mapping[str, Any]
FULL, STATE, BOTH, MLP, SPARSE = "full_attention", "linear_attention", "hybrid", "mlp", "moe"
"""Kinds of layer as transformers names them: `linear_attention` is any mixer, `hybrid` attention beside one. The last
two are layers that mix nothing."""

_SAME = {"mamba": STATE, "attention": FULL, "conv": STATE}
"""Names of older configs (transformers configuration_utils.py _LEGACY_LAYER_TYPE_REMAP), and LFM2's own."""


_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layer that are attention, in a family that has no other mixer."""


@dataclass(frozen=True, slots=True)
class Hybrid:
    """How a family with mixers is built.

    Attributes:
        family: What its attention, norms and MLP are like.
        kinds: Returns the kind of each layer.
        mixer: Returns the mixer of a layer, from the config and the hidden size.
        settled: Returns what the config says under other keys, or leaves to its defaults, under the keys that are read.
        is_sparse: Whether a layer holds experts, by its number and kind.
        output_gate: Whether queries come with a gate of the attention's output.
        wide_residual: Whether the residual stream is kept in fp32, if the config does not say.
    """

    family: Family
    kinds: Callable[[ConfigValues, int], tuple[str, ...]]
    mixer: Callable[[ConfigValues, int], Mixer]
    settled: Callable[[ConfigValues], Settings] = lambda values: {}
    is_sparse: Callable[[ConfigValues, int, str], bool] = lambda values, index, kind: True
    output_gate: bool = False
    wide_residual: bool = False


def layer_kinds(name: str, hybrid: Hybrid, values: ConfigValues) -> tuple[str, ...]:
    """Return the kind of each layer of a hybrid.

    Raises:
        BadInput: A kind is not known, or there are more or fewer than layers.
    """
    layers = values.whole("num_hidden_layers", "n_layer", default=0, low=0)
    kinds = tuple(_SAME.get(kind, kind) for kind in hybrid.kinds(values, layers))
    for kind in kinds:
        if kind not in (FULL, STATE, BOTH, MLP, SPARSE):
            shown = plain(kind, one_line=True, limit=40)
            raise BadInput(f"the model's config names a layer kind {shown!r}, which a {name} model does not have")
    if not kinds or (name != "nemotron_h" and len(kinds) != layers):
        raise BadInput(f"the model's config names the kinds of {len(kinds)} layers, but has {layers} layers")
    return kinds


def hybrid_groups(
    hybrid: Hybrid,
    values: ConfigValues,
    kinds: tuple[str, ...],
    layer: Callable[[bool], Layer],
) -> tuple[tuple[LayerGroup, ...], tuple[int, ...]]:
    """Return the layers of a hybrid kind by kind, and of each layer the number of its kind.

    Args:
        hybrid: How the family is built.
        values: The config.
        kinds: The kind of each layer.
        layer: Returns a layer of attention with its MLP, sparse or dense.
    """
    mixer = (
        hybrid.mixer(values, values.whole("hidden_size", "d_model", high=1 << 20))
        if {STATE, BOTH} & set(kinds)
        else None
    )
    numbers: dict[Layer, int] = {}
    made: dict[tuple[str, bool], Layer] = {}
    order = []
    for index, kind in enumerate(kinds):
        sparse = hybrid.is_sparse(values, index, kind)
        if (kind, sparse) not in made:
            one = _of_kind(hybrid, kind, layer(sparse), mixer)
            wide = hybrid.wide_residual and values.flag("residual_in_fp32", True)
            made[kind, sparse] = replace(one, wide_residual=wide)
        order.append(numbers.setdefault(made[kind, sparse], len(numbers)))
    return tuple(LayerGroup(order.count(number), one) for one, number in numbers.items()), tuple(order)


def _of_kind(hybrid: Hybrid, kind: str, layer: Layer, mixer: Mixer | None) -> Layer:
    """Return what a kind of layer keeps of a layer with everything, and its mixer."""
    alone = hybrid.family.wiring == "single"
    if hybrid.output_gate:
        query, *rest = layer.qkv
        layer = replace(layer, qkv=(replace(query, outputs=2 * query.outputs), *rest), output_gate=True)
    if kind == BOTH:
        return replace(layer, mixer=mixer)
    if kind != FULL:
        head_norms = 2 * layer.heads.width if layer.query_key_norm == "head" else 0
        layer = replace(
            layer,
            heads=Heads(0, 0, 0, 0),
            qkv=(),
            out=None,
            query_key_norm="",
            output_gate=False,
            norm_parameters=layer.norm_parameters - head_norms,
            rotary=0.0,
            rotary_joined=False,
            window=0,
            mixer=mixer if kind == STATE else None,
        )
    if alone and kind in (FULL, STATE):
        layer = replace(layer, mlp=(), experts=None)
    return layer


# The kinds of the layers.


def _named(values: ConfigValues) -> tuple[str, ...]:
    return values.words("layer_types") or values.words("layers_block_type")


def _every_fourth(values: ConfigValues, layers: int) -> tuple[str, ...]:
    every = values.whole("full_attention_interval", default=4)
    return _named(values) or tuple(STATE if (index + 1) % every else FULL for index in range(layers))


def _short_convolutions(values: ConfigValues, layers: int) -> tuple[str, ...]:
    full = values.wholes("full_attn_idxs") if "full_attn_idxs" in values else range(layers)
    return _named(values) or tuple(FULL if index in full else STATE for index in range(layers))


def _all_state(values: ConfigValues, layers: int) -> tuple[str, ...]:
    return _named(values) or (STATE,) * layers


def _pattern(values: ConfigValues, layers: int) -> tuple[str, ...]:
    letters = {"M": STATE, "E": SPARSE, "*": FULL, "-": MLP}
    pattern = values.word("hybrid_override_pattern")
    return _named(values) or tuple(letters.get(letter, letter) for letter in pattern)


def _listed(values: ConfigValues, layers: int) -> tuple[str, ...]:
    full = values.wholes("attn_layer_indices")
    return tuple(FULL if index in full else STATE for index in range(layers))


def _periodic(values: ConfigValues, layers: int) -> tuple[str, ...]:
    period = values.whole("attn_layer_period", default=8)
    offset = values.whole("attn_layer_offset", default=4, low=0)
    return tuple(FULL if index % period == offset else STATE for index in range(layers))


# What a config says under other keys.


def _lfm2_settings(values: ConfigValues) -> Settings:
    """Lfm2MLP.__init__: the width of the MLP is two thirds of what the config says, rounded up."""
    inner = values.whole("block_ff_dim", "intermediate_size", default=12288)
    if values.flag("block_auto_adjust_ff_dim", True):
        multiple = values.whole("block_multiple_of", default=256)
        inner = int(values.real("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
        inner = multiple * -(-inner // multiple)
    return {"intermediate_size": inner, **_lfm2_moe_settings(values)}


def _lfm2_moe_settings(values: ConfigValues) -> Settings:
    return {"tie_word_embeddings": values.flag("tie_embedding", values.flag("tie_word_embeddings", True))}


def _granite_settings(values: ConfigValues) -> Settings:
    """GraniteMoeHybridMLP stands alone where there are no experts; positions are rotated only where it is said."""
    settled: dict[str, Any] = {"num_local_experts": values.whole("num_local_experts", default=8, low=0)}
    if not settled["num_local_experts"]:
        settled["intermediate_size"] = values.whole("shared_intermediate_size", default=1024)
    if values.word("position_embedding_type") != "rope":
        settled["partial_rotary_factor"] = 0.0
    return settled


def _nemotron_settings(values: ConfigValues) -> Settings:
    """NemotronHConfig: as many layers as kinds are named."""
    return {
        "num_hidden_layers": len(_pattern(values, 0)),
        "hidden_act": values.word("mlp_hidden_act", default="relu2"),
        "head_dim": values.whole("head_dim", "attention_head_dim", default=128),
    }


def _bamba_settings(values: ConfigValues) -> Settings:
    return {"partial_rotary_factor": 0.5}  # BambaConfig.__post_init__ sets it, whatever the config says


def _no_heads(values: ConfigValues) -> Settings:
    """Models without attention: one head without width."""
    return {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "intermediate_size": 1}


def _qwen_sparse(values: ConfigValues, index: int, kind: str) -> bool:
    dense = values.wholes("mlp_only_layers")
    return index not in dense and (index + 1) % values.whole("decoder_sparse_step", default=1) == 0


def _after_dense(values: ConfigValues, index: int, kind: str) -> bool:
    return index >= values.whole("num_dense_layers", default=2, low=0)


def _jamba_sparse(values: ConfigValues, index: int, kind: str) -> bool:
    period = values.whole("expert_layer_period", default=2)
    return index % period == values.whole("expert_layer_offset", default=1, low=0)


_QWEN = Family(norm="rms_wide", query_key_norm="head", mlp_bias=NEVER, rotary=0.25)
_QWEN_MOE = replace(
    _QWEN,
    expert_inner="moe_intermediate_size",
    shared_inner="shared_expert_intermediate_size",
    chooser="shared_expert_gate",
)
_LFM2 = Family(
    query_key_norm="head",
    qkv_bias=NEVER,
    out="out_proj",
    out_bias=NEVER,
    mlp=("w1", "w3", "w2"),
    mlp_bias=NEVER,
    tied=True,
)
_ALONE = Family(wiring="single", norms=1, rotary=0.0, qkv_bias=NEVER, out_bias=NEVER)


HYBRIDS: Mapping[str, Hybrid] = {
    "qwen3_next": Hybrid(_QWEN_MOE, _every_fourth, joined_delta, is_sparse=_qwen_sparse, output_gate=True),
    "qwen3_5_text": Hybrid(_QWEN, _every_fourth, separate_delta, output_gate=True),
    "qwen3_5_moe_text": Hybrid(_QWEN_MOE, _every_fourth, separate_delta, output_gate=True),
    "lfm2": Hybrid(_LFM2, _short_convolutions, short_convolution, _lfm2_settings),
    "lfm2_moe": Hybrid(
        replace(_LFM2, expert_inner="moe_intermediate_size"),
        _short_convolutions,
        short_convolution,
        _lfm2_moe_settings,
        _after_dense,
    ),
    "granitemoehybrid": Hybrid(
        Family(
            mlp=("input_linear", "output_linear"),
            mlp_bias=NEVER,
            scaled_residual=True,
            alters_embedding=True,
            scaled_logits=True,
            shared_inner="shared_intermediate_size",
        ),
        _all_state,
        mamba2(GRANITE_KEYS),
        _granite_settings,
    ),
    "nemotron_h": Hybrid(
        replace(
            _ALONE,
            norm="rms_wide",
            mlp=("up_proj", "down_proj"),
            gated=False,
            activation="relu2",
            expert_inner="moe_intermediate_size",
            shared_inner="moe_shared_expert_intermediate_size",
        ),
        _pattern,
        mamba2(NEMOTRON_KEYS),
        _nemotron_settings,
        lambda values, index, kind: kind == SPARSE,
    ),
    "falcon_h1": Hybrid(
        Family(alters_embedding=True, scaled_logits=True),
        lambda values, layers: (BOTH,) * layers,
        mamba2(FALCON_KEYS),
    ),
    "bamba": Hybrid(Family(rotary=0.5), _listed, mamba2(GRANITE_KEYS), _bamba_settings),
    "mamba2": Hybrid(_ALONE, _all_state, mamba2(MAMBA2_KEYS), _no_heads, wide_residual=True),
    "mamba": Hybrid(replace(_ALONE, tied=True), _all_state, mamba, _no_heads, wide_residual=True),
    "jamba": Hybrid(
        Family(rotary=0.0, qkv_bias=NEVER, out_bias=NEVER, mlp_bias=NEVER),
        _periodic,
        jamba,
        is_sparse=_jamba_sparse,
    ),
}
"""Keyed by transformers' `model_type` (of the text model, where a config has several)."""


def doubt_about_kinds(name: str, values: ConfigValues) -> str:
    """Return why layers of a family that mixes no kinds here are counted with doubt; empty where they are not."""
    kinds = dict.fromkeys(_SAME.get(kind, kind) for kind in _named(values))
    unknown = [plain(kind, one_line=True, limit=40) for kind in kinds if kind not in _ATTENTION]
    if not unknown:
        return ""
    return f"layers of kind {', '.join(unknown)} are not known of {name}: counted as layers of attention"


def ungated(experts: Experts, values: ConfigValues, hidden: int) -> Experts:
    """Return Nemotron-H's experts: without a gate, and where the config says so in a narrower width (NemotronHMoE)."""
    width = values.whole("moe_latent_size", default=0, low=0)
    if not width:
        return replace(experts, gated=False)
    bias = values.flag("mlp_bias", False)
    around = Linear("fc1_latent_proj", hidden, width, bias), Linear("fc2_latent_proj", width, hidden, bias)
    return replace(experts, gated=False, width=width, around=around)
