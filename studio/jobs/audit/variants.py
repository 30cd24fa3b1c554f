"""Makes the variants that an audit compares: a base as stored and quantised, an adapter on each base it can be put on.

Each variant is a model with its own weights. Base and adapter are merged by peft itself, in fp32. An unmerged adapter
and one that is merged without rounding are the same function, so both are measured in this way; they differ only if the
merged weights are rounded afterwards.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from studio.core.layer_precision import INT8, Table, precision_at
from studio.jobs.audit.forms import (
    BLOCK,
    EIGHT_BIT_WEIGHTS,
    FORMS,
    UNROUNDED,
    EightBitWeights,
    Form,
    FourBits,
    form_of_quant,
)
from studio.jobs.audit.scores import Head
from studio.jobs.audit.walk import Variant
from studio.jobs.base.device import job_device
from studio.jobs.base.load import FourBit
from studio.jobs.base.weights.dequantized import quantised_parameters, turned_parameters
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import Skeleton
from studio.jobs.base.weights.units import Read, find_units, merge_unit

_WEIGHT = ".weight"
_BLOCK = re.compile(r".*?\.\d+\.")


def folder_variants(weights: FolderWeights, names: Sequence[str], *, precision: Table = ()) -> list[Variant]:
    """Return the variants of a model folder, one per name of a form, in this order.

    Args:
        weights: The model.
        names: Names of `FORMS`; the first one is the reference.
        precision: Which linear layers are held otherwise (`model.precision`); those in 16 bit stay as stored.
    """
    read = Remembered(weights.read)
    rounded, stacks = rounded_linears(weights, precision), rounded_stacks(weights, precision)
    made = []
    for name in names:
        quant = FORMS[name].quant
        held = stored_variant(weights, _through(read, quant, stacks, ()) if quant and stacks else read)
        made.append(in_form(held, FORMS[name], rounded, precision=precision))
    return made


def rounded_linears(weights: FolderWeights, precision: Table = ()) -> set[str]:
    """Return the names of the linear layers that a quantised model rounds.

    Args:
        weights: The model.
        precision: What is held in other bits than 4.
    """
    names = quantised_parameters(weights.clean, precision) | turned_parameters(weights.clean, precision)
    return {name.removesuffix(_WEIGHT) for name in names if name.endswith(_WEIGHT)}


def rounded_stacks(weights: FolderWeights, precision: Table = ()) -> set[str]:
    """Return the names of the stacks of experts that a 4-bit model holds in 4 bits; arguments as above."""
    return {name for name in quantised_parameters(weights.clean, precision) if not name.endswith(_WEIGHT)}


def stored_variant(weights: FolderWeights, read: Read | None = None) -> Variant:
    """Return the model as it is stored, or with the weights that `read` returns inside its blocks."""
    model: Any = weights.clean
    embedding = _name_of(weights, "input")
    head = _name_of(weights, "output")
    biased = getattr(model.get_output_embeddings(), "bias", None) is not None

    def head_rows(first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        bias = weights.read(f"{head}.bias")[first:stop].float() if biased else None
        return weights.rows(f"{head}.weight", first, stop).float(), bias

    vocabulary = model.state_dict()[f"{head}.weight"].shape[0]
    return Variant(
        UNROUNDED.name,
        read or Remembered(weights.read),
        lambda tokens: weights.picked(f"{embedding}.weight", tokens),
        Head(head_rows, vocabulary),
    )


def in_form(
    variant: Variant, form: Form, rounded: Collection[str], *, precision: Table = (), name: str = ""
) -> Variant:
    """Return a variant whose linear layers are held in a form.

    Args:
        variant: The variant to quantise.
        form: The form of its linear layers.
        rounded: Names of the linear layers that are quantised.
        precision: Which of them have their weights in 8 bits instead.
        name: The result's name; empty for the form's.
    """
    return replace(variant, name=name or form.name, form_of=_choice(form, rounded, precision), by_row=form.by_row)


def sixteen_bit_bytes(weights: FolderWeights) -> int:
    """Return the bytes of a weight that is not quantised: 2 even where the files have 4."""
    return min(2, stored_bytes_of(weights))


def stored_bytes_of(weights: FolderWeights) -> int:
    """Return the bytes of a weight in the files."""
    return max(weights.files.dtype(key).itemsize for key in weights.files.tensors)


def held_bytes(weights: FolderWeights, inside: int, bits: float) -> float:
    """Return the bytes of a model when it is served.

    Args:
        weights: The model.
        inside: How many of its weights are held in the form; all others are in 16 bit.
        bits: Bits of a weight in that form; 0 if that is 16 bit too.
    """
    whole, other_bytes = sum(parameter.numel() for parameter in weights.clean.parameters()), sixteen_bit_bytes(weights)
    return (whole - inside) * other_bytes + inside * (bits / 8 or other_bytes)


class Remembered:
    """Reads parameters and remembers those of the last block, because several variants read the same ones in turn."""

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


def _choice(form: Form, rounded: Collection[str], precision: Table) -> Callable[[str], Form]:
    eight = frozenset(name for name in rounded if precision and precision_at(precision, name) == INT8)
    return lambda name: EIGHT_BIT_WEIGHTS if name in eight else form if name in rounded else UNROUNDED


def _name_of(weights: FolderWeights, which: str) -> str:
    """Return the name of the input or output embedding's module."""
    getter: Callable[[], nn.Module] = getattr(weights.clean, f"get_{which}_embeddings")
    module = getter()
    return next(str(name) for name, candidate in weights.clean.named_modules() if candidate is module)


