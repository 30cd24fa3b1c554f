"""Which linear maps an adapter adapts, and how many parameters it trains."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from studio.core.direct_weights import not_adapted
from studio.core.errors import BadInput
from studio.core.experts import EXPERTS
from studio.core.layer_parts import Linear
from studio.core.shape import EXPERTS_DOWN, EXPERTS_UP, Layer, ModelShape
from studio.core.text import plain
from studio.core.value_kinds import ALL_LINEAR

HEAD = "lm_head"
HEADS = frozenset((HEAD, "embed_out", "output_layer"))
EMBEDDINGS = frozenset(("embed_tokens", "embed_in", "wte", "word_embeddings"))
_FINAL_NORMS = frozenset(("norm", "final_layernorm", "final_layer_norm"))
AS_PEFT = "as peft"
"""Stands for what peft's own all-linear adapts of a mixture of experts beside its plain linear maps."""
_STACKS = {
    EXPERTS: (EXPERTS_UP, EXPERTS_DOWN),
    EXPERTS_UP: (EXPERTS_UP,),
    "experts.up_proj": (EXPERTS_UP,),  # where experts have no gate
    EXPERTS_DOWN: (EXPERTS_DOWN,),
}
ROUTERS = frozenset(("gate", "router", "shared_expert_gate", "wg"))


@lru_cache(maxsize=256)
def target_names(shape: ModelShape, targets: str | tuple[str, ...], *, as_peft: bool = False) -> frozenset[str]:
    """Return the names of the adapted linear maps inside the layers.

    `all-linear` is every linear map but the head, routers and shared experts' gates, and those whose weight the model
    reads past an adapter. A dotted path counts by its last part; `experts` and its stacks are the routed experts.

    Args:
        shape: The model.
        targets: What a recipe adapts.
        as_peft: Whether `all-linear` means what peft itself adapts: of some families also routers and routed experts.

    Raises:
        BadInput: A name is no linear map of this model, or one that an adapter has no effect on.
    """
    dead = {} if as_peft else not_adapted(shape.family)
    linears = dict.fromkeys(linear.name for _, linear in shape.all_linears())
    known = tuple(name for name in linears if name not in dead)
    names = (targets,) if isinstance(targets, str) else targets
    if as_peft and names == (ALL_LINEAR,):
        return frozenset((*known, AS_PEFT)) if shape.expert_parameters else frozenset(known)
    chosen = set[str]()
    for name in names:
        last = name.rpartition(".")[2]
        if name == ALL_LINEAR:
            chosen.update(known)
        elif shape.expert_parameters and name in _STACKS:
            chosen.update(_STACKS[name])
        elif last in dead:
            raise BadInput(f"adapter.targets names {last}: {dead[last]}. {_usable(known, shape)}")
        elif shape.expert_parameters and last in ROUTERS:
            raise BadInput(
                f"adapter.targets names {last}, which chooses or weighs experts and is not adapted here: training on "
                f"few rows may unbalance it. {_usable(known, shape)}"
            )
        elif last not in known and last != HEAD:
            raise BadInput(_unknown(last, shape, known))
        else:
            chosen.add(last)
    return frozenset(chosen)


