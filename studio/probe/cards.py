"""NVIDIA cards through NVML: which there are, and how full. A reading is a number or None, never a made-up zero.

Nothing here raises without a driver, and nothing here changes a card.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from studio.core.text import plain

_UNNAMED = "NVIDIA GPU"
_UNIFIED_PARTS = ("GB10", "Orin", "Thor", "Tegra", "Xavier")
"""Chips that use the machine's main memory, so that NVML tells no memory of them (nvtop 411, nvitop 195). They are
known by name: a card may also fail to answer for another reason."""


@dataclass(frozen=True, slots=True)
class CardProcess:
    """A process that uses a card; None is "not available" (Windows and WSL do not tell its memory)."""

    pid: int
    name: str | None = None
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance of a divided card (MIG): a process gets one of them.

    Attributes:
        uuid: Its UUID, `MIG-...`.
        number: The ids of its GPU instance and compute instance, with which its older names end: `MIG-GPU-.../1/0`.
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
        version: Such as `580.65.06`; under WSL that of the driver on Windows.
        cuda: The newest CUDA that it serves, such as (13, 0). A compatibility package may raise it above what the
            driver's version serves.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """One card at one moment; None is "not available" (unified memory, WSL, a lost card ...).

    Attributes:
        index: Its number in NVML's order, by PCI bus; CUDA's own order may differ (`studio.probe.device`).
        name: As the driver names it.
        uuid: Its UUID, which stays the same when cards are added or moved.
        total_bytes: All of its memory.
        used_bytes: In use by any process, without the driver's own reserve where the driver tells them apart.
        free_bytes: What a new process could still take.
        capability: CUDA compute capability, such as (8, 9).
        busy_percent: Share of the last moment in which a kernel ran.
        celsius: Temperature.
        watts: Power drawn now.
        processes: The processes that use it, largest first; None where the driver does not tell.
        mig: Whether it is divided into instances; its memory is then that of the first, which a process would get.
        unified: Whether its memory is the machine's main memory.
        pci: Its place on the bus, such as `00000000:01:00.0`.
        instances: The instances into which it is divided.
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


