"""What the adapter adds to the weights beside what rounding to 4 bits takes from them, block by block."""

from collections.abc import Sequence
from typing import Any

import torch

from studio.core.events import Phase
from studio.jobs.audit.adapter_variants import AdapterForms
from studio.jobs.audit.blocks import Parts
from studio.runs.worker import Worker


@torch.no_grad()
def block_deltas(parts: Parts, forms: AdapterForms, worker: Worker) -> list[dict[str, Any]]:
    """Return for each block the Frobenius norms of rounding error and adapter delta, relative to the weights'.

    Only linear layers that are both rounded and adapted are compared.
    """
    merged = forms.merged(forms.stored)
    rows = []
    for place, (name, _) in enumerate(parts.blocks):
        worker.emit(Phase, name="comparing adapter and rounding", fraction=0.9 + 0.05 * place / len(parts.blocks))
        errors, deltas, wholes = list[float](), list[float](), list[float]()
        for weight in sorted(forms.both(f"{name}.")):
            stored = forms.stored(weight).float()
            deltas.append(_squared(merged(weight) - stored))
            errors.append(_squared(forms.dequantized(weight).float() - stored))
            wholes.append(_squared(stored))
        whole = sum(wholes)
        if whole:
            rows.append(
                {
                    "name": name,
                    "rounding": _root(errors, whole),
                    "adapter": _root(deltas, whole),
                    "ratio": (sum(errors) / sum(deltas)) ** 0.5 if sum(deltas) else None,
                }
            )
    return rows


def _squared(tensor: torch.Tensor) -> float:
    return float(tensor.square().sum())


def _root(parts: Sequence[float], whole: float) -> float:
    return float((sum(parts) / whole) ** 0.5)
