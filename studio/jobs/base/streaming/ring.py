"""The order of copies and computation: a few buffers on the card through which the layers' weights pass.

Two queues work side by side: one computes, one copies. Two kinds of wait keep them in order. A layer is computed only
after its copy has ended, and a buffer is overwritten only after the layer in it was computed. Nothing here knows what a
layer is: it has a number, a source in main memory, and after `take` a buffer that holds it until `give_back`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from studio.jobs.base.device import wait_for

Way = Literal["forward", "backward", "alone"]
"""Where a pass goes: forward with a backward pass to follow, backward, or forward alone (evaluation, answers)."""


class Queues(Protocol):
    """A queue of computation and a queue of copies. A mark stands for what one of them was given before it."""

    def copy(self, buffer: Any, source: Any) -> None:
        """Give the copying queue a copy of a source into a buffer."""

    def mark_copied(self) -> Any:
        """Return a mark in the copying queue."""

    def mark_computed(self) -> Any:
        """Return a mark in the computing queue."""

    def copying_waits(self, mark: Any) -> None:
        """Let the copies that are given from now on wait for a mark."""

    def computing_waits(self, mark: Any) -> None:
        """Let the computation that is given from now on wait for a mark."""


class CardQueues:
    """The stream that computes on a card, and one beside it that copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, buffer: Tensor, source: Tensor) -> None:
        """Copy from main memory; only page-locked memory is copied while the card computes."""
        with torch.cuda.stream(self._copying):
            buffer[: source.numel()].copy_(source, non_blocking=True)

    def mark_copied(self) -> torch.cuda.Event:
        """Return an event of the copying stream."""
        event: torch.cuda.Event = self._copying.record_event()
        return event

    def mark_computed(self) -> torch.cuda.Event:
        """Return an event of the computing stream."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def copying_waits(self, mark: torch.cuda.Event) -> None:
        """Let the copying stream wait."""
        self._copying.wait_event(mark)

    def computing_waits(self, mark: torch.cuda.Event) -> None:
        """Let the computing stream wait."""
        torch.cuda.current_stream(self._device).wait_event(mark)


class HostQueues:
    """Both queues of a processor, which does everything at once: a copy has ended when it was given."""

    def copy(self, buffer: Tensor, source: Tensor) -> None:
        """Copy."""
        buffer[: source.numel()].copy_(source)

    def mark_copied(self) -> bool:
        """Return a mark; there is nothing to wait for."""
        return True

    def mark_computed(self) -> bool:
        """Return a mark; there is nothing to wait for."""
        return True

    def copying_waits(self, mark: Any) -> None:
        """Wait for nothing."""

    def computing_waits(self, mark: Any) -> None:
        """Wait for nothing."""


@dataclass(slots=True, eq=False)
class _Slot:
    """A buffer with what is known of it; a mark is there only until its queue was made to wait for it.

    Attributes:
        buffer: The memory.
        layer: The layer whose weights it holds or will hold; None at first.
        copied: Marks the end of the copy into it.
        computed: Marks the end of the last computation with it.
    """

    buffer: Any
    layer: int | None = None
    copied: Any = None
    computed: Any = None


class Lender(Protocol):
    """Where the weights of layers are had from, one layer at a time."""

    def take(self, layer: int, way: Way) -> Any:
        """Return a buffer with a layer's weights for the computation that is given next, until `give_back`."""

    def give_back(self, way: Way) -> None:
        """End the use of the layer that was taken last, if there is one."""

    def buffer_of(self, layer: int) -> Any:
        """Return the buffer with the layer that was taken."""


