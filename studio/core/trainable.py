"""Which linear maps an adapter sits on and how many parameters it trains."""

import difflib
from collections.abc import Iterable

from studio.core.errors import BadInput
from studio.core.recipe import ALL_LINEAR
from studio.core.shape import Layer, Linear, ModelShape
from studio.core.text import plain

HEAD = "lm_head"
EXPERTS = "experts"
"""Stands for what peft's all-linear adapts of a mixture of experts beside its plain linear maps."""


def target_names(shape: ModelShape, targets: str | tuple[str, ...]) -> frozenset[str]:
    """Return the names of the adapted linear maps inside the layers.

    `all-linear` is every linear map but the head (peft's own reading). A dotted path counts by its last part.

    Raises:
        BadInput: A name is no linear map of this model.
    """
    known = tuple(dict.fromkeys(linear.name for _, linear in shape.all_linears()))
    if targets in (ALL_LINEAR, (ALL_LINEAR,)):
        return frozenset((*known, EXPERTS)) if shape.expert_parameters else frozenset(known)
    names = (targets,) if isinstance(targets, str) else targets
    chosen = {name.rpartition(".")[2] for name in names}
    for name in sorted(chosen - set(known) - {HEAD}):
        raise BadInput(_unknown(name, shape, known))
    return frozenset(chosen)


def _unknown(name: str, shape: ModelShape, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    shown = plain(name, one_line=True, limit=60)
    hint = f"; perhaps {near[0]}" if near else ""
    known_here = ", ".join(known)
    return (
        f"adapter.targets names {shown!r}, which a {plain(shape.family, one_line=True, limit=40)} model does not have"
        f"{hint}. "
        f'Use "all-linear" or some of: {known_here}'
    )


def adapted(shape: ModelShape, names: frozenset[str]) -> list[tuple[int, Linear]]:
    """Return each adapted linear map with how many there are in the model."""
    chosen = [(count, linear) for count, linear in shape.all_linears() if linear.name in names]
    if EXPERTS in names:
        chosen.extend(
            (group.count, linear) for group in shape.groups for linear in _of_experts(group.layer, shape.hidden)
        )
    if HEAD in names:
        chosen.append((1, Linear(HEAD, shape.hidden, shape.vocabulary)))
    return chosen


def _of_experts(layer: Layer, hidden: int) -> list[Linear]:
    """Return the maps that peft 0.21 adapts among a layer's experts; a fused gate and up gets twice the rank."""
    experts = layer.experts
    if experts is None:
        return []
    maps = [experts.chooser] if experts.chooser else []
    if experts.adapted_by_all:
        maps.append(Linear(EXPERTS, hidden, 2 * experts.inner, copies=2 * experts.count))
        maps.append(Linear(EXPERTS, experts.inner, hidden, copies=experts.count))
    return maps


def check_rank(shape: ModelShape, names: frozenset[str], rank: int) -> None:
    """Refuse a rank that no adapted map can have.

    Raises:
        BadInput: The rank is above the smaller side of every adapted map.
    """
    widest = max((min(linear.inputs, linear.outputs) for _, linear in adapted(shape, names)), default=0)
    if rank > widest:
        raise BadInput(
            f"adapter.rank is {rank}, but no target of this model is wider than {widest}, and a rank above that adds "
            f"nothing: take {widest} or less"
        )


def trainable_parameters(shape: ModelShape, names: frozenset[str], rank: int, *, dora: bool = False) -> int:
    """Return how many parameters the adapter trains: `rank * (in + out)` per map; with DoRA a magnitude per output."""
    return sum(
        count * linear.copies * (rank * (linear.inputs + linear.outputs) + (linear.outputs if dora else 0))
        for count, linear in adapted(shape, names)
    )