def _unknown(name: str, shape: ModelShape, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    shown = plain(name, one_line=True, limit=60)
    hint = f"; perhaps {near[0]}" if near else ""
    return (
        f"adapter.targets names {shown!r}, which a {plain(shape.family, one_line=True, limit=40)} model does not have"
        f"{hint}. {_usable(known, shape)}"
    )


def _usable(known: Iterable[str], shape: ModelShape) -> str:
    names = (*known, EXPERTS) if shape.expert_parameters else known
    return f'Use "{ALL_LINEAR}" or some of: {", ".join(names)}'


def adapted(shape: ModelShape, names: frozenset[str]) -> list[tuple[int, Linear]]:
    """Return each adapted linear map with how many there are in the model."""
    chosen = [(count, linear) for count, linear in shape.all_linears() if linear.name in names]
    chosen.extend(
        (group.count, linear) for group in shape.groups for linear in _of_experts(group.layer, shape.hidden, names)
    )
    if HEAD in names:
        chosen.append((1, Linear(HEAD, shape.hidden, shape.vocabulary)))
    return chosen


def _of_experts(layer: Layer, hidden: int, names: frozenset[str]) -> list[Linear]:
    """Return the adapted maps among a layer's routed experts and beside them."""
    experts = layer.experts
    if experts is None:
        return []
    if AS_PEFT not in names:
        return [stack for stack in experts.stacks(hidden) if stack.name in names]
    maps = [experts.chooser] if experts.chooser else []
    if experts.adapted_by_all:
        # A fused gate and up gets twice the rank, written here as twice the copies: as many parameters.
        maps.append(Linear(AS_PEFT, hidden, 2 * experts.inner, copies=2 * experts.count))
        maps.append(Linear(AS_PEFT, experts.inner, hidden, copies=experts.count))
    return maps


def check_rank(shape: ModelShape, names: frozenset[str], rank: int) -> None:
    """Refuse a rank that is useless for every adapted map.

    Raises:
        BadInput: It is above the smaller side of every adapted map, the most that a product of two matrices needs.
    """
    widest = max((min(linear.inputs, linear.outputs) for _, linear in adapted(shape, names)), default=0)
    if rank > widest:
        raise BadInput(
            f"adapter.rank is {rank}, but no target of this model is wider than {widest}, and a rank above that adds "
            f"nothing: take {widest} or less"
        )


@dataclass(frozen=True, slots=True)
class AdaptedPart:
    """What a recipe trains of a model.

    Attributes:
        targets: Names of the adapted linear maps.
        rank: The rank of maps that no pattern matches.
        rank_pattern: Other ranks, by the end of a module's path or a regular expression for it (peft's `rank_pattern`).
        layers: Numbers of the adapted layers, empty for all.
        dora: Whether magnitudes are trained too.
        modules_to_save: Modules trained whole (peft's `modules_to_save`), by the last part of their name.
        as_peft: Whether `all-linear` means what peft itself adapts (`target_names`).
    """

    targets: str | tuple[str, ...]
    rank: int
    rank_pattern: tuple[tuple[str, int], ...] = ()
    layers: tuple[int, ...] = ()
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    as_peft: bool = False

    @property
    def trains_head(self) -> bool:
        """Whether the head is trained whole."""
        return bool(self.modules_to_save) and any(name.rpartition(".")[2] in HEADS for name in self.modules_to_save)

    @property
    def whole_names(self) -> frozenset[str]:
        """Names of the modules trained whole; every family's head counts as `lm_head`."""
        names = (name.rpartition(".")[2] for name in self.modules_to_save)
        return frozenset(HEAD if name in HEADS else name for name in names)

    @property
    def trains_embedding(self) -> bool:
        """Whether the input embedding is trained whole."""
        return bool(self.modules_to_save) and any(
            name.rpartition(".")[2] in EMBEDDINGS for name in self.modules_to_save
        )


def check_adapted(shape: ModelShape, part: AdaptedPart) -> None:
    """Refuse targets, a rank, layers or a pattern that a training on this model would refuse too.

    A pattern that is more than a module's name is not checked: the paths of the model's modules are not known here.

    Raises:
        BadInput: One of them does not suit the model; the message says which, and what the model has.
    """
    names = target_names(shape, part.targets, as_peft=part.as_peft)
    check_rank(shape, names, part.rank)
    if part.layers and part.layers[-1] >= shape.layers:
        raise BadInput(
            f"adapter.layers names layer {part.layers[-1]}; this model has {shape.layers}, numbered from 0: use "
            f"numbers from 0 to {shape.layers - 1}, or leave adapter.layers empty for all"
        )
    for pattern, _ in part.rank_pattern:
        if pattern.isidentifier() and pattern not in names:
            raise BadInput(
                f"adapter.rank_pattern names {plain(pattern, one_line=True, limit=60)!r}, which is no adapted module "
                f"of this model. Use some of: {', '.join(sorted(names - {AS_PEFT}))}"
            )


def trained_tensors(shape: ModelShape, part: AdaptedPart, *, without: Collection[str] = ()) -> list[tuple[int, int]]:
    """Return the trained tensors as (how many, elements of each): A and B of every adapted map, and its magnitudes.

    Args:
        shape: The model.
        part: What is trained of it.
        without: Names of maps that are left out.

    Raises:
        BadInput: A target is no linear map of this model.
    """
    # peft adapts nothing that it trains whole.
    names = target_names(shape, part.targets, as_peft=part.as_peft) - part.whole_names - frozenset(without)
    if part.rank_pattern or part.layers:
        maps = list(_layer_by_layer(shape, names, part))
    else:
        maps = [(count, linear, part.rank) for count, linear in adapted(shape, names)]
    tensors = []
    for count, linear, rank in maps:
        if linear.name in (EXPERTS_UP, EXPERTS_DOWN):
            # All experts of a layer share one A and one B (peft's ParamWrapper).
            tensors += [(count, rank * side * linear.copies) for side in (linear.inputs, linear.outputs)]
            continue
        number = count * linear.copies
        tensors += [(number, rank * linear.inputs), (number, rank * linear.outputs)]
        if part.dora:
            tensors.append((number, linear.outputs))
    return tensors


def whole_tensors(shape: ModelShape, part: AdaptedPart) -> list[tuple[int, int]]:
    """Return the tensors of modules that are trained whole, as (how many, elements of each); biases count with them.

    Raises:
        BadInput: A name is neither head, embedding, norm nor linear map of this model.
    """
    tensors: list[tuple[int, int]] = []
    for module in part.modules_to_save:
        name = module.rpartition(".")[2]
        linears = [(count * linear.copies, linear) for count, linear in shape.all_linears() if linear.name == name]
        if name in HEADS or name in EMBEDDINGS:
            tensors.append((1, shape.embedding_parameters))
        elif name.endswith("norm"):
            tensors.append((1 if name in _FINAL_NORMS else shape.layers, shape.hidden))
        elif linears:
            tensors += [(count, linear.inputs * linear.outputs) for count, linear in linears]
        else:
            known = ", ".join(dict.fromkeys(linear.name for _, linear in shape.all_linears()))
            shown = plain(module, one_line=True, limit=60)
            raise BadInput(
                f"adapter.modules_to_save names {shown!r}, which this model does not have. "
                f"Wanted lm_head, embed_tokens, a norm, or some of: {known}"
            )
    return tensors


def _layer_by_layer(shape: ModelShape, names: frozenset[str], part: AdaptedPart) -> Iterator[tuple[int, Linear, int]]:
    """Yield every adapted map of every layer with its own rank."""
    chosen = [[linear for linear in group.layer.linears if linear.name in names] for group in shape.groups]
    for maps, group in zip(chosen, shape.groups, strict=True):
        maps.extend(_of_experts(group.layer, shape.hidden, names))
    for index, kind in enumerate(shape.kinds):
        if not part.layers or index in part.layers:
            for linear in chosen[kind]:
                yield 1, linear, _rank_of(linear_paths(shape.groups[kind].layer, linear, index), part)
    for linear in shape.outer if not part.layers else ():
        if linear.name in names:
            yield 1, linear, _rank_of((linear.name,), part)
    if HEAD in names and not part.layers:
        yield 1, Linear(HEAD, shape.hidden, shape.vocabulary), _rank_of((HEAD,), part)


def linear_paths(layer: Layer, linear: Linear, index: int) -> tuple[str, ...]:
    """Return the paths that a linear map of a layer may have as a module, as most families call them."""
    mixes = layer.mixer is not None and linear in layer.mixer.linears
    blocks = (layer.mixer.place,) if mixes and layer.mixer else (ATTENTION, MLP)
    return tuple(f"model.layers.{index}.{block}.{linear.name}" for block in blocks)


def _rank_of(paths: tuple[str, ...], part: AdaptedPart) -> int:
    for pattern, rank in part.rank_pattern:
        if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            return rank
    return part.rank


ATTENTION, MLP = "self_attn", "mlp"
"""Between layer and map in the path of a module, as most families call them."""


def trainable_parameters(shape: ModelShape, part: AdaptedPart) -> int:
    """Return how many parameters a recipe trains: `rank * (in + out)` per map; with DoRA a magnitude per output.

    Modules trained whole count with all they have.

    Raises:
        BadInput: A target is no linear map of this model.
    """
    return sum(count * elements for count, elements in (*trained_tensors(shape, part), *whole_tensors(shape, part)))
