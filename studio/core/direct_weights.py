"""Linear maps that get no adapter: those whose weight a family's own code reads past the module that holds it.

Whatever replaces such a module has no part in the product: an adapter on it would be saved without ever having been
trained, and 4-bit weights would be read as if they were plain numbers. Most of these weights are read by fused kernels
that exist on a card only, so that the same adapter would train on a CPU and be dead on the card.

Source: transformers 5.24 `models/*/modeling_*.py`; tests/jobs/test_direct_weights.py finds the same names in them.
"""

from collections.abc import Iterable, Mapping

_FUSED = "the fused kernel of this model's Mamba layers reads the weight past the adapter, which would stay untrained"
_READ = "this model multiplies with the weight itself, past the adapter, which would stay untrained"
_MAMBA = {"x_proj": _FUSED, "dt_proj": _READ, "out_proj": _FUSED}
_MAMBA_2 = {"out_proj": _FUSED}

_READ_PAST: Mapping[str, Mapping[str, str]] = {
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "jamba": {"dt_proj": _READ},
    "mamba2": _MAMBA_2,
    "bamba": _MAMBA_2,
    "falcon_h1": _MAMBA_2,
    "granitemoehybrid": _MAMBA_2,
    "nemotron_h": _MAMBA_2,
    "zamba2": _MAMBA_2,
    "gemma3n_text": {"correction_coefs": _READ},
    "longcat_flash": {"classifier": _READ},
}

_KEPT_16BIT: Mapping[str, frozenset[str]] = {
    # Falcon Mamba and Jamba call this one as a module where the model is quantised.
    "mamba": frozenset(("dt_proj",)),
    # Clamped in place before use.
    "gemma3n_text": frozenset(("prediction_coefs", "correction_coefs")),
    "longcat_flash": frozenset(("classifier",)),
}

READ_IN_EVALUATION = frozenset(
    name for names in _READ_PAST.values() for name, why in names.items() if why is _READ
).union(*_KEPT_16BIT.values())
"""Names of the weights that are read without a fused kernel, too; in other families they are linear maps as usual."""


_STACKED = (
    "peft 0.21 takes this name, in this family, for a part of the fused experts: the maps of that name in dense layers "
    "and shared experts cannot be adapted alone"
)
_TAKEN_FOR_EXPERTS = frozenset(
    (
        *("qwen3_moe", "qwen3_next", "qwen3_omni_moe_text", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3"),
        *("deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe_text", "ernie4_5_moe", "dots1"),
        *("afmoe", "beam", "cohere2_moe", "exaone_moe", "hunyuan_v1_moe", "longcat_flash", "mellum"),
        *("sarvam_mla", "solar_open"),
    )
)
"""Families in which peft renames the MLP's maps to the fused experts, in saved adapters too (peft 0.21
utils/transformers_weight_conversion.py _MOE_TARGET_MODULE_MAPPING; tests/jobs/test_expert_runs.py looks there)."""
_OF_EXPERTS = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), _STACKED)


def not_adapted(family: str) -> Mapping[str, str]:
    """Return the linear maps that get no adapter, by the last part of their names, each with the reason.

    Args:
        family: transformers' `model_type` of the language model or, where that has the same with `_text`, of the whole.
    """
    stacked = family in _TAKEN_FOR_EXPERTS or f"{family}_text" in _TAKEN_FOR_EXPERTS
    return {**read_past(family), **_OF_EXPERTS} if stacked else read_past(family)


def read_past(family: str) -> Mapping[str, str]:
    """Return the linear maps whose weight is read past the module, by the last part of their names, with the reason.

    Args:
        family: As for `not_adapted`.
    """
    return _READ_PAST.get(family) or _READ_PAST.get(f"{family}_text") or {}


def left_out(family: str, names: Iterable[str]) -> str:
    """Return in words which linear maps `all-linear` leaves out for that reason; empty where there are none.

    Args:
        family: As for `not_adapted`.
        names: The last parts of the names of the model's linear maps.
    """
    dead = not_adapted(family)
    reasons: dict[str, list[str]] = {}
    for name in sorted(dead.keys() & set(names)) if dead else ():
        reasons.setdefault(dead[name], []).append(name)
    parts = [f"{' and '.join(found)}: {why}" for why, found in reasons.items()]
    return f"all-linear leaves out {'; and '.join(parts)}" if parts else ""


def kept_16bit(family: str) -> frozenset[str]:
    """Return the linear maps that a quantised model keeps in 16 bit, by the last part of their names.

    They are those whose weight is read on every way through the layer. One that only a fused kernel reads is quantised:
    such a model goes without that kernel (`studio.jobs.base.load`).

    Args:
        family: As for `not_adapted`.
    """
    return _KEPT_16BIT.get(family) or _KEPT_16BIT.get(f"{family}_text") or frozenset()
