"""Linear maps whose weight a family's own code reads directly, passing by the module that holds it.

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

_NOT_ADAPTED: Mapping[str, Mapping[str, str]] = {
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
    name for names in _NOT_ADAPTED.values() for name, why in names.items() if why is _READ
).union(*_KEPT_16BIT.values())
"""Names of the weights that are read without a fused kernel, too; in other families they are linear maps as usual."""


def not_adapted(family: str) -> Mapping[str, str]:
    """Return the linear maps that get no adapter, by the last part of their names, each with the reason.

    Args:
        family: transformers' `model_type` of the language model or, where that has the same with `_text`, of the whole.
    """
    return _NOT_ADAPTED.get(family) or _NOT_ADAPTED.get(f"{family}_text") or {}


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
