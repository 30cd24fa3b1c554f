"""A causal language model taken apart: embedding, decoder blocks that are filled one at a time, head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from studio.core.errors import BadInput
from studio.jobs.audit.forms import STORED, Form, squared_norms
from studio.jobs.base.head_form import HeadForm, head_form_of
from studio.jobs.base.weights.units import Read, put


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a causal model, by module and by name.

    Attributes:
        causal: The model; parameters are on the meta device.
        backbone: What makes hidden states of token ids.
        blocks: Its decoder blocks, in order, with their names.
        embedding: Name of the input embedding's module.
        head: Name of the output embedding's module.
        form: How the head's output becomes logits.
        returned: How many things each block was seen to return beside hidden states; None for these alone.
    """

    causal: PreTrainedModel
    backbone: nn.Module
    blocks: tuple[tuple[str, nn.Module], ...]
    embedding: str
    head: str
    form: HeadForm
    returned: dict[int, int | None] = field(default_factory=dict)


def parts_of(causal: PreTrainedModel) -> Parts:
    """Return the parts of a model.

    Raises:
        BadInput: It is not a stack of decoder blocks between an embedding and a head.
    """
    model = cast(Any, causal)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    backbone, head, embedding = model.base_model, model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): path for path, module in model.named_modules()}
    if not stacks or backbone is causal or type(head) is not nn.Linear or id(embedding) not in names:
        kind = type(causal).__name__
        raise BadInput(
            f"{kind} is not a stack of decoder blocks between an embedding and a head: it cannot be audited."
        )
    path, stack = stacks[0]
    blocks = tuple((f"{path}.{place}", block) for place, block in enumerate(stack))
    return Parts(causal, backbone, blocks, names[id(embedding)], names[id(head)], head_form_of(model.config))


@dataclass(frozen=True, slots=True)
class Rounding:
    """Squared Frobenius norms of what rounding changed in a linear layer and of its weight; how many weights it has."""

    changed: float
    whole: float
    weights: int


@contextmanager
def filled(
    name: str, block: nn.Module, read: Read, form_of: Callable[[str], Form], device: torch.device
) -> Iterator[dict[str, Rounding]]:
    """Give a block its weights; yield what rounding did to each linear layer that is not held as stored.

    Linear layers keep the stored format, or a rounded one, and are cast as they are used; all else is fp32, and so is
    GPT-2's kind of linear layer (`[in, out]`) unless it is rounded, for which it is turned.

    Args:
        name: Of the block.
        block: Its parameters are on the meta device, before and after.
        read: Gives a parameter by its name.
        form_of: Gives the form of a linear layer by its name.
        device: Where the weights go.
    """
    seen: dict[str, Rounding] = {}
    linears = {
        path: module for path, module in block.named_modules() if _is_replaced(module, form_of(f"{name}.{path}"))
    }
    others = {path: parameter for path, parameter in block.named_parameters() if path.rpartition(".")[0] not in linears}
    for path, module in linears.items():
        form = form_of(f"{name}.{path}")
        weight = read(f"{name}.{path}.weight").to(device)
        weight = weight.t().contiguous() if isinstance(module, Conv1D) else weight
        bias = None if module.bias is None else read(f"{name}.{path}.bias").to(device).float()
        layer = form.make(weight, bias)
        if form is not STORED:
            changed, whole = squared_norms(weight, layer)
            seen[f"{name}.{path}"] = Rounding(changed, whole, weight.numel())
        block.set_submodule(path, layer)
        del weight, layer
    for path in others:
        put(block, path, nn.Parameter(read(f"{name}.{path}").to(device).float(), requires_grad=False))
    try:
        yield seen
    finally:
        for path, module in linears.items():
            block.set_submodule(path, module)
        for path, parameter in others.items():
            put(block, path, parameter)


def _is_replaced(module: nn.Module, form: Form) -> bool:
    return type(module) is nn.Linear or (isinstance(module, Conv1D) and form is not STORED)


@contextmanager
def settled(parts: Parts, read: Read, rows: Tensor, device: torch.device) -> Iterator[None]:
    """Give what lies outside the blocks its weights: a small embedding, the last norm; the head is left alone.

    Args:
        parts: The model.
        read: Gives a parameter by its name.
        rows: The embedding's rows of the tokens that are used `[used, hidden]`.
        device: Where the weights go.
    """
    inside = tuple(f"{name}." for name, _ in parts.blocks)
    own = (f"{parts.embedding}.", f"{parts.head}.")
    before: dict[str, nn.Parameter] = {}
    for name, parameter in parts.causal.named_parameters(remove_duplicate=False):
        if name.startswith((*inside, f"{parts.head}.")):
            continue
        before[name] = parameter
        value = rows if name == f"{parts.embedding}.weight" else None if name.startswith(own) else read(name)
        if value is not None:
            put(parts.causal, name, nn.Parameter(value.to(device).float(), requires_grad=False))
    moved = [(owner, key, buffer) for owner, key, buffer in _buffers(parts.causal) if buffer.device != device]
    for owner, key, buffer in moved:
        owner._buffers[key] = buffer.to(device)
    embedding = cast(Any, parts.causal.get_submodule(parts.embedding))
    padding = getattr(embedding, "padding_idx", None)
    embedding.padding_idx = None  # it may lie beyond the rows that are used, and matters for gradients only
    try:
        yield
    finally:
        embedding.padding_idx = padding
        for name, parameter in before.items():
            put(parts.causal, name, parameter)
        for owner, key, buffer in moved:
            owner._buffers[key] = buffer


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                yield module, key, buffer
