"""Reads mixtures of experts from a config: which layers hold them, how many, how wide.

Sources: transformers 5.24 `models/*/configuration_*.py` and `modeling_*.py`.
"""

from studio.core.config_values import ConfigValues
from studio.core.families import Family
from studio.core.hybrid_layers import ungated
from studio.core.layer_parts import Linear
from studio.core.shape import Experts

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MOST_EXPERTS = 2048
"""Published layers have up to 512. For older versions of transformers each expert is a module of its own in the
estimate, which takes 10 ms each."""


def sparse_layers(name: str, family: Family, values: ConfigValues, layers: int) -> list[int]:
    """Return the numbers of the layers that hold experts, in order.

    See `__init__` of the decoder layers of Qwen2Moe, DeepseekV3, Glm4MoeLite and Ernie4_5_Moe, and Llama4TextConfig.
    """
    kinds = values.words("mlp_layer_types")
    if kinds:
        return [index for index, kind in enumerate(kinds[:layers]) if kind == "sparse"]
    if name == "ernie4_5_moe":
        first = values.whole("moe_layer_start_index", default=family.dense_first, low=0)
        last = values.whole("moe_layer_end_index", default=-1, low=-1)
        step = values.whole("moe_layer_interval", default=1)
        end = layers if last == -1 else min(layers, last + 1)
        return [index for index in range(first, end) if (index + 1) % step == 0]
    if name == "llama4_text":
        step = values.whole("interleave_moe_layer_step", default=1)
        named = values.wholes("moe_layers") if "moe_layers" in values else range(step - 1, layers, step)
        return sorted({index for index in named if 0 <= index < layers})
    if name in ("qwen2_moe", "qwen3_moe"):
        step = values.whole("decoder_sparse_step", default=1)
        return sorted(set(range(step - 1, layers, step)).difference(values.wholes("mlp_only_layers")))
    return list(range(values.whole("first_k_dense_replace", default=family.dense_first, low=0), layers))


def experts_of(name: str, family: Family, values: ConfigValues, hidden: int) -> Experts | None:
    """Return the routed experts of a config, with what every token visits beside them; None without any."""
    count = values.whole(*EXPERT_COUNTS, default=0, low=0, high=_MOST_EXPERTS)
    if count < 2:  # a "mixture" of one is a plain MLP
        return None
    inner = values.whole(family.expert_inner, "moe_intermediate_size", "intermediate_size")
    shared = values.whole(family.shared_inner, default=0, low=0) if family.shared_inner else 0
    if family.shared_count:
        shared = inner * values.whole(family.shared_count, default=family.shared_default, low=0, high=_MOST_EXPERTS)
    visited = ("num_experts_per_tok", "num_experts_per_token", "moe_k")
    all_of = name == "llama4_text"
    per_token = values.each("moe_topk") or values.whole(*visited, default=1 if all_of else 2, high=count)
    biases = 2 * inner + hidden if name == "gpt_oss" else 0  # of gate and up, and of down
    gated = family.chooser == "shared_expert_gate"
    chooser = Linear(family.chooser, hidden, 1 if gated else count) if family.chooser else None
    by_all = family.experts_adapted_by_all
    made = Experts(count, per_token, inner, shared, biases, gated, chooser, by_all, given_all=all_of)
    return ungated(made, values, hidden) if name == "nemotron_h" else made
