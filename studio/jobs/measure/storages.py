"""The birth and death of every storage that operators make: on a CPU, and of fake tensors, which have no memory.

What happens inside one operator is not seen; who knows what a kernel takes there says so with `passing`.
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
"""Components that are not on the device: optimizer state in unified memory, copies in the computer's own memory."""

_ELSEWHERE = (PAGED, HOST)

Peaks = dict[str, dict[str, int]]
"""Bytes by stage, at that stage's highest point, and component."""


@dataclass(slots=True)
class StorageLog:
    """What was allocated and freed, in order.

    Attributes:
        sizes: Bytes of each birth.
        components: What each birth belongs to; may be settled after it died.
        events: `n` is the birth of storage n, `~n` its death.
        stages: Where in `events` each stage begins, and its name; a stage may come again.
        sums: Births that are sums made in a backward, and the birth of the first summand.
    """

    sizes: list[int] = field(default_factory=list)
    components: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    stages: list[tuple[int, str]] = field(default_factory=list)
    sums: dict[int, int] = field(default_factory=dict)

    def really(self) -> list[int]:
        """Return the events as they are without anybody looking.

        Under a dispatch mode, and for fake tensors, autograd adds gradients up in new storages; otherwise it adds in
        place where nobody else holds the first one (torch/csrc/autograd/input_buffer.cpp can_accumulate_inplace).
        """
        events = list(self.events)
        for position, event in enumerate(self.events[:-1]):
            first = self.sums.get(event)
            if first is not None and self.events[position + 1] == ~first and self.sizes[first] == self.sizes[event]:
                events[position], events[position + 1] = ~first, event
        return events

    def peaks(self) -> Peaks:
        """Return the components of every stage at its highest point; what is elsewhere adds no height."""
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
    """Logs all storages that operators make while the mode is on, and those that it is shown.

    Attributes:
        log: What was seen.
        component: What newborn storages belong to until somebody claims them.
    """

    def __init__(self, *, block_bytes: int = 1, on_stage: Callable[[], None] = lambda: None) -> None:
        """Begin an empty log.

        Args:
            block_bytes: Sizes are rounded up to this: 512 as CUDA's allocator does, 1 for the tensors themselves.
            on_stage: Called where a stage begins; what it raises ends the steps.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = StorageLog()
        self.component = "activations"
        self._block = block_bytes
        self._on_stage = on_stage
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def stage(self, name: str) -> None:
        """Say that a stage begins; what is born around head and loss counts as logits."""
        self._on_stage()
        self.component = "logits" if name == "loss" else "activations"
        self.log.stages.append((len(self.log.events), name))

    def claim(self, tensors: Iterable[Any], component: str) -> None:
        """Say what the storages of tensors belong to, from their birth on; unknown ones are born now."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                number = self._number(tensor)
                if self.log.components[number] not in _ELSEWHERE:
                    self.log.components[number] = component

    def passing(self, size: int, component: str = "workspace") -> None:
        """Count bytes that an operator takes and gives back before it returns."""
        if size:
            number = self._born(size, component)
            self.log.events.append(~number)

    def lasting(self, size: int, component: str = "workspace") -> None:
        """Count bytes that are taken now and stay."""
        self._born(size, component)

    @contextmanager
    def newborn(self, component: str) -> Iterator[None]:
        """Let what is made inside belong to a component."""
        before, self.component = self.component, component
        try:
            yield
        finally:
            self.component = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it made."""
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.prim.device.default:
            for leaf in tree_iter(out):
                if isinstance(leaf, torch.Tensor):
                    self._number(leaf)
            if func is torch.ops.aten.add.Tensor and torch._C._current_autograd_node() is not None:
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
