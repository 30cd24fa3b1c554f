"""The model's own code around its blocks: what it calls them with, and what it does behind the last one.

The backbone is run with stand-ins for its blocks. So masks, position embeddings, embedding scales and the last norm are
the family's own, whatever they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from studio.jobs.audit.blocks import Parts, filled, settled
from studio.jobs.audit.forms import STORED
from studio.jobs.audit.scores import Head, formed
from studio.jobs.base.weights.units import Read

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
            with filled(name, block, read, lambda linear: STORED, device):
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
