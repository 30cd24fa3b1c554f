"""A causal language model taken apart: embedding, decoder blocks that get their weights one at a time, head.

The model's own code decides what its blocks are called with and what follows the last one: the backbone is run with
stand-ins in place of its blocks. Masks, position embeddings, embedding scales and the last norm are therefore those of
the model's family, and nothing here needs to know them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from studio.core.direct_weights import READ_IN_EVALUATION
from studio.core.errors import BadInput
from studio.jobs.audit.forms import UNROUNDED, Form, Layer, squared_norms
from studio.jobs.audit.scores import Head
from studio.jobs.base.head_form import HeadForm, formed, head_form_of
from studio.jobs.base.model_class import backbone_of, decoder_layers
from studio.jobs.base.weights.units import Read, put


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a causal model, by module and by name.

    Attributes:
        causal: The model; its parameters are on the meta device.
        backbone: Turns token ids into hidden states.
        blocks: Its decoder blocks, in order, with their names.
        embedding: Name of the input embedding's module.
        head: Name of the output embedding's module.
        form: How the head's output becomes logits.
        returned: How many things each block returns beside the hidden states; None where it returns only them, not in
            a tuple. Filled as blocks are tried.
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
    blocks = decoder_layers(model)
    backbone, head, embedding = backbone_of(model), model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): path for path, module in model.named_modules()}
    apart = backbone is not None and backbone is not causal
    if not blocks or not apart or type(head) is not nn.Linear or id(embedding) not in names:
        kind = type(causal).__name__
        raise BadInput(
            f"{kind} is not a stack of decoder blocks between an embedding and a head: it cannot be audited."
        )
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        # An audit holds the rows of one embedding only, for the tokens that occur.
        raise BadInput(f"{type(causal).__name__} has token embeddings for every block: it cannot be audited.")
    return Parts(
        causal, cast(nn.Module, backbone), blocks, names[id(embedding)], names[id(head)], head_form_of(model.config)
    )


@dataclass(frozen=True, slots=True)
class Rounding:
    """Squared Frobenius norms of a linear layer's rounding error (`changed`) and of its weight (`whole`)."""

    changed: float
    whole: float


@contextmanager
def filled(
    name: str, block: nn.Module, read: Read, form_of: Callable[[str], Form], device: torch.device
) -> Iterator[dict[str, Rounding]]:
    """Give a block its weights while the context lasts; yield the rounding of each linear layer that is quantised.

    Linear layers keep the stored dtype, or are quantised, and are cast when they are used. Everything else is fp32.
    GPT-2's Conv1D (`[in, out]`) is fp32 too, unless it is quantised: then it is transposed and becomes a linear layer.

    Args:
        name: The block's name.
        block: The block; its parameters are on the meta device before and after.
        read: Returns a parameter by its name.
        form_of: Returns the form of a linear layer by its name.
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
        read_past = path.rpartition(".")[2] in READ_IN_EVALUATION
        block.set_submodule(path, _dense(layer, weight.shape, bias) if read_past else layer)
        del weight, layer  # or the stored weight would stay in memory while the next one is read
    for path in others:
        put(block, path, nn.Parameter(read(f"{name}.{path}").to(device).float(), requires_grad=False))
    try:
        yield seen
    finally:
        for path, module in linears.items():
            block.set_submodule(path, module)
        for path, parameter in others.items():
            put(block, path, parameter)


def _dense(layer: Layer, shape: torch.Size, bias: Tensor | None) -> nn.Linear:
    """Return a plain fp32 layer with the weight that is used, for a model that reads it past the layer."""
    dense = nn.Linear(shape[1], shape[0], bias=bias is not None, device="meta")
    for name, value in (("weight", layer.rows(0, shape[0])), ("bias", bias)):
        if value is not None:
            put(dense, name, nn.Parameter(value, requires_grad=False))
    return dense


def _is_replaced(module: nn.Module, form: Form) -> bool:
    return type(module) is nn.Linear or (isinstance(module, Conv1D) and form is not UNROUNDED)


@contextmanager
def settled(parts: Parts, read: Read, rows: Tensor, device: torch.device) -> Iterator[None]:
    """Give everything outside the blocks its weights while the context lasts, except the head.

    The embedding gets only the rows of the tokens that are used; ids must be renumbered for it (`renumbered`).

    Args:
        parts: The model.
        read: Returns a parameter by its name.
        rows: The embedding's rows for the tokens that are used, `[used, hidden]`.
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
    embedding.padding_idx = None  # it may exceed the small embedding, and matters for gradients only
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
"""The arguments of a block besides the hidden states."""
StandIn = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any]


def noted_calls(parts: Parts, ids: Tensor) -> tuple[list[Call], Tensor]:
    """Return each block's arguments for tokens `[rows, seq]`, and the first one's input `[rows, seq, hidden]`."""
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
    """Return the final hidden states that the model makes of its last block's output, both `[rows, seq, hidden]`."""

    def give(place: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _as_the_block(parts, place, states, (args, kwargs))

    with _instead(parts, give):
        out: Tensor = cast(Any, parts.backbone)(input_ids=ids, use_cache=False).last_hidden_state
    return out


def first_of(out: Any) -> Tensor:
    """Return the hidden states from a block's output, which some blocks return in a tuple with other things."""
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def renumbered(ids: Tensor, used: Sequence[int]) -> Tensor:
    """Return token ids as indices into the sorted list of used tokens. Padding, which may not be in it, becomes any."""
    return torch.searchsorted(torch.tensor(used), ids).clamp(max=len(used) - 1)


@torch.no_grad()
def disagreement(
    parts: Parts, read: Read, head: Head, *, embedding: Tensor, ids: Tensor, device: torch.device
) -> float:
    """Return how far the walk's logits are from the model's own forward pass, relative to the largest logit.

    Both run side by side, one block at a time, so that each weight is read once. If a family does something between its
    blocks (shares state, lets hidden states skip a block), the difference shows here.

    Args:
        parts: The model.
        read: Returns a parameter by its name.
        head: The model's head.
        embedding: Its embedding's rows for the tokens that are used, `[used, hidden]`.
        ids: Indices into these rows, `[1, seq]`.
        device: Where the model runs.
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
    """A head whose weight is read in parts at each call; it returns logits `[..., vocabulary]`."""

    def __init__(self, head: Head, device: torch.device) -> None:
        super().__init__()
        self._head, self._device = head, device
        self.weight = torch.empty(0)  # fp32: Mamba casts to the format of its head's weight

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
    """Replace every block's forward by a function while the context lasts.

    The block itself stays in place, because a model may read its attributes.
    """

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
    """Return hidden states as the block would return them: alone, or first in a tuple."""
    if place not in parts.returned:
        parts.returned[place] = _returned_beside(parts.blocks[place][1], hidden, call)
    beside = parts.returned[place]
    return hidden if beside is None else (hidden, *([None] * beside))


def _returned_beside(block: nn.Module, hidden: Tensor, call: Call) -> int | None:
    """Return how many things a block returns beside the hidden states; None where it returns these alone."""
    real = list(_buffers(block))
    try:
        for owner, key, buffer in real:
            owner._buffers[key] = buffer.to("meta")
        args, kwargs = _on_meta(call)
        out = type(block).forward(block, hidden.to("meta"), *args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return None  # it cannot run without numbers; nearly all blocks return a tensor alone
    finally:
        for owner, key, buffer in real:
            owner._buffers[key] = buffer
    return len(out) - 1 if isinstance(out, tuple) else None


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_on_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    return value
