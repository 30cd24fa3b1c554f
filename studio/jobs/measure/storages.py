"""Logs when every storage that an operator makes is allocated and freed, on a CPU and for fake tensors.

What is allocated and freed inside one operator is not seen; code that knows it counts it with `passing`.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PAGED, HOST = "paged", "host"
"""Components that are not in the device's memory: optimizer state in unified memory, and copies in main memory."""

_ELSEWHERE = (PAGED, HOST)

Peaks = dict[str, dict[str, int]]
"""Bytes by stage and component, at each stage's highest point."""


@dataclass(slots=True)
class StorageLog:
    """What was allocated and freed, in order.

    Attributes:
        sizes: Bytes of each storage, by its number.
        components: The component of each storage, by its number; it may be set after the storage is freed.
        events: `n` means that storage n is allocated, `~n` that it is freed.
        stages: Where in `events` each stage begins, and its name; a stage may come again.
        sums: Storages that are sums of gradients made in a backward pass, and the storage of each one's first summand.
    """

    sizes: list[int] = field(default_factory=list)
    components: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    stages: list[tuple[int, str]] = field(default_factory=list)
    sums: dict[int, int] = field(default_factory=dict)

    def really(self) -> list[int]:
        """Return the events as they would be without this log.

        Under a dispatch mode, and for fake tensors, autograd adds up gradients in new storages. Otherwise it adds in
        place if nobody else holds the first one (torch/csrc/autograd/input_buffer.cpp can_accumulate_inplace). So where
        a first summand is freed right after its sum is allocated, the two events are exchanged.
        """
        events = list(self.events)
        for position, event in enumerate(self.events[:-1]):
            first = self.sums.get(event)
            if first is not None and self.events[position + 1] == ~first and self.sizes[first] == self.sizes[event]:
                events[position], events[position + 1] = ~first, event
        return events

    def peaks(self) -> Peaks:
        """Return the bytes of every component at each stage's highest point; paged and host bytes add no height."""
        live: dict[str, int] = {}
        peaks: Peaks = {}
        heights: dict[str, int] = {}
        total, stage = 0, ""
        starts = [*self.stages, (len(self.events) + 1, "")]
        following = 0
        for position, event in enumerate([*self.really(), None]):
            while starts[following][0] <= position:
                stage = starts[following][1]
                following += 1
                if total > heights.get(stage, -1):
                    heights[stage], peaks[stage] = total, {name: size for name, size in live.items() if size}
            if event is None:
                break
            number, sign = (event, 1) if event >= 0 else (~event, -1)
            component, size = self.components[number], sign * self.sizes[number]
            live[component] = live.get(component, 0) + size
            if component in _ELSEWHERE:
                continue
            total += size
            if total > heights.get(stage, -1):
                heights[stage], peaks[stage] = total, {name: size for name, size in live.items() if size}
        return peaks


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Logs all storages that operators make while the mode is on, and those that are claimed.

    Attributes:
        log: What was allocated and freed.
        component: The component of new storages until they are claimed.
    """

    def __init__(self, *, block_bytes: int = 1, on_stage: Callable[[], None] = lambda: None) -> None:
        """Begin an empty log.

        Args:
            block_bytes: Sizes are rounded up to a multiple of this: 512 as in CUDA's allocator, 1 for exact sizes.
            on_stage: Called when a stage begins; what it raises ends the run.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = StorageLog()
        self.component = "activations"
        self._block = block_bytes
        self._on_stage = on_stage
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def stage(self, name: str) -> None:
        """Begin a stage; what is allocated in the loss stage counts as logits, otherwise as activations."""
        self._on_stage()
        self.component = "logits" if name == "loss" else "activations"
        self.log.stages.append((len(self.log.events), name))

    def claim(self, tensors: Iterable[Any], component: str) -> None:
        """Set the component of tensors' storages, from their allocation on; unknown ones count as allocated now."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                number = self._number(tensor)
                if self.log.components[number] not in _ELSEWHERE:
                    self.log.components[number] = component

    def passing(self, size: int, component: str = "workspace") -> None:
        """Count bytes that an operator allocates and frees before it returns."""
        if size:
            number = self._born(size, component)
            self.log.events.append(~number)

    def lasting(self, size: int, component: str = "workspace") -> None:
        """Count bytes that are allocated now and never freed."""
        self._born(size, component)

    @contextmanager
    def newborn(self, component: str) -> Iterator[None]:
        """Let everything allocated inside the context belong to a component."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and log the storages of its results."""
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            for leaf in tree_iter(out):
                if isinstance(leaf, torch.Tensor) and not leaf.is_meta:  # tensors on meta have no memory anywhere
                    self._number(leaf)
            # A number may come first, where a checkpointed layer is computed again.
            sums = func is torch.ops.aten.add.Tensor and isinstance(args[0], torch.Tensor)
            if sums and torch._C._current_autograd_node() is not None:
                self.log.sums[self._number(out)] = self._number(args[0])
        return out

    def _number(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return known[1]
        number = self._born(storage.nbytes(), self.component)
        self._known[key] = weakref.ref(storage, lambda _: self._died(key, number)), number
        return number

    def _born(self, size: int, component: str) -> int:
        log = self.log
        log.sizes.append(-(-size // self._block) * self._block)
        log.components.append(component)
        number = len(log.sizes) - 1
        log.events.append(number)
        return number

    def _died(self, key: int, number: int) -> None:
        self.log.events.append(~number)
        known = self._known.get(key)
        if known is not None and known[1] == number:
            del self._known[key]