TRAINED, ALONE = "trained", "base alone"
"""The adapter on the base that it was trained on, and that base without it."""


@dataclass(frozen=True, slots=True)
class Named:
    """A variant with a description for the report.

    Attributes:
        variant: What is measured; its name is short.
        title: A description.
        form: The form that its quantised layers have when it is served.
        has_adapter: Whether the adapter stays a file of its own.
        usable: Whether the report may recommend it.
    """

    variant: Variant
    title: str
    form: str
    has_adapter: bool = False
    usable: bool = True


class AdapterForms:
    """Makes the variants of one adapter."""

    def __init__(self, weights: FolderWeights, skeleton: Skeleton, quant: FourBit) -> None:
        """Find what the adapter changes.

        Args:
            weights: The base in 16 bit.
            skeleton: Base and adapter as structure.
            quant: The 4-bit form of the training, or the recipe's, with what it holds in other bits.
        """
        self._weights, self._skeleton, self._quant = weights, skeleton, quant
        self.form = form_of_quant(quant)
        self._rounded = rounded_linears(weights, quant.precision)
        self._units = {name: unit for unit in find_units(skeleton.adapted) for name in unit.parameters}
        self.stored: Read = Remembered(weights.read)
        self._stacks = rounded_stacks(weights, quant.precision)
        names = {*(f"{name}.weight" for name in self._rounded), *self._stacks}
        self.dequantized: Read = _through(self.stored, quant, names, turned_parameters(weights.clean))

    @property
    def touched(self) -> set[str]:
        """Names of the parameters that the adapter changes or brings."""
        return set(self._units) | set(self._skeleton.replaced)

    @property
    def rounded_weights(self) -> int:
        """How many weights are quantised in the 4-bit form."""
        shapes = self._weights.clean.state_dict()
        return sum(shapes[name].numel() for name in (*(f"{name}.weight" for name in self._rounded), *self._stacks))

    def both(self, prefix: str) -> list[str]:
        """Return the weights under a prefix that are both quantised in the 4-bit form and changed by the adapter."""
        rounded = {f"{name}.weight" for name in self._rounded}
        return [name for name in rounded & self.touched if name.startswith(prefix)]

    def all(self, *, trained_in_4_bits: bool) -> list[Named]:
        """Return every form; the trained one is first.

        Args:
            trained_in_4_bits: Whether the adapter was trained on the 4-bit base.
        """
        four, form = self.form.name, self.form
        on_four, on_16 = self.merged(self.dequantized), self.merged(self.stored)
        trained, other = (on_four, on_16) if trained_in_4_bits else (on_16, on_four)
        own, else_ = (four, "16-bit") if trained_in_4_bits else ("16-bit", four)
        into_16 = self.merged(self.stored, cast=True)
        made = [
            Named(self._variant(TRAINED, trained), f"adapter on its {own} base, as trained", own, has_adapter=True),
            Named(self._base(ALONE, trained_in_4_bits), f"the {own} base without the adapter", own, usable=False),
            Named(self._variant(f"on {else_}", other), f"adapter on a {else_} base", else_, has_adapter=True),
            Named(self._variant("merged 16-bit", into_16), "merged into the 16-bit base", "16-bit"),
            Named(self._in_form(f"merged 16-bit, {four}", into_16, form), f"that, rounded to {four} afterwards", four),
        ]
        if trained_in_4_bits:
            into_four = self.merged(self.dequantized, cast=True)
            made += [
                Named(self._variant("merged dequantized", into_four), f"merged into the base after {four}", "16-bit"),
                Named(
                    self._in_form(f"merged dequantized, {four}", into_four, form),
                    f"that, rounded to {four} again",
                    four,
                    usable=False,
                ),
            ]
        lesson = self._in_form("merged 4-bit", on_four, form)
        return [*made, Named(lesson, "merged into the 4-bit weights themselves (do not)", four, usable=False)]

    def merged(self, base: Read, *, cast: bool = False) -> Read:
        """Return a reader of the merged weights.

        Args:
            base: Reads the weights of the base that the adapter is merged into.
            cast: Whether all weights are cast to the dtype of the base's files, as a merge writes them; else fp32.
        """
        made: dict[str, dict[str, Tensor]] = {}

        def read(name: str) -> Tensor:
            value = self._changed(name, base, made)
            value = base(name) if value is None else value
            return value.to(self.stored(name).dtype) if cast and name not in self._skeleton.replaced else value

        return read

    def _changed(self, name: str, base: Read, made: dict[str, dict[str, Tensor]]) -> Tensor | None:
        if name in self._skeleton.replaced:
            return self._skeleton.replaced[name]
        unit = self._units.get(name)
        if unit is None:
            return None
        if unit.name not in made:
            made.clear()
            made[unit.name] = merge_unit(unit, _copies(base))
        return made[unit.name][name]

    def _variant(self, name: str, read: Read) -> Variant:
        variant = stored_variant(self._weights, read)
        embedding, head = (f"{_name_of(self._weights, which)}.weight" for which in ("input", "output"))
        if embedding in self.touched:
            variant = replace(variant, embed=lambda tokens: read(embedding)[torch.tensor(tokens)])
        if head in self.touched:
            variant = replace(variant, head=_whole_head(read, head, variant.head, key=name))
        return replace(variant, name=name)

    def _in_form(self, name: str, read: Read, form: Form) -> Variant:
        through = _through(read, self._quant, self._stacks, ())
        return in_form(self._variant(name, through), form, self._rounded, precision=self._quant.precision, name=name)

    def _base(self, name: str, in_4_bits: bool) -> Variant:
        if not in_4_bits:
            return replace(stored_variant(self._weights, self.stored), name=name)
        held = stored_variant(self._weights, _through(self.stored, self._quant, self._stacks, ()))
        return in_form(held, self.form, self._rounded, precision=self._quant.precision, name=name)