class _Nvml:
    """The NVML module; a call that fails gives None, so that each reading may fail alone."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def driver(self) -> Driver:
        """Return what the driver says of itself."""
        # The second version of the call asks the library that a process would load, compatibility packages included.
        served = self.value("nvmlSystemGetCudaDriverVersion_v2") or self.value("nvmlSystemGetCudaDriverVersion")
        cuda = (served // 1000, served % 1000 // 10) if _positive(served) else None
        return Driver(_text(self.value("nvmlSystemGetDriverVersion")), cuda)

    def card(self, index: int) -> Card:
        """Return one card as it is now."""
        handle = self.value("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return Card(index, _UNNAMED)
        name, uuid = self.value("nvmlDeviceGetName", handle), self.value("nvmlDeviceGetUUID", handle)
        name = _text(name) or _UNNAMED
        # A card without MIG refuses the question, which is another answer than "off".
        mode = self.value("nvmlDeviceGetMigMode", handle)
        mig = None if mode is None else bool(mode[0])
        instances = self._instances(handle) if mig else ()
        memory = _first_size(instances) if mig else self.memory(handle)
        unified = memory is None and any(part in name for part in _UNIFIED_PARTS)
        memory = main_memory() if unified else memory
        capability = self.value("nvmlDeviceGetCudaComputeCapability", handle)
        rates = self.value("nvmlDeviceGetUtilizationRates", handle)
        milliwatts = self.value("nvmlDeviceGetPowerUsage", handle)
        return Card(
            index=index,
            name=name,
            uuid=_text(uuid),
            total_bytes=_positive(getattr(memory, "total", None)),
            used_bytes=getattr(memory, "used", None),
            free_bytes=getattr(memory, "free", None),
            capability=(int(capability[0]), int(capability[1])) if capability else None,
            busy_percent=getattr(rates, "gpu", None),
            celsius=self.value("nvmlDeviceGetTemperature", handle, getattr(self._module, "NVML_TEMPERATURE_GPU", 0)),
            watts=None if milliwatts is None else milliwatts / 1000,
            processes=self._processes(handle),
            mig=mig,
            unified=unified,
            pci=_text(getattr(self.value("nvmlDeviceGetPciInfo", handle), "busId", None)),
            instances=instances,
        )

    def _instances(self, handle: Any) -> tuple[Instance, ...]:
        found = []
        for index in range(self.value("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            instance = self.value("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if instance is None:
                continue
            memory = self.memory(instance)
            number = [self.value(f"nvmlDeviceGet{kind}InstanceId", instance) for kind in ("Gpu", "Compute")]
            found.append(
                Instance(
                    uuid=_text(self.value("nvmlDeviceGetUUID", instance)),
                    number=None if None in number else (number[0], number[1]),
                    total_bytes=_positive(getattr(memory, "total", None)),
                    used_bytes=getattr(memory, "used", None),
                    free_bytes=getattr(memory, "free", None),
                )
            )
        return tuple(found)

    def _processes(self, handle: Any) -> tuple[CardProcess, ...] | None:
        """Return the processes that compute or draw on a card; one that does both is listed once."""
        # NVML lists programs that compute and programs that draw apart; many do both.
        lists = [self.value(f"nvmlDeviceGet{kind}RunningProcesses", handle) for kind in ("Compute", "Graphics")]
        if all(found is None for found in lists):
            return None
        sizes: dict[int, int | None] = {}
        for process in (item for found in lists for item in found or ()):
            used = _positive(getattr(process, "usedGpuMemory", None))
            sizes[process.pid] = max(filter(None, (used, sizes.get(process.pid))), default=None)
        found = (CardProcess(pid, self._process_name(pid), used) for pid, used in sizes.items())
        return tuple(sorted(found, key=lambda item: (-(item.used_bytes or 0), item.pid)))

    def _process_name(self, pid: int) -> str | None:
        """Return the last part of a program's path; None where it is not told, as of other users' programs."""
        path = _decoded(self.value("nvmlSystemGetProcessName", pid)) or ""
        program = path.split(" ")[0] if path.startswith("/") else path
        return _text(re.split(r"[/\\]", program)[-1]) or None

    def memory(self, handle: Any) -> Any:
        """Return total, used and free bytes of a card, None where it tells none.

        Version 2 of the call leaves the driver's own reserve out of what is used, as nvidia-smi does; old drivers lack
        it.
        """
        if handle is None:
            return None
        version = getattr(self._module, "nvmlMemory_v2", None)
        memory = None if version is None else self.value("nvmlDeviceGetMemoryInfo", handle, version)
        memory = memory or self.value("nvmlDeviceGetMemoryInfo", handle)
        return memory if _positive(getattr(memory, "total", None)) else None

    def value(self, name: str, *arguments: Any) -> Any:
        """Return what a function of NVML answers, None where it fails."""
        try:
            return getattr(self._module, name)(*arguments)
        except Exception:  # noqa: BLE001  each reading may fail alone: not supported, lost card, missing function
            return None


_REASONS = (
    (0x08, "the hardware slows it down: heat, or a power supply that is not enough"),
    (0x40, "it is too hot: the hardware slows it down"),
    (0x20, "it is too hot: the driver lowers its clocks"),
    (0x80, "the power supply asked it to slow down"),
    (0x04, "it draws as much power as its limit allows"),
    (0x02, "its clocks are set to fixed values"),
    (0x10, "its clocks follow those of another card"),
    (0x100, "its clocks follow the display's setting"),
)
"""What lowers a card's clocks, by NVML's bit (nvml.h, nvmlClocksEventReasons), the worst first."""
_GONE = {
    6: "the driver does not know it any more",  # NVML_ERROR_NOT_FOUND
    9: "the driver is not loaded any more",  # NVML_ERROR_DRIVER_NOT_LOADED
    15: "it has fallen off the bus",  # NVML_ERROR_GPU_IS_LOST
    16: "it must be reset",  # NVML_ERROR_RESET_REQUIRED
}


@dataclass(frozen=True, slots=True)
class CardState:
    """How a card that is computed on is doing; what is not available is empty or None.

    Attributes:
        gone: Why it can no longer be used, in words; empty where it can, or where the driver does not say.
        reasons: What lowers its clocks, in words, the worst first.
        free_bytes: Memory that a process could still take.
        total_bytes: All of its memory.
        celsius: Temperature.
    """

    gone: str = ""
    reasons: tuple[str, ...] = ()
    free_bytes: int | None = None
    total_bytes: int | None = None
    celsius: int | None = None


def card_state(uuid: str, load: Callable[[], Any] | None = None) -> CardState:
    """Return how the card with this UUID is doing. Nothing is raised: without a driver nothing is known.

    Args:
        uuid: As the driver tells it, `GPU-...`.
        load: Returns the NVML module.
    """
    try:
        module = (load or _pynvml)()
        module.nvmlInit()
    except Exception as error:  # noqa: BLE001  import and driver faults of every kind
        return CardState(gone=_GONE.get(getattr(error, "value", None) or 0, ""))
    nvml = _Nvml(module)
    try:
        handle = module.nvmlDeviceGetHandleByUUID(uuid)
        module.nvmlDeviceGetUUID(handle)  # a card that is lost may still be found
    except Exception as error:  # noqa: BLE001  unknown errors and missing functions say nothing of the card
        return CardState(gone=_GONE.get(getattr(error, "value", None) or 0, ""))
    else:
        bits = nvml.value("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if bits is None:  # its name before driver 535
            bits = nvml.value("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        reasons = tuple(words for bit, words in _REASONS if isinstance(bits, int) and bits & bit)
        memory = nvml.memory(handle)
        celsius = nvml.value("nvmlDeviceGetTemperature", handle, getattr(module, "NVML_TEMPERATURE_GPU", 0))
        return CardState(
            reasons=reasons,
            free_bytes=getattr(memory, "free", None),
            total_bytes=_positive(getattr(memory, "total", None)),
            celsius=celsius if isinstance(celsius, int) else None,
        )
    finally:
        nvml.value("nvmlShutdown")


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


def _pynvml() -> Any:
    import pynvml  # noqa: PLC0415  60 ms, and not needed where no card is asked for

    return pynvml


def read_cards(load: Callable[[], Any] = _pynvml) -> tuple[list[Card] | None, Driver]:
    """Return all cards as they are now, None where no driver works, and what the driver says of itself.

    Args:
        load: Returns the NVML module.
    """
    try:
        module = load()
        module.nvmlInit()
    except Exception:  # noqa: BLE001  import and driver faults of every kind mean the same: no reading
        return None, Driver()
    nvml = _Nvml(module)
    try:
        count = nvml.value("nvmlDeviceGetCount")
        return (None, Driver()) if count is None else ([nvml.card(index) for index in range(count)], nvml.driver())
    finally:
        nvml.value("nvmlShutdown")


def _first_size(instances: tuple[Instance, ...]) -> Any:
    """Return total, used and free bytes of the first instance: a process that asks for the card gets this one."""
    first = instances[0] if instances else None
    if first is None or first.total_bytes is None:
        return None
    return SimpleNamespace(total=first.total_bytes, used=first.used_bytes, free=first.free_bytes)


def _text(value: Any) -> str | None:
    text = _decoded(value)
    return None if text is None else plain(text, one_line=True)


def _decoded(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
