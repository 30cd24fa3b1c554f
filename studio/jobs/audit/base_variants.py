"""A base model as variants: as it is stored, and rounded in each way."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from studio.jobs.audit.forms import FORMS, STORED, Form
from studio.jobs.audit.scores import Head
from studio.jobs.audit.sweep import Variant
from studio.jobs.audit.weights import FolderWeights
from studio.jobs.base.weights.dequantized import quantised_parameters, turned_parameters
from studio.jobs.base.weights.units import Read

_WEIGHT = ".weight"
_BLOCK = re.compile(r".*?\.\d+\.")


def folder_variants(weights: FolderWeights, names: Sequence[str], *, kept: Collection[str] = ()) -> list[Variant]:
    """Return the variants of a model folder, one per name of a form, in this order.

    Args:
        weights: The model.
        names: Of `FORMS`; the first one is what the others are compared with.
        kept: Modules whose linear layers stay as they are stored, such as `model.layers.0`.
    """
    stored = stored_variant(weights)
    rounded = rounded_linears(weights)
    return [in_form(stored, FORMS[name], rounded, kept=kept) for name in names]


def rounded_linears(weights: FolderWeights, kept: Collection[str] = ()) -> set[str]:
    """Return the names of the linear layers that a 4-bit model holds in 4 bits.

    Args:
        weights: The model.
        kept: Modules that stay in 16 bit under it.
    """
    names = quantised_parameters(weights.clean, kept) | turned_parameters(weights.clean, kept)
    return {name.removesuffix(_WEIGHT) for name in names}


def stored_variant(weights: FolderWeights, read: Read | None = None) -> Variant:
    """Return the model as it is stored, or with other weights inside its blocks."""
    model: Any = weights.clean
    embedding = _name_of(weights, "get_input_embeddings")
    head = _name_of(weights, "get_output_embeddings")
    biased = getattr(model.get_output_embeddings(), "bias", None) is not None

    def head_rows(first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        bias = weights.read(f"{head}.bias")[first:stop].float() if biased else None
        return weights.rows(f"{head}.weight", first, stop).float(), bias

    vocabulary = model.state_dict()[f"{head}.weight"].shape[0]
    return Variant(
        STORED.name,
        read or Remembered(weights.read),
        lambda tokens: weights.picked(f"{embedding}.weight", tokens),
        Head(head_rows, vocabulary),
    )


def in_form(
    variant: Variant, form: Form, rounded: Collection[str], *, kept: Collection[str] = (), name: str = ""
) -> Variant:
    """Return a variant whose linear layers are held in a form.

    Args:
        variant: What is rounded.
        form: How.
        rounded: Names of the linear layers that are rounded.
        kept: Modules whose linear layers are left out.
        name: Of the result; empty for the form's.
    """
    return replace(variant, name=name or form.name, form_of=_choice(form, rounded, kept), by_row=form.by_row)


def is_kept(name: str, kept: Collection[str]) -> bool:
    """Return whether a module is one of those that stay in 16 bit, or lies inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in kept)


class Remembered:
    """Reads parameters, and remembers those of the module that was read from last: variants read the same ones."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._place, self._held = "", dict[str, Tensor]()

    def __call__(self, name: str) -> Tensor:
        """Return a parameter."""
        found = _BLOCK.match(name)
        place = found.group() if found else ""
        if place != self._place or not place:
            self._place, self._held = place, {}
        if name not in self._held:
            self._held[name] = self._read(name)
        return self._held[name]


def _choice(form: Form, rounded: Collection[str], kept: Collection[str]) -> Callable[[str], Form]:
    chosen = frozenset(name for name in rounded if not is_kept(name, kept))
    return lambda name: form if name in chosen else STORED


def _name_of(weights: FolderWeights, getter: str) -> str:
    module = getattr(weights.clean, getter)()
    return next(str(name) for name, candidate in weights.clean.named_modules() if candidate is module)
