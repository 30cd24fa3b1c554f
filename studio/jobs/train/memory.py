"""The memory that the process holds: torch's counters and NVML on CUDA, the resident set elsewhere.

A figure that cannot be read is None, never 0.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from studio.core.events import MemorySeen
from studio.core.gpu_catalogue import GIB
from studio.core.vram.reserve import CONTEXT_BYTES
from studio.jobs.base.device import card_used, room_on_card

Emit = Callable[..., None]


def limit_memory(budget_gib: float, device: torch.device) -> str:
    """Limit the process to its budget: torch then raises out of memory before it takes what other programs need.

    Where the driver spills, the limit is also what is free on the card, with a budget or without (`jobs.base.device`).
    torch limits its allocator alone. The CUDA context comes on top, so it is taken off the budget first.

    Args:
        budget_gib: Most GiB that the card may show for this process; 0 for no budget.
        device: Where the process computes; nothing is limited on a CPU.

    Returns:
        A note on a limit that the user did not ask for; empty where there is none.
    """
    room = room_on_card(device)
    if device.type != "cuda" or not (budget_gib or room is not None):
        return ""
    torch.zeros(1, device=device)  # makes the context, so that it can be seen
    total = torch.cuda.get_device_properties(device).total_memory
    wanted = float(total)
    if budget_gib:
        context = _own_device_bytes(_nvml_handle(device))
        wanted = budget_gib * GIB - (
            CONTEXT_BYTES if context is None else max(0, context - torch.cuda.memory_reserved(device))
        )
    share = (wanted if room is None else min(wanted, room)) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)
    if room is None or room >= wanted:
        return ""
    return (
        "the driver here moves what does not fit on the card into main memory, many times slower: this run keeps to "
        f"the {room / GIB:.1f} GiB that are free now and stops with out of memory beyond them. "
        "device.budget_gib sets less; close what else uses the card for more"
    )


class MemoryWatch:
    """Emits one `MemorySeen` per call of `see`.

    On CUDA a peak is the highest since the previous call, on a CPU the highest since the process began.
    """

    def __init__(self, emit: Emit, device: torch.device) -> None:
        self._emit = emit
        self._device = device
        self._process = psutil.Process()
        self._nvml = _nvml_handle(device) if device.type == "cuda" else None

    def see(self, stage: str, step: int) -> None:
        """Read all counters, in bytes, and emit them under a stage's name."""
        self._emit(MemorySeen, stage=stage, step=step, **self.held())

    def held(self) -> dict[str, int | None]:
        """Return all counters, in bytes, by the names that `MemorySeen` has for them."""
        return self._cuda() if self._device.type == "cuda" else self._host()

    def _cuda(self) -> dict[str, int | None]:
        readings: dict[str, int | None] = {
            "allocated_bytes": torch.cuda.memory_allocated(self._device),
            "reserved_bytes": torch.cuda.memory_reserved(self._device),
            "peak_bytes": torch.cuda.max_memory_allocated(self._device),
            "device_bytes": _device_used(self._nvml),
            "resident_bytes": self._process.memory_info().rss,
        }
        torch.cuda.reset_peak_memory_stats(self._device)
        return readings

    def _host(self) -> dict[str, int | None]:
        info = self._process.memory_info()
        return {"resident_bytes": info.rss, "resident_peak_bytes": _resident_peak(info)}


def _resident_peak(info: Any) -> int | None:
    """Return the highest resident set of this process in bytes: from psutil, from VmHWM on Linux, or from getrusage.

    getrusage would be wrong on Linux: a child's figure begins at what its parent held when it started the child.
    """
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    if psutil.LINUX:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
        return int(peak) * 1024 if peak else None
    import resource  # noqa: PLC0415  absent on Windows

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS, which alone comes here


def _nvml_handle(device: torch.device) -> Any | None:
    """Return NVML's handle of a torch device. It is found by UUID, because torch and NVML number cards differently."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(card_used(device)["uuid"])
    except Exception:  # noqa: BLE001  a missing driver or WSL mean "not available"
        return None


def _device_used(handle: Any | None) -> int | None:
    if handle is None:
        return None
    try:
        # Version 2 does not count the driver's own reserve as used (studio.probe.cards asks the same way); old drivers
        # lack it.
        version = getattr(pynvml, "nvmlMemory_v2", None)
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version).used)
        except pynvml.NVMLError:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception:  # noqa: BLE001  a lost card has no reading
        return None


def _own_device_bytes(handle: Any | None) -> int | None:
    """Return the bytes that the driver counts for this process; None where it does not know (a container, WSL)."""
    if handle is None:
        return None
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return next((item.usedGpuMemory or None for item in processes if item.pid == os.getpid()), None)
    except Exception:  # noqa: BLE001  a reading that is not supported is none
        return None
