"""NVIDIA cards through NVML: what is there, and how full. A reading is a number or None, never a made-up zero.

Nothing here raises without a driver, and nothing here changes a card.
"""

import re
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from studio.core.text import plain

_RETRY_SECONDS = 10.0
_UNNAMED = "NVIDIA GPU"


_UNIFIED_PARTS = ("GB10", "Orin", "Thor", "Tegra", "Xavier")
"""Chips whose memory is the machine's own and of which NVML therefore tells none (nvtop 411, nvitop 195). A card that
does not answer for another reason must not be taken for one of them."""


@dataclass(frozen=True, slots=True)
class CardProcess:
    """Somebody who uses a card; None is "not available" (Windows and WSL do not say how much)."""

    pid: int
    name: str | None = None
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """A part of a card that is cut into some (MIG): what a process gets of it.

    Attributes:
        uuid: Its lasting name, `MIG-...`.
        number: The ids of its GPU instance and compute instance, as older names of it end: `MIG-GPU-.../1/0`.
        total_bytes: All of its memory.
        used_bytes: In use by any process.
        free_bytes: What a new process could still take.
    """

    uuid: str | None = None
    number: tuple[int, int] | None = None
    total_bytes: int | None = None
    used_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver; None is "not available".

    Attributes:
        version: Such as `580.65.06`; under WSL that of Windows.
        cuda: The newest CUDA that it serves, such as (13, 0); a compatibility package may raise it above the version.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """One card at one moment; None is "not available" (unified memory, WSL, a lost card ...).

    Attributes:
        index: Its number in NVML's order, by PCI bus; CUDA's own order may be another (`studio.probe.device`).
        name: As the driver names it.
        uuid: Its lasting name.
        total_bytes: All of its memory.
        used_bytes: In use by any process, without the driver's own reserve where the driver tells them apart.
        free_bytes: What a new process could still take.
        capability: CUDA compute capability, such as (8, 9).
        busy_percent: Share of the last moment in which a kernel ran.
        celsius: Temperature.
        watts: Power drawn now.
        processes: Who uses it, largest first; None where the driver does not tell.
        mig: Whether it is cut into instances; memory is then that of the first, which is what a process gets.
        unified: Whether its memory is the machine's main memory.
        pci: Its place on the bus, such as `00000000:01:00.0`.
        instances: What it is cut into.
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
    processes: tuple[CardProcess, ...] | None = None
    mig: bool | None = None
    unified: bool = False
    pci: str | None = None
    instances: tuple[Instance, ...] = ()

    def others(self, own: Container[int] = ()) -> tuple[CardProcess, ...]:
        """Return the processes on it that are not one's own; none where the driver does not tell."""
        return tuple(item for item in self.processes or () if item.pid not in own)


