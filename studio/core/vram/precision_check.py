"""Whether a model has what `model.precision` names, and whether it can be held so: asked before anything is loaded."""

from collections.abc import Iterator
from functools import lru_cache

from studio.core.direct_weights import kept_16bit
from studio.core.errors import BadInput
from studio.core.layer_parts import Linear
from studio.core.layer_precision import (
    INT8,
    NO_INT8_EXPERTS,
    SIXTEEN_BIT,
    Part,
    Table,
    contradicted,
    part_of,
    precision_of,
)
from studio.core.shape import ModelShape
from studio.core.text import plain
from studio.core.trainable import ATTENTION, EMBEDDINGS, HEADS, MLP, ROUTERS
from studio.core.vram.frozen import paths_of, places, stacks_of
from studio.core.vram.setup import Setup

TOWERS = frozenset(("visual", "vision_tower", "multi_modal_projector", "merger", "modality_projection", "audio_tower"))
"""What configurations of other tools name of the towers for images and sound, which are never quantised."""


def check_precision(shape: ModelShape, setup: Setup) -> None:
    """Refuse a precision that a training of this model would refuse, too.

    A name of several parts that fits nothing is left to the training: all paths of the model are not known here.

    Args:
        shape: The model.
        setup: How the recipe holds it, before `as_it_lies`.

    Raises:
        BadInput: A name means no linear layer of the model, or one that cannot be held so.
    """
    if not (setup.quantised and setup.precision):
        return
    _check_precision(shape, setup.precision)
    base = shape.quantised
    if base is not None and base.in_four_bits:
        paths = (
            ".".join((f"layers.{number}", *paths_of(shape.groups[kind].layer, linear)[0]))
            for number, kind in enumerate(shape.kinds)
            for linear in shape.groups[kind].layer.linears
        )
        if why := contradicted(setup.precision, base.skipped, paths):
            raise BadInput(why)


@lru_cache(maxsize=64)
def _check_precision(shape: ModelShape, table: Table) -> None:
    kept, last = kept_16bit(shape.family), shape.layers - 1
    for name, word in table:
        part = part_of(name)
        meant = list(_meant(shape, part)) if part else []
        shown = f"model.precision names {plain(name, one_line=True, limit=60)!r}"
        if not meant and part and part.layers and part.layers.start > last:
            raise BadInput(f"{shown}; this model has {shape.layers} layers, numbered from 0 to {last}")
        if not meant and part and len(part.inside) == 1 and not (word == SIXTEEN_BIT and _outside(part.inside[0])):
            if _outside(part.inside[0]):
                raise BadInput(
                    f"{shown}, which always stays in 16 bit: only linear layers inside the model are rounded"
                )
            known = ", ".join(dict.fromkeys(linear.name for _, linear in shape.all_linears()))
            raise BadInput(
                f"{shown}, which a {plain(shape.family, one_line=True, limit=40)} model does not have. Use layers.N, "
                f"{ATTENTION}, {MLP}, or some of: {known}"
            )
        if word != SIXTEEN_BIT and meant and all(linear.name in kept for linear in meant):
            raise BadInput(f"{shown}, which stays in 16 bit: this model's code reads its weight as plain numbers")
    if any(word == INT8 for _, word in table):
        for number, kind in enumerate(shape.kinds):
            for stack in stacks_of(shape, shape.groups[kind].layer):
                if precision_of(table, number, *places(MLP, stack.name)) == INT8:
                    raise BadInput(f"model.precision holds routed experts in int8. {NO_INT8_EXPERTS}")


def _meant(shape: ModelShape, part: Part) -> Iterator[Linear]:
    """Yield the linear maps and stacks that a name means: of each kind of layer those of the first one."""
    for kind, group in enumerate(shape.groups):
        numbers = (number for number, each in enumerate(shape.kinds) if each == kind)
        number = next((number for number in numbers if part.layers is None or number in part.layers), None)
        if number is not None:
            for linear in (*group.layer.linears, *stacks_of(shape, group.layer)):
                if any(part.fits(number, path) for path in paths_of(group.layer, linear)):
                    yield linear
    yield from (linear for linear in shape.outer if part.fits(None, (linear.name,)))


def _outside(name: str) -> bool:
    """Whether a module of this name is never rounded: embedding, head, norms, routers, towers for images and sound."""
    return name in (HEADS | EMBEDDINGS | ROUTERS | TOWERS) or name.endswith("norm")
