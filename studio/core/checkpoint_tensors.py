"""What the names and shapes of a checkpoint's tensors say: which are the language model's, and which nobody trains on.

Knows no files: `studio.probe.shape` reads headers. Names are those of the hub, and so differ from what a model is built
with (experts are single tensors on disk and stacks in memory).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from studio.core.shape import ModelShape
from studio.core.trainable import EMBEDDINGS, HEADS

Tensors = Mapping[str, tuple[int, ...]]
_SMALL_DIFFERENCE = 0.001

_IN_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?)(?:layers|h|blocks|block)\.(?P<index>\d{1,9})\.(?P<rest>.+)")
_NEXT_TOKENS = ("mtp", "nextn")
"""How modules begin that predict more than the next token: transformers leaves them unread."""
_NO_PARAMETERS = (".inv_freq", ".attn.bias", ".e_score_correction_bias")
"""Buffers that older checkpoints hold among their parameters, and biases of routers that are no parameters either."""


@dataclass(frozen=True, slots=True)
class CheckpointTensors:
    """The tensors of a checkpoint by what they belong to.

    Attributes:
        layers: Those of each decoder layer, by their names inside it.
        outside: Those of the language model outside its layers, by their whole names: embedding, head, final norm.
        towers: Parameters of towers for images or sound, and of what stands between them and the language model.
        unread: Parameters that no class of transformers loads: layers that predict more than the next token.
        decoder: How the names of its layers begin, such as `model.`.
    """

    layers: Mapping[int, Tensors]
    outside: Tensors
    towers: int = 0
    unread: int = 0
    decoder: str = ""

    def speaks(self, name: str) -> bool:
        """Return whether a tensor is the language model's, by its whole name."""
        match = _IN_LAYER.fullmatch(name)
        if match is None or match["stack"] != self.decoder:
            return name in self.outside
        return int(match["index"]) in self.layers

    @property
    def head(self) -> str:
        """Name of the head's weight; empty without one, where it is the embedding."""
        return next((name for name in self.outside if _module(name) in HEADS and name.endswith("weight")), "")

    @property
    def embedding(self) -> tuple[int, ...]:
        """Shape of the input embedding, `[vocabulary, hidden]`; empty where its name is not known."""
        return next((shape for name, shape in self.outside.items() if _module(name) in EMBEDDINGS), ())


def _module(name: str) -> str:
    """Return the last part of a tensor's module."""
    return name.rpartition(".")[0].rpartition(".")[2]


def parameters_of(tensors: Tensors) -> int:
    """Return the parameters of tensors, buffers left out."""
    return sum(math.prod(shape) for name, shape in tensors.items() if not name.endswith(_NO_PARAMETERS))


class _Stacks:
    """Every tensor by the stack of layers that it lies in."""

    def __init__(self, tensors: Tensors) -> None:
        self.found: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
        self.beside: dict[str, tuple[int, ...]] = {}
        for name, shape in tensors.items():
            match = _IN_LAYER.fullmatch(name)
            if match is None:
                self.beside[name] = shape
            else:
                layers = self.found.setdefault(match["stack"], {})
                layers.setdefault(int(match["index"]), {})[match["rest"]] = shape

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Parameters of each stack."""
        return {stack: sum(map(parameters_of, layers.values())) for stack, layers in self.found.items()}

    def largest(self, layers: int) -> str:
        """Return the largest stack that has at least so many layers; the largest of all where none has."""
        enough = [stack for stack, found in self.found.items() if len(found) >= layers]
        return max(enough or self.found, key=self.sizes.__getitem__)


def checkpoint_tensors(tensors: Tensors, layers: int, *, multimodal: bool) -> CheckpointTensors:
    """Return the tensors of a checkpoint by what they belong to; where none lies in a layer all are outside.

    Tensors without an element are left out: they say nothing of a layer.

    Args:
        tensors: Shapes by name.
        layers: Layers of the language model.
        multimodal: Whether its config holds a language model among others.
    """
    tensors = {name: shape for name, shape in tensors.items() if 0 not in shape}
    stacks = _Stacks(tensors)
    if not stacks.found:
        return CheckpointTensors({}, tensors)
    decoder = stacks.largest(layers)
    found = stacks.found[decoder]
    own = {index: found[index] for index in sorted(found) if index < layers}
    unread = sum(parameters_of(found[index]) for index in found if index >= layers)
    towers = 0
    for stack, size in stacks.sizes.items():
        if stack == decoder:
            continue
        if stack.startswith(_NEXT_TOKENS):
            unread += size
        else:
            towers += size
    # A tower's first module names all that belongs to it, such as its patch embedding.
    others = {stack.removeprefix(decoder).partition(".")[0] for stack in stacks.found if stack != decoder}
    outside = {}
    for name, shape in stacks.beside.items():
        inside = name.startswith(decoder) and name.removeprefix(decoder).partition(".")[0] not in others
        if name.startswith(_NEXT_TOKENS):
            unread += parameters_of({name: shape})
        elif _module(name) in HEADS or (inside if multimodal else name.partition(".")[0] not in others):
            outside[name] = shape
        else:
            towers += parameters_of({name: shape})
    return CheckpointTensors(own, outside, towers, unread, decoder)


def settled(shape: ModelShape, found: CheckpointTensors) -> ModelShape:
    """Return the shape with as many parameters as there are on disk, and a doubt where the config describes others."""
    if found.embedding and not found.head:
        shape = replace(shape, tied=True)
    texts = (*found.layers.values(), {k: v for k, v in found.outside.items() if not (shape.tied and k == found.head)})
    counted = sum(map(parameters_of, texts))
    difference = counted - shape.parameters
    extra = max(0, shape.other_parameters + difference)
    if abs(difference) <= _SMALL_DIFFERENCE * shape.parameters:
        return replace(shape, other_parameters=extra)
    if shape.doubts:
        return replace(shape, other_parameters=extra)
    doubt = f"the config describes {shape.parameters:,} parameters, its weights are {counted:,}"
    return replace(shape, other_parameters=shape.other_parameters + max(0, difference), doubts=(*shape.doubts, doubt))