class CardReader:
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

    def read(self) -> list[Card] | None:
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
        return [self._card(index) for index in range(count)]

    def driver(self) -> Driver:
        """Return what the driver says of itself; nothing where none works."""
        if not self._ready and self.read() is None:
            return Driver()
        # The second version of the call asks the library that a process would load, compatibility packages included.
        served = self._value("nvmlSystemGetCudaDriverVersion_v2") or self._value("nvmlSystemGetCudaDriverVersion")
        cuda = (served // 1000, served % 1000 // 10) if _positive(served) else None
        return Driver(_text(self._value("nvmlSystemGetDriverVersion")), cuda)

    def close(self) -> None:
        """Let go of the driver."""
        if self._ready:
            self._ready = False
            self._value("nvmlShutdown")

    def _card(self, index: int) -> Card:
        handle = self._value("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return Card(index, _UNNAMED)
        name, uuid = self._value("nvmlDeviceGetName", handle), self._value("nvmlDeviceGetUUID", handle)
        name = _text(name) or _UNNAMED
        mode = self._value("nvmlDeviceGetMigMode", handle)
        mig = None if mode is None else bool(mode[0])
        instances = self._instances(handle) if mig else ()
        memory = _first_size(instances) if mig else self._memory(handle)
        unified = memory is None and any(part in name for part in _UNIFIED_PARTS)
        memory = main_memory() if unified else memory
        capability = self._value("nvmlDeviceGetCudaComputeCapability", handle)
        rates = self._value("nvmlDeviceGetUtilizationRates", handle)
        milliwatts = self._value("nvmlDeviceGetPowerUsage", handle)
        return Card(
            index=index,
            name=name,
            uuid=_text(uuid),
            total_bytes=_positive(getattr(memory, "total", None)),
            used_bytes=getattr(memory, "used", None),
            free_bytes=getattr(memory, "free", None),
            capability=(int(capability[0]), int(capability[1])) if capability else None,
            busy_percent=getattr(rates, "gpu", None),
            celsius=self._value("nvmlDeviceGetTemperature", handle, getattr(self._nvml, "NVML_TEMPERATURE_GPU", 0)),
            watts=None if milliwatts is None else milliwatts / 1000,
            processes=self._processes(handle),
            mig=mig,
            unified=unified,
            pci=_text(getattr(self._value("nvmlDeviceGetPciInfo", handle), "busId", None)),
            instances=instances,
        )

    def _instances(self, handle: Any) -> tuple[Instance, ...]:
        found = []
        for index in range(self._value("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            instance = self._value("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if instance is None:
                continue
            memory = self._memory(instance)
            number = [self._value(f"nvmlDeviceGet{kind}InstanceId", instance) for kind in ("Gpu", "Compute")]
            found.append(
                Instance(
                    uuid=_text(self._value("nvmlDeviceGetUUID", instance)),
                    number=None if None in number else (number[0], number[1]),
                    total_bytes=_positive(getattr(memory, "total", None)),
                    used_bytes=getattr(memory, "used", None),
                    free_bytes=getattr(memory, "free", None),
                )
            )
        return tuple(found)

    def _processes(self, handle: Any) -> tuple[CardProcess, ...] | None:
        """Return who computes or draws on a card; a process that does both is listed once."""
        lists = [self._value(f"nvmlDeviceGet{kind}RunningProcesses", handle) for kind in ("Compute", "Graphics")]
        if all(found is None for found in lists):
            return None
        sizes: dict[int, int | None] = {}
        for process in (item for found in lists for item in found or ()):
            used = _positive(getattr(process, "usedGpuMemory", None))
            sizes[process.pid] = max(filter(None, (used, sizes.get(process.pid))), default=None)
        found = (CardProcess(pid, self._process_name(pid), used) for pid, used in sizes.items())
        return tuple(sorted(found, key=lambda item: (-(item.used_bytes or 0), item.pid)))

    def _process_name(self, pid: int) -> str | None:
        """Return the last part of a program's path; other users' programs may have no name here."""
        path = _decoded(self._value("nvmlSystemGetProcessName", pid)) or ""
        program = path.split(" ")[0] if path.startswith("/") else path
        return _text(re.split(r"[/\\]", program)[-1]) or None

    def _memory(self, handle: Any) -> Any:
        """Return total, used and free of a card, None where it tells none.

        Version 2 of the call counts the driver's reserve apart, as nvidia-smi does; old drivers lack it.
        """
        if handle is None:
            return None
        version = getattr(self._nvml, "nvmlMemory_v2", None)
        memory = None if version is None else self._value("nvmlDeviceGetMemoryInfo", handle, version)
        memory = memory or self._value("nvmlDeviceGetMemoryInfo", handle)
        return memory if _positive(getattr(memory, "total", None)) else None

    def _value(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, name)(*arguments)
        except Exception:  # noqa: BLE001  each reading may fail alone: not supported, lost card, missing function
            return None


def main_memory() -> Any:
    """Return total, used and free bytes of main memory, None where the system does not tell."""
    try:
        import psutil  # noqa: PLC0415  20 ms that only unified memory pays

        memory = psutil.virtual_memory()
    except Exception:  # noqa: BLE001  /proc may be missing or hidden
        return None
    return SimpleNamespace(
        total=int(memory.total), used=int(memory.total - memory.available), free=int(memory.available)
    )


def read_cards(reader: CardReader | None = None) -> list[Card] | None:
    """Return all cards now, None where there is no working driver; opens and closes NVML unless given a reader."""
    if reader is not None:
        return reader.read()
    once = CardReader()
    try:
        return once.read()
    finally:
        once.close()


def read_driver() -> Driver:
    """Return what the driver says of itself; opens and closes NVML."""
    once = CardReader()
    try:
        return once.driver()
    finally:
        once.close()


def _first_size(instances: tuple[Instance, ...]) -> Any:
    """Return total, used and free of the first instance, which is what a process gets that asks for the card."""
    first = instances[0] if instances else None
    if first is None or first.total_bytes is None:
        return None
    return SimpleNamespace(total=first.total_bytes, used=first.used_bytes, free=first.free_bytes)


def _pynvml() -> Any:
    import pynvml  # noqa: PLC0415  60 ms, and not needed where no card is asked for

    return pynvml


def _text(value: Any) -> str | None:
    text = _decoded(value)
    return None if text is None else plain(text, one_line=True)


def _decoded(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
