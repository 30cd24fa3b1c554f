"""Gradient checkpoints in host memory: the inputs from which checkpointed layers are computed again leave the card.

Each layer's input `[batch, seq, hidden]` is copied to the host while the layer runs, and comes back while the layer
after it runs backward. The device then holds one input in the forward pass and two in the backward, instead of one per
layer. Nothing is rounded. Only the input is moved, not what else a layer is called with.
"""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Copies(Protocol):
    """Copies tensors between device and host. Copying is begun by one call and awaited by another."""

    def out(self, tensor: Tensor) -> Any:
        """Begin to copy a tensor to the host and return the copy."""

    def settle(self, host: Any) -> None:
        """Make later work on the device wait until the copy to the host is complete.

        After this the tensor's memory on the device may be given to others.
        """

    def back(self, host: Any) -> Any:
        """Begin to copy to the device and return the copy that is on its way."""

    def arrived(self, coming: Any) -> Tensor:
        """Return the tensor on the device; later work there waits until its copy is complete."""


class PinnedCopies:
    """Copies on a CUDA stream of their own, beside the computation.

    Host memory is page-locked: only then does a copy run while the device computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def out(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy a tensor to the host and return the copy."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host, self._copy(host, tensor)

    def settle(self, host: tuple[Tensor, torch.cuda.Event]) -> None:
        """Make later work on the device wait until the copy to the host is complete."""
        torch.cuda.current_stream(self._stream.device).wait_event(host[1])

    def back(self, host: tuple[Tensor, torch.cuda.Event]) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy to the device and return the copy that is on its way."""
        # Allocated on the computing stream, which uses it: torch's allocator then knows when it may be reused.
        tensor = torch.empty(host[0].shape, dtype=host[0].dtype, device=self._stream.device)
        return tensor, self._copy(tensor, host[0])

    def arrived(self, coming: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        """Return the tensor on the device; later work there waits until its copy is complete."""
        self.settle(coming)
        return coming[0]

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        # The copy begins only when the source is computed and the target's former user is done.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        event: torch.cuda.Event = self._stream.record_event()
        return event


def offload_checkpoints(model: nn.Module, copies: Copies) -> int:
    """Let the checkpointed layers of a model keep their inputs on the host.

    Args:
        model: A model whose gradient checkpointing is switched on with `use_reentrant=False`.
        copies: How tensors get to the host and back.

    Returns:
        How many modules keep their input there; 0 where the model's checkpointing is not transformers' own.
    """
    offload = _Offload(copies)
    count = 0
    for module in model.modules():
        run: Any = getattr(module, "_gradient_checkpointing_func", None)
        if run is not None and getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = offload.around(run)  # type: ignore[assignment]
            count += 1
    return count


class _Offload:
    """The inputs of one model's layers, in the order in which the layers run."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        # Weak: autograd's graph owns the inputs, and this must not keep the last one alive after it.
        self._last: weakref.ref[_Input] | None = None

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a checkpointing function like `run` that keeps the layer's hidden states on the host.

        They are the first floating-point tensor that `run` saves for the backward pass.
        """

        def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
            moved: list[bool] = []

            def pack(tensor: Tensor) -> Any:
                if moved or not tensor.is_floating_point():
                    return tensor
                moved.append(True)
                return self._leaving(tensor)

            # torch's checkpoint saves its arguments under the hooks that are set here. What the layer itself saves goes
            # to hooks of the checkpoint's own.
            with saved_tensors_hooks(pack, lambda kept: kept.take() if isinstance(kept, _Input) else kept):
                return run(function, *args)

        return checkpointed

    def _leaving(self, tensor: Tensor) -> "_Input":
        # The layer before has run, so its input can leave the device now.
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
