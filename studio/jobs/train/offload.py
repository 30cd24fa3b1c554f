"""Checkpoints off the card: what a checkpointed layer is computed again from waits in host memory.

Each layer's input `[batch, seq, hidden]` is copied out while the layer runs, and comes back while the layer after it
runs backward. On the device are then one input in the forward and two in the backward, instead of one per layer. The
bytes are the same bytes: nothing is rounded. Only the input is moved, not what else a layer is called with.
"""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Copies(Protocol):
    """Moves tensors between device and host."""

    def out(self, tensor: Tensor) -> Any:
        """Begin to copy a tensor to the host and return the copy."""

    def settle(self, host: Any) -> None:
        """Let nothing overwrite the tensor on the device before its copy to the host is made."""

    def back(self, host: Any) -> Any:
        """Begin to copy to the device and return what is arriving there."""

    def arrived(self, coming: Any) -> Tensor:
        """Return the tensor on the device; what reads it waits for its copy."""


class PinnedCopies:
    """Copies through page-locked host memory on a CUDA stream of their own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def out(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy a tensor to the host and return the copy."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host, self._copy(host, tensor)

    def settle(self, host: tuple[Tensor, torch.cuda.Event]) -> None:
        """Let nothing overwrite the tensor on the device before its copy to the host is made."""
        torch.cuda.current_stream(self._stream.device).wait_event(host[1])

    def back(self, host: tuple[Tensor, torch.cuda.Event]) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy to the device and return what is arriving there."""
        # Made on the computing stream: its allocator then knows when the memory is free again.
        tensor = torch.empty(host[0].shape, dtype=host[0].dtype, device=self._stream.device)
        return tensor, self._copy(tensor, host[0])

    def arrived(self, coming: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """Return the tensor on the device; what reads it waits for its copy."""
        self.settle(coming)
        return coming[0]

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        event: torch.cuda.Event = self._stream.record_event()
        return event


def offload_checkpoints(model: nn.Module, copies: Copies) -> int:
    """Let the checkpointed layers of a model keep their inputs on the host.

    Args:
        model: Its gradient checkpointing is switched on, without reentrance.
        copies: How tensors get to the host and back.

    Returns:
        How many modules do so; 0 where the model's checkpointing is not transformers' own.
    """
    offload = _Offload(copies)
    count = 0
    for module in model.modules():
        run: Any = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None:
            module._gradient_checkpointing_func = offload.around(run)  # type: ignore[assignment]
            count += 1
    return count


class _Offload:
    """The inputs of one model's layers, in the order in which the layers run."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._last: weakref.ref[_Input] | None = None

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a checkpointing function that moves the first floating tensor which `run` keeps: the hidden states."""

        def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
            moved: list[bool] = []

            def pack(tensor: Tensor) -> Any:
                if moved or not tensor.is_floating_point():
                    return tensor
                moved.append(True)
                return self._leaving(tensor)

            # torch's checkpoint saves its arguments under the hooks around it, and what its function saves under its
            # own.
            with saved_tensors_hooks(pack, lambda kept: kept.take() if isinstance(kept, _Input) else kept):
                return run(function, *args)

        return checkpointed

    def _leaving(self, tensor: Tensor) -> "_Input":
        before = self._last() if self._last else None
        if before is not None:
            before.leave()
        kept = _Input(tensor.detach(), self._copies, before)
        self._last = weakref.ref(kept)
        return kept


class _Input:
    """One layer's input: on the device until the next layer begins, then on the host, and back when it is needed."""

    __slots__ = ("__weakref__", "_before", "_coming", "_copies", "_host", "_tensor")

    def __init__(self, tensor: Tensor, copies: Copies, before: "_Input | None") -> None:
        self._tensor: Tensor | None = tensor
        self._copies = copies
        self._host = copies.out(tensor)
        self._coming: Any = None
        self._before = weakref.ref(before) if before is not None else None

    def leave(self) -> None:
        """Give up the tensor on the device."""
        if self._tensor is not None:
            self._copies.settle(self._host)
            self._tensor = None

    def fetch(self) -> None:
        """Begin to bring the tensor back."""
        if self._tensor is None and self._coming is None:
            self._coming = self._copies.back(self._host)

    def take(self) -> Tensor:
        """Return the tensor on the device and begin to bring back the one before, which is needed next."""
        self.fetch()
        tensor = self._tensor if self._tensor is not None else self._copies.arrived(self._coming)
        self._tensor = self._coming = None
        before = self._before() if self._before else None
        if before is not None:
            before.fetch()
        return tensor