def _copies(read: Read) -> Read:
    """Return a reader of copies: peft merges in place, and would change remembered weights that other variants read."""

    def copied(name: str) -> Tensor:
        value = read(name)
        return value.clone() if value.dtype == torch.float32 else value  # others are cast to fp32, which copies them

    return copied


def _through(read: Read, quant: FourBit, names: Collection[str], turned: Collection[str]) -> Read:
    """Return a reader of weights after quantising and dequantising, fp32; on the card if there is one."""
    device = job_device("auto")

    def back(name: str) -> Tensor:
        if name not in names:
            return read(name)
        weight = read(name).to(device)
        # A stack's blocks of scales are neighbours as they lie, whatever its rows.
        flat = weight.reshape(-1, BLOCK) if weight.dim() == 3 else weight
        matrix = flat.t().contiguous() if name in turned else flat
        eight = quant.precision and precision_at(quant.precision, name.removesuffix(_WEIGHT)) == INT8
        layer = EightBitWeights(matrix, None) if eight else FourBits(matrix, None, quant)
        back = layer.rows(0, layer.shape[0]).cpu()
        if weight.dim() == 3:
            return back.view_as(weight)
        return back.t().contiguous() if name in turned else back

    return back


def _whole_head(read: Read, name: str, head: Head, *, key: str) -> Head:
    """Return a head that the adapter changes. It is held whole in memory, because no file has it by rows."""
    held: list[Tensor] = []

    def rows(first: int, stop: int) -> tuple[Tensor, Tensor | None]:
        if not held:
            held.append(read(name).float())
        return held[0][first:stop], head.rows(first, stop)[1]

    return Head(rows, head.vocabulary, key)
