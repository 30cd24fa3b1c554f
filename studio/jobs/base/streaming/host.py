"""Main memory for weights that wait: page-locked as far as that is safe, ordinary beyond.

A card reads page-locked memory by itself while it computes. Ordinary memory is copied by the processor first, and the
computation may wait for it.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from studio.core.errors import JobFailed
from studio.core.gpu_catalogue import GIB
from studio.probe.machine import spills_to_ram

_LEFT_BYTES = 2 * GIB
"""Main memory that nothing here takes: for Python and its libraries, and for what else runs."""
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_USED = Path("/sys/fs/cgroup/memory.current")


class WaitingMemory:
    """Gives out main memory, page-locked until that is used up or the driver refuses.

    Attributes:
        locked_bytes: What was given out page-locked.
        ordinary_bytes: What was given out otherwise.
    """

    def __init__(self, most_locked: int) -> None:
        """Begin.

        Args:
            most_locked: Most bytes that may be page-locked.
        """
        self._left = most_locked
        self.locked_bytes = self.ordinary_bytes = 0

    def new(self, size: int) -> Tensor:
        """Return so many bytes."""
        if size <= self._left:
            # The driver may refuse much earlier: in containers under WSL2 at 0.5 to 1 GiB (microsoft/WSL issue 14078).
            with suppress(RuntimeError):
                made = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                self._left -= size
                self.locked_bytes += size
                return made
            self._left = 0
        self.ordinary_bytes += size
        return torch.empty(size, dtype=torch.uint8)

    def said(self) -> str:
        """Return what had to stay ordinary memory, and what that costs; empty where all is page-locked."""
        if not self.ordinary_bytes:
            return ""
        return (
            f"{self.ordinary_bytes / GIB:.1f} of {(self.ordinary_bytes + self.locked_bytes) / GIB:.1f} GiB of streamed "
            "weights are in ordinary memory, as no more could safely be page-locked: their copies take about twice as "
            "long and do not hide behind the computation"
        )


def locked_memory() -> WaitingMemory:
    """Return the memory of this machine."""
    # torch rounds page-locked memory up to a power of two unless it is told not to; older versions cannot be told.
    tell: Any = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    with suppress(Exception):
        tell("pinned_max_round_threshold_mb:1")
    return WaitingMemory(most_locked(int(psutil.virtual_memory().total), room(), spills=spills_to_ram()))


def most_locked(total: int, free: int, *, spills: bool) -> int:
    """Return how many bytes may be page-locked: the system cannot move or swap them any more.

    Args:
        total: Main memory in bytes.
        free: What of it is free.
        spills: Whether it is Windows or WSL2, which let programs lock about half of the memory.
    """
    return max(0, min(total // 2 if spills else 3 * total // 4, free - _LEFT_BYTES))


def room() -> int:
    """Return the bytes of main memory that can be had without swapping: the machine's, or this container's."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # version 1 of cgroups, no limit ("max"), or no Linux
        free = min(free, int(_LIMIT.read_text("ascii")) - int(_USED.read_text("ascii")))
    return free


def check_room(needed: float, free: int) -> None:
    """Make sure that weights have room in main memory.

    Raises:
        JobFailed: They have not.
    """
    if needed + _LEFT_BYTES > free:
        raise JobFailed(
            "no_host_memory",
            f"the streamed layers need {needed / GIB:.1f} GiB of main memory, and {free / GIB:.1f} GiB are free",
            "stream fewer layers (model.stream), take method qlora, or close what uses the memory",
        )
