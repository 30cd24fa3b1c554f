"""A causal language model taken apart: embedding, decoder blocks that are filled one at a time, head.

What the model calls its blocks with, and what it does behind the last one, is its own code: the backbone is run with
stand-ins for its blocks. So masks, position embeddings, embedding scales and the last norm are the family's own,
whatever they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from studio.core.errors import BadInput
from studio.jobs.audit.forms import UNROUNDED, Form, squared_norms
from studio.jobs.audit.scores import Head, formed
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
    """Squared Frobenius norms of what rounding changed in a linear layer, and of its weight."""

    changed: float
    whole: float


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
        if form is not UNROUNDED:
            seen[f"{name}.{path}"] = Rounding(*squared_norms(weight, layer))
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
    return type(module) is nn.Linear or (isinstance(module, Conv1D) and form is not UNROUNDED)


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


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides the hidden states."""
StandIn = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any]


def noted_calls(parts: Parts, ids: Tensor) -> tuple[list[Call], Tensor]:
    """Return what every block is called with for tokens `[rows, seq]`, and the first block's hidden states."""
    calls: list[Call] = []
    begun: list[Tensor] = []

    def note(place: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not begun:
            begun.append(hidden)
        calls.append((args, dict(kwargs)))
        return _as_the_block(parts, place, hidden, calls[-1])

    with _instead(parts, note):
        cast(Any, parts.backbone)(input_ids=ids, use_cache=False)
    return calls, begun[0]


def behind_the_blocks(parts: Parts, ids: Tensor, states: Tensor) -> Tensor:
    """Return what the model makes of the hidden states `[rows, seq, hidden]` behind its last block."""

    def give(place: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _as_the_block(parts, place, states, (args, kwargs))

    with _instead(parts, give):
        out: Tensor = cast(Any, parts.backbone)(input_ids=ids, use_cache=False).last_hidden_state
    return out


def first_of(out: Any) -> Tensor:
    """Return the hidden states of what a block returned: some return them beside other things."""
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def renumbered(ids: Tensor, used: Sequence[int]) -> Tensor:
    """Return token ids as places in the sorted list of those that are used; padding becomes any of them."""
    return torch.searchsorted(torch.tensor(used), ids).clamp(max=len(used) - 1)


@torch.no_grad()
def disagreement(
    parts: Parts, read: Read, head: Head, *, embedding: Tensor, ids: Tensor, device: torch.device
) -> float:
    """Return how far the walk's logits are from the model's own forward pass, relative to the largest logit.

    Both see the same weights, a block at a time, so the model is read once. What a family does between its blocks
    (state that is shared, hidden states that skip) would show here.

    Args:
        parts: The model.
        read: Gives a parameter by its name.
        head: Of the model.
        embedding: Rows `[used, hidden]` for the tokens that are used.
        ids: Places in these rows, `[1, seq]`.
        device: Where it runs.
    """
    ids = ids.to(device)
    with settled(parts, read, embedding, device):
        calls, walked = noted_calls(parts, ids)

        def both(place: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal walked
            name, block = parts.blocks[place]
            own = type(block).forward
            with filled(name, block, read, lambda linear: UNROUNDED, device):
                walked = first_of(own(block, walked, *calls[place][0], **calls[place][1]))
                return own(block, hidden, *args, **kwargs)

        before = parts.causal.get_submodule(parts.head)
        parts.causal.set_submodule(parts.head, _WholeHead(head, device))
        try:
            with _instead(parts, both):
                meant: Tensor = cast(Any, parts.causal)(input_ids=ids, use_cache=False).logits.float()
            states = behind_the_blocks(parts, ids, walked)
            found = formed(parts.causal.get_submodule(parts.head)(states), parts.form)
        finally:
            parts.causal.set_submodule(parts.head, before)
    return float((found - meant).abs().max() / meant.abs().max().clamp(min=1e-30))


class _WholeHead(nn.Module):
    """A head that is read block by block at each call."""

    def __init__(self, head: Head, device: torch.device) -> None:
        super().__init__()
        self._head, self._device = head, device

    def forward(self, x: Tensor) -> Tensor:
        step = max(1, 2**23 // x.shape[-1])
        parts = []
        for first in range(0, self._head.vocabulary, step):
            weight, bias = self._head.rows(first, min(first + step, self._head.vocabulary))
            own = None if bias is None else bias.to(self._device)
            parts.append(nn.functional.linear(x.float(), weight.to(self._device), own))
        return torch.cat(parts, dim=-1)


@contextmanager
def _instead(parts: Parts, forward: StandIn) -> Iterator[None]:
    """Let a function stand for every block's own forward; the block stays what it is, with all its attributes."""

    def taking(place: int) -> Callable[..., Any]:
        def take(*args: Any, **kwargs: Any) -> Any:
            if args:
                return forward(place, args[0], args[1:], kwargs)
            return forward(place, kwargs.pop("hidden_states"), (), kwargs)

        return take

    for place, (_, block) in enumerate(parts.blocks):
        cast(Any, block).forward = taking(place)
    try:
        yield
    finally:
        for _, block in parts.blocks:
            del cast(Any, block).forward


def _as_the_block(parts: Parts, place: int, hidden: Tensor, call: Call) -> Any:
    """Return hidden states in the form in which the block returns them: alone, or first of several things."""
    if place not in parts.returned:
        parts.returned[place] = _returned_beside(parts.blocks[place][1], hidden, call)
    beside = parts.returned[place]
    return hidden if beside is None else (hidden, *([None] * beside))


def _returned_beside(block: nn.Module, hidden: Tensor, call: Call) -> int | None:
    """Return how many things a block returns beside the hidden states; None where it returns these alone."""
    try:
        args, kwargs = _on_meta(call)
        out = type(block).forward(block, hidden.to("meta"), *args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return None  # what it does depends on numbers: it is taken to return a tensor, as nearly all do
    return len(out) - 1 if isinstance(out, tuple) else None


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_on_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return value
