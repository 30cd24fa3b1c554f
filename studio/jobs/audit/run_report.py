"""The rows of an adapter's report: what each form showed, its size on disk, memory and speed of serving it.

Besides, what the adapter adds to the weights, beside what rounding to 4 bits takes from them, block by block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from studio.core.events import Phase
from studio.core.vram.reserve import CONTEXT_BYTES, LEAST_CONTEXT_BYTES, MOST_CONTEXT_BYTES
from studio.jobs.audit.blocks import Parts
from studio.jobs.audit.figures import Measured, stored_bytes_of
from studio.jobs.audit.forms import FORMS
from studio.jobs.audit.gguf_variants import GgufForms
from studio.jobs.audit.speed import NOT_ASKED, Speed, unmeasured
from studio.jobs.audit.variants import AdapterForms, Named
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.probe.exported import GgufFile
from studio.runs.layout import ADAPTER_WEIGHTS
from studio.runs.worker import Worker


@dataclass(frozen=True, slots=True)
class RunReport:
    """Makes the rows.

    Attributes:
        weights: The base in 16 bit.
        forms: Of the adapter.
        adapter: Its folder.
        found: What was measured.
    """

    weights: FolderWeights
    forms: AdapterForms
    adapter: Path
    found: Measured

    def walked(self, one: Named, speeds: Mapping[tuple[str, bool], Speed]) -> dict[str, Any]:
        """Return the row of a form that was walked."""
        size, name = self._form_bytes(one), one.variant.name
        speed = speeds.get((one.form, one.has_adapter), unmeasured(NOT_ASKED))
        row = self._row(name, one.title, size, speed, usable=one.usable)
        return row | {"form": one.form, "disk": "estimated", "why": ""}

    def gguf(self, name: str, file: GgufFile, gguf: GgufForms, speed: Speed) -> dict[str, Any]:
        """Return the row of a GGUF file."""
        title = f"{'GGUF ' + file.form if file.form else 'GGUF'}, {file.source}"
        why = gguf.whys.get(name, "")
        row = self._row(name, title, file.path.stat().st_size, speed, usable=bool(file.form) and not why)
        return row | {"form": file.form or "gguf", "disk": "measured", "why": why}

    def _row(self, name: str, title: str, size: int, speed: Speed, *, usable: bool) -> dict[str, Any]:
        return {
            "name": name,
            "title": title,
            "usable": usable,
            "task": asdict(self.found.task[name]) if name in self.found.task else None,
            "neutral": asdict(self.found.neutral[name]) if name in self.found.neutral else None,
            "disk_bytes": size,
            "serving": {**asdict(serving(self.weights.clean.config, size)), "how": "estimated"},
            "speed": asdict(speed),
        }

    def _form_bytes(self, one: Named) -> int:
        """Return the bytes of a form on disk, and so about of its weights when it is served."""
        kept_bytes = min(2, stored_bytes_of(self.weights))
        whole = sum(parameter.numel() for parameter in self.weights.clean.parameters())
        inside = 0 if one.form == "16-bit" else self.forms.rounded_weights
        base = (whole - inside) * kept_bytes + inside * FORMS[self.forms.form.name].bits / 8
        return int(base + ((self.adapter / ADAPTER_WEIGHTS).stat().st_size if one.has_adapter else 0))


def handiest(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the forms that can be used, the smallest first."""
    usable = [row for row in rows if row["usable"] and row["task"]]
    return [row["name"] for row in sorted(usable, key=lambda row: row["disk_bytes"])]


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


CONTEXT_TOKENS = 2048
_KEY_BYTES = 2
_WORKSPACE_SHARE = 0.1
"""Activations and allocator on top of weights and cache at the high end: a choice, not a measurement."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Memory on a CUDA card for one conversation; an estimate.

    Attributes:
        context_tokens: Length of the conversation.
        cache_bytes: Keys and values of that length in 16 bit.
        low_bytes: Weights, cache and the smallest CUDA context seen.
        expected_bytes: With a usual context.
        high_bytes: With the largest context seen, and a tenth for activations and allocator.
        read_bytes_per_token: What must be read from memory for each new token: weights and, at full length, the cache.
            A card's bandwidth over it bounds the tokens per second of one conversation from above.
    """

    context_tokens: int
    cache_bytes: int
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    read_bytes_per_token: int


def serving(config: Any, weight_bytes: int) -> Serving:
    """Return the estimate for weights of a size.

    Args:
        config: Of the model.
        weight_bytes: Of all weights, in the form in which they are held.
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    cache = 2 * int(text.num_hidden_layers) * keys * width * _KEY_BYTES * CONTEXT_TOKENS
    held = weight_bytes + cache
    return Serving(
        CONTEXT_TOKENS,
        cache,
        held + LEAST_CONTEXT_BYTES,
        held + CONTEXT_BYTES,
        int(held * (1 + _WORKSPACE_SHARE)) + MOST_CONTEXT_BYTES,
        held,
    )
