"""NVIDIA cards through NVML: what is there, and how full. A reading is a number or None, never a made-up zero.

Nothing here raises without a driver, and nothing here changes a card.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from studio.core.text import plain

_RETRY_SECONDS = 10.0
_UNNAMED = "NVIDIA GPU"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card at one moment; None is "not available" (unified memory, WSL, a lost card ...).

    Attributes:
        index: Its number in NVML's order, which `CUDA_VISIBLE_DEVICES` may change for CUDA.
        name: As the driver names it.
        uuid: Its lasting name.
        total_bytes: All of its memory.
        used_bytes: In use by any process, without the driver's own reserve where the driver tells them apart.
        free_bytes: What a new process could still take.
        capability: CUDA compute capability, such as (8, 9).
        busy_percent: Share of the last moment in which a kernel ran.
        celsius: Temperature.
        watts: Power drawn now.
    """

    index: int
    name: str
    uuid: str | None = None
    total_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None
    capability: tuple[int, int] | None = None
    busy_percent: int | None = None
    celsius: int | None = None
    watts: float | None = None


class GpuReader:
    """Reads all cards as often as asked; without a driver it looks again every ten seconds only."""

    def __init__(
        self, *, nvml: Any = None, load: Callable[[], Any] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare to read; nothing is loaded yet.

        Args:
            nvml: The NVML module; None loads `pynvml` when it is first needed.
            load: Loads the module, in place of the usual import.
            clock: Seconds.
        """
        self._nvml = nvml
        self._load = load or _pynvml
        self._clock = clock
        self._ready = False
        self._retry_at: float | None = None

    def read(self) -> list[Gpu] | None:
        """Return all cards now, None where there is no working driver."""
        if self._retry_at is not None and self._clock() < self._retry_at:
            return None
        try:
            if self._nvml is None:
                self._nvml = self._load()
            if not self._ready:
                self._nvml.nvmlInit()
                self._ready = True
            count = self._nvml.nvmlDeviceGetCount()
        except Exception:  # noqa: BLE001  import and driver faults of every kind mean the same: no reading
            self._ready = False
            self._retry_at = self._clock() + _RETRY_SECONDS
            return None
        self._retry_at = None
        return [self._gpu(index) for index in range(count)]

    def close(self) -> None:
        """Let go of the driver."""
        if self._ready:
            self._ready = False
            self._value("nvmlShutdown")

    def _gpu(self, index: int) -> Gpu:
        handle = self._value("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return Gpu(index, _UNNAMED)
        memory = self._memory(handle)
        name, uuid = self._value("nvmlDeviceGetName", handle), self._value("nvmlDeviceGetUUID", handle)
        capability = self._value("nvmlDeviceGetCudaComputeCapability", handle)
        rates = self._value("nvmlDeviceGetUtilizationRates", handle)
        milliwatts = self._value("nvmlDeviceGetPowerUsage", handle)
        return Gpu(
            index=index,
            name=_text(name) or _UNNAMED,
            uuid=_text(uuid),
            total_bytes=_positive(getattr(memory, "total", None)),
            used_bytes=getattr(memory, "used", None),
            free_bytes=getattr(memory, "free", None),
            capability=(int(capability[0]), int(capability[1])) if capability else None,
            busy_percent=getattr(rates, "gpu", None),
            celsius=self._value("nvmlDeviceGetTemperature", handle, getattr(self._nvml, "NVML_TEMPERATURE_GPU", 0)),
            watts=None if milliwatts is None else milliwatts / 1000,
        )

    def _memory(self, handle: Any) -> Any:
        """Version 2 of the call counts the driver's reserve apart, as nvidia-smi does; old drivers lack it."""
        version = getattr(self._nvml, "nvmlMemory_v2", None)
        memory = None if version is None else self._value("nvmlDeviceGetMemoryInfo", handle, version)
        memory = memory or self._value("nvmlDeviceGetMemoryInfo", handle)
        return memory if _positive(getattr(memory, "total", None)) else None

    def _value(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, name)(*arguments)
        except Exception:  # noqa: BLE001  each reading may fail alone: not supported, lost card, missing function
            return None


def read_gpus(reader: GpuReader | None = None) -> list[Gpu] | None:
    """Return all cards now, None where there is no working driver; opens and closes NVML unless given a reader."""
    if reader is not None:
        return reader.read()
    once = GpuReader()
    try:
        return once.read()
    finally:
        once.close()


def _pynvml() -> Any:
    import pynvml  # noqa: PLC0415  60 ms, and not needed where no card is asked for

    return pynvml


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return plain(value, one_line=True) if isinstance(value, str) else None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
