"""The driver's library `libnvidia-ml.so.1`, which is not there: the C functions that nvidia-ml-py calls, in Python.

nvidia-ml-py stays as it is installed, with its structures, its errors and its cache of functions. Faked is what it
loads: a function takes what C would be given, writes where the pointers point, and returns NVML's number (nvml.h).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

from studio.core.gpu_catalogue import GIB

OK, NOT_SUPPORTED, NOT_FOUND, NOT_LOADED, LOST, RESET, UNKNOWN = 0, 3, 6, 9, 15, 16, 999
_TOO_SMALL = 7


@dataclass
class LibraryCard:
    """A card as the library tells of it.

    Attributes:
        uuid: Its UUID.
        name: Its name.
        free_gib: Free memory, of 24 GiB.
        celsius: Temperature.
        reasons: What lowers its clocks, as bits.
        processes: Number and bytes of each process.
        answers: NVML's number for functions that do not answer 0, by their names; `every` for all of them.
    """

    uuid: str
    name: str = "NVIDIA GeForce RTX 4090"
    free_gib: float = 20.0
    celsius: int = 60
    reasons: int = 0
    processes: list[tuple[int, int]] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)


@dataclass
class Library:
    """What `CDLL("libnvidia-ml.so.1")` returns.

    Attributes:
        cards: In the driver's order.
        init: NVML's number that starting it answers with.
        lacks: Functions that this version does not have.
        gone: Numbers of processes that have ended, whose names are not found any more.
    """

    cards: list[LibraryCard]
    init: int = OK
    lacks: frozenset[str] = frozenset()
    gone: frozenset[int] = frozenset()

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> "Library":
        """Put it in the place of the driver's library for the rest of a test, and return it."""
        monkeypatch.setattr(pynvml, "nvmlLib", self)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        return self

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Return a C function.

        Raises:
            AttributeError: This version does not have it, as ctypes says.
        """
        own = type(self).__dict__.get(f"_{name.removeprefix('nvml').removesuffix('_v2').removesuffix('_v3')}")
        if not name.startswith("nvml") or name in self.lacks:
            raise AttributeError(name)
        if own is None:
            return lambda *arguments: NOT_SUPPORTED

        def call(*arguments: Any) -> int:
            if arguments and isinstance(arguments[0], pynvml.c_nvmlDevice_t):
                card = self.cards[(ctypes.cast(arguments[0], ctypes.c_void_p).value or 0) - 1]
                refusal = card.answers.get(name, card.answers.get("every", OK))
                return refusal or int(own(self, card, *arguments[1:]))
            return int(own(self, *arguments))

        return call

    def _InitWithFlags(self, flags: Any) -> int:  # noqa: N802  NVML's names, here and below
        return self.init

    def _Shutdown(self) -> int:  # noqa: N802
        return OK

    def _DeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.cards)
        return OK

    def _DeviceGetHandleByIndex(self, index: Any, handle: Any) -> int:  # noqa: N802
        return _point_at(handle, int(index.value), self.cards)

    def _DeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:  # noqa: N802
        uuids = [card.uuid.encode() for card in self.cards]
        return _point_at(handle, uuids.index(uuid.value), self.cards) if uuid.value in uuids else NOT_FOUND

    def _SystemGetProcessName(self, pid: Any, name: Any, length: Any) -> int:  # noqa: N802
        if int(getattr(pid, "value", pid)) in self.gone:
            return NOT_FOUND
        name.value = b"/usr/bin/python3"
        return OK

    def _DeviceGetName(self, card: LibraryCard, name: Any, length: Any) -> int:  # noqa: N802
        name.value = card.name.encode()
        return OK

    def _DeviceGetUUID(self, card: LibraryCard, uuid: Any, length: Any) -> int:  # noqa: N802
        uuid.value = card.uuid.encode()
        return OK

    def _DeviceGetMemoryInfo(self, card: LibraryCard, memory: Any) -> int:  # noqa: N802
        memory._obj.total, memory._obj.free = 24 * GIB, int(card.free_gib * GIB)
        memory._obj.used = memory._obj.total - memory._obj.free
        return OK

    def _DeviceGetTemperature(self, card: LibraryCard, sensor: Any, celsius: Any) -> int:  # noqa: N802
        celsius._obj.value = card.celsius
        return OK

    def _DeviceGetCurrentClocksEventReasons(self, card: LibraryCard, reasons: Any) -> int:  # noqa: N802
        reasons._obj.value = card.reasons
        return OK

    _DeviceGetCurrentClocksThrottleReasons = _DeviceGetCurrentClocksEventReasons

    def _DeviceGetComputeRunningProcesses(self, card: LibraryCard, count: Any, out: Any) -> int:  # noqa: N802
        enough = count._obj.value >= len(card.processes)
        count._obj.value = len(card.processes)
        if not enough or out is None:
            return _TOO_SMALL if card.processes else OK
        for place, (pid, used) in enumerate(card.processes):
            out[place].pid, out[place].usedGpuMemory = pid, used
        return OK


def _point_at(handle: Any, place: int, cards: list[LibraryCard]) -> int:
    """Write a handle, which is an address, here the card's number and one; return what finding the card answers."""
    ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.c_void_p(place + 1)
    return cards[place].answers.get("nvmlDeviceGetHandle", OK)