class Ring:
    """Buffers through which the layers of a model pass, in the order in which they are wanted.

    After the last layer of a forward pass the backward pass begins with the layers that are still there, and after it
    the next forward pass does so.
    """

    def __init__(self, sources: Sequence[Any], new_buffer: Callable[[], Any], count: int, queues: Queues) -> None:
        """Begin with empty buffers.

        Args:
            sources: What is copied for each layer.
            new_buffer: Makes a buffer large enough for any layer. Work that was given to the computing queue before may
                still use its memory.
            count: How many buffers; at least two, or one for a single layer.
            queues: Where copies and computation go.
        """
        self._sources, self._queues = sources, queues
        self._new_buffer, self._count = new_buffer, count
        self._used: _Slot | None = None
        self._slots: list[_Slot] = []
        self.begin()

    @property
    def buffers(self) -> tuple[Any, ...]:
        """All buffers."""
        return tuple(slot.buffer for slot in self._slots)

    def take(self, layer: int, way: Way) -> Any:
        """Return the buffer with a layer's weights for the computation that is given next; begin to copy what follows.

        It is the layer's until `give_back`, or until another layer is taken.
        """
        self._end_use()
        slot = self._holding(layer)
        if slot is None:  # the first layer of all, or another order than was foreseen
            slot = self._slots[0]
            self._copy(slot, layer)
        if slot.copied is not None:
            self._queues.computing_waits(slot.copied)
            slot.copied = None
        self._used = slot
        self._look_ahead(chain([layer], self._after(layer, way)))
        return slot.buffer

    def give_back(self, way: Way) -> None:
        """End the use of the layer that was taken last, if there is one; begin to copy what follows it."""
        slot = self._end_use()
        if slot is not None and slot.layer is not None:
            self._look_ahead(self._after(slot.layer, way))

    def buffer_of(self, layer: int) -> Any:
        """Return the buffer with the layer that was taken.

        Raises:
            LookupError: That layer is not taken.
        """
        if self._used is None or self._used.layer != layer:
            raise _untaken(layer)
        return self._used.buffer

    def begin(self) -> None:
        """Make the buffers, empty."""
        self._slots = [_Slot(self._new_buffer()) for _ in range(self._count)]
        # The memory of a new buffer may have belonged to something that is still being computed.
        self._queues.copying_waits(self._queues.mark_computed())

    def end(self) -> None:
        """Give up the buffers; later computation, which may get their memory, waits for the copies under way."""
        self._queues.computing_waits(self._queues.mark_copied())
        self._used, self._slots = None, []

    def _end_use(self) -> _Slot | None:
        slot, self._used = self._used, None
        if slot is not None:
            slot.computed = self._queues.mark_computed()
        return slot

    def _holding(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _after(self, layer: int, way: Way) -> Iterator[int]:
        """Yield the layers in the order in which they are wanted after one; some may come twice."""
        count = len(self._sources)
        if way == "backward":
            return chain(reversed(range(layer)), range(count))
        rest = range(layer + 1, count)
        return chain(rest, range(count)) if way == "alone" else chain(rest, reversed(range(count)))

    def _look_ahead(self, order: Iterator[int]) -> None:
        """Begin to copy the next layers into buffers that hold none of them."""
        wanted = list(islice(dict.fromkeys(order), len(self._slots)))
        for layer in wanted:
            if self._holding(layer) is None:
                free = (slot for slot in self._slots if slot is not self._used and slot.layer not in wanted)
                self._copy(next(free), layer)

    def _copy(self, slot: _Slot, layer: int) -> None:
        if slot.computed is not None:
            self._queues.copying_waits(slot.computed)
            slot.computed = None
        self._queues.copy(slot.buffer, self._sources[layer])
        slot.layer, slot.copied = layer, self._queues.mark_copied()


class FreshCopies:
    """Lends each layer in a buffer of its own, made for that one use and filled before anything else is done.

    Nothing is reused, so nothing can be overwritten: what a `Ring` is compared with.
    """

    def __init__(self, sources: Sequence[Tensor], new_buffer: Callable[[], Tensor]) -> None:
        self._sources, self._new_buffer = sources, new_buffer
        self._taken: tuple[int, Tensor] | None = None

    def take(self, layer: int, way: Way) -> Tensor:
        """Return a new buffer with a layer's weights."""
        self._taken = None
        buffer, source = self._new_buffer(), self._sources[layer]
        buffer[: source.numel()].copy_(source)
        wait_for(buffer.device)
        self._taken = layer, buffer
        return buffer

    def give_back(self, way: Way) -> None:
        """Let the buffer go."""
        self._taken = None

    def buffer_of(self, layer: int) -> Tensor:
        """Return the buffer with the layer that was taken.

        Raises:
            LookupError: That layer is not taken.
        """
        if self._taken is None or self._taken[0] != layer:
            raise _untaken(layer)
        return self._taken[1]


def _untaken(layer: int) -> LookupError:
    return LookupError(f"the weights of streamed layer {layer} were asked for outside of its computation")
