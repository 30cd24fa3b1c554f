"""A machine with NVIDIA cards that is not there: its NVML, its driver, and `torch.cuda` on top of them.

`torch.cuda`'s own Python stays as it is installed, with every check that it makes (torch/cuda/__init__.py,
torch/cuda/memory.py, torch/_utils.py _get_device_index): a device without a number is refused, a fraction that is no
float, a number that is too high. Faked is what lies below, in `torch._C`, where a build for CPUs has nothing:

- the environment is read once, at the first call that starts the driver (`cudaGetDeviceCount`, which `is_available`
  makes); what changes later is ignored,
- numbers in a mask count in CUDA's order, the fastest first, where `CUDA_DEVICE_ORDER` is not PCI_BUS_ID,
- a driver that is too old for the build, or a build without CUDA, shows no card and raises nothing,
- of a card that is cut into instances a process gets one, and its UUID may be told as that of the whole card.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio.probe.cards import Card, read_cards
from studio.probe.device import Sight
from studio.probe.torch_cards import TorchBuild

GIB = 2**30


CUDA_13 = TorchBuild("2.13.0", (13, 0), None, {(13, 0): frozenset({75, 80, 86, 90, 100, 120})})
"""PyPI's torch."""


class Refused(Exception):
    """As NVML's own errors."""


@dataclass(frozen=True)
class FakeCard:
    """A card. Their list is in the order of the PCI bus; `speed` is what CUDA orders them by."""

    name: str
    uuid: str
    gib: int = 24
    capability: tuple[int, int] = (8, 6)
    speed: int = 1
    instances: tuple[str, ...] | None = None
    lost: bool = False


@dataclass
class FakeMachine:
    """Cards, their driver, and the torch that is installed.

    Attributes:
        cards: By PCI bus.
        driver: Its version.
        serves: The newest CUDA that it serves.
        build: The installed torch; one without CUDA leaves `torch._C` as a build for CPUs has it.
        codes: What that torch has machine code for.
        nvml: Whether NVML answers.
        fractions: Memory limits that torch set, by device number.
        seen: Once the driver has started: the cards that the process sees.
        contexts: Where a tensor was made with `torch.zeros`, and with it a context.
    """

    cards: list[FakeCard]
    driver: str = "580.95.05"
    serves: tuple[int, int] | None = (13, 0)
    build: TorchBuild = CUDA_13
    codes: tuple[str, ...] = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
    nvml: bool = True
    fractions: dict[int, float] = field(default_factory=dict)
    seen: list[tuple[FakeCard, str | None]] | None = None
    contexts: list[torch.device] = field(default_factory=list)

    def sight(self) -> Sight:
        """What the program sees of the machine from a process without torch, in the environment as it is now."""
        cards, driver = read_cards(lambda: FakeNvml(self))
        return Sight(cards, driver, self.build, dict(os.environ), self.ask, hinted=not self.nvml)

    def ask(self, masked: bool) -> list[Card] | None:
        """What a torch in a process of its own says of its cards."""
        environ = {key: text for key, text in os.environ.items() if masked or key != "CUDA_VISIBLE_DEVICES"}
        seen = self.visible(environ) if self.works() else []
        return [
            Card(place, card.name, instance or card.uuid, card.gib * GIB, capability=card.capability)
            for place, (card, instance) in enumerate(seen)
        ]

    def works(self) -> bool:
        """Whether the driver serves the build."""
        cuda = self.build.cuda
        return cuda is not None and (self.serves is None or self.serves[0] >= cuda[0])

    def visible(self, environ: Mapping[str, str]) -> list[tuple[FakeCard, str | None]]:
        """Cards and instances in the order in which a process with this environment counts them.

        The mask is read by torch's own reader of it.
        """
        cards = [card for card in self.cards if not card.lost and card.instances != ()]
        if environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            cards = sorted(cards, key=lambda card: -card.speed)
        mask = environ.get("CUDA_VISIBLE_DEVICES")
        if mask is None:
            return [(card, card.instances[0] if card.instances else None) for card in cards]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", mask)
            parsed: list[Any] = torch.cuda._parse_visible_devices()
            if mask.startswith("MIG-"):
                cut = [(card, name) for card in cards for name in card.instances or ()]
                chosen = [[pair for pair in cut if pair[1].startswith(word)] for word in parsed]
                return [pairs[0] for pairs in chosen if len(pairs) == 1][:1]
            if parsed and isinstance(parsed[0], str):
                parsed = torch.cuda._transform_uuid_to_ordinals(parsed, [card.uuid for card in cards])
        end = next((place for place, number in enumerate(parsed) if number >= len(cards)), len(parsed))
        found = [cards[number] for number in parsed[:end]]
        return [(card, card.instances[0] if card.instances else None) for card in found]

    def start(self, patch: pytest.MonkeyPatch) -> None:
        """Put this machine under `torch.cuda`, as a process that has just begun finds it."""
        self.seen = None
        own = torch.cuda
        for name, value in (("_initialized", False), ("_cached_device_count", None), ("_cudart", self._cudart())):
            patch.setattr(own, name, value)
        patch.setattr(own, "_queued_calls", list(own._queued_calls))
        patch.setattr(own, "default_generators", ())
        patch.setattr(torch.version, "cuda", ".".join(map(str, self.build.cuda)) if self.build.cuda else None)
        patch.setattr(torch, "__version__", self.build.version)
        if self.build.cuda is None:
            return
        current = [0]

        def set_device(number: int) -> None:
            self._started()
            if number >= len(self.seen or []):
                raise RuntimeError("CUDA error: invalid device ordinal")
            current[0] = number

        def limit(fraction: float, number: int) -> None:
            self.fractions[number] = fraction

        below = {
            "_cuda_getDeviceCount": lambda: len(self._started()),
            "_cuda_init": lambda: self._init(patch),
            "_cuda_setDevice": set_device,
            "_cuda_getDevice": lambda: current[0],
            "_cuda_getArchFlags": lambda: " ".join(self.codes),
            "_cuda_setMemoryFraction": limit,
            "_cuda_memoryStats": lambda number: {"reserved_bytes": {"all": {"current": 2**21}}},
        }
        for name, function in below.items():
            patch.setattr(torch._C, name, function, raising=False)
        zeros = torch.zeros

        def made(*size: int, device: torch.device | None = None, **options: Any) -> torch.Tensor:
            if device is None or device.type != "cuda":
                return zeros(*size, device=device, **options)
            torch.cuda.get_device_properties(device)
            self.contexts.append(device)
            return zeros(*size, **options)

        patch.setattr(torch, "zeros", made)

    def _started(self) -> list[tuple[FakeCard, str | None]]:
        """The driver reads the environment when it starts, and never again."""
        if self.seen is None:
            self.seen = self.visible(os.environ) if self.works() else []
        return self.seen

    def _init(self, patch: pytest.MonkeyPatch) -> None:
        if not self._started():
            raise RuntimeError("No CUDA GPUs are available")
        patch.setattr(torch.cuda, "_get_device_properties", self._properties, raising=False)
        patch.setattr(torch.cuda, "default_generators", tuple(torch.Generator() for _ in self._started()))

    def _properties(self, number: int) -> Any:
        card, _ = self._started()[number]
        return SimpleNamespace(
            name=card.name,
            major=card.capability[0],
            minor=card.capability[1],
            total_memory=card.gib * GIB,
            uuid=card.uuid.removeprefix("GPU-"),
            pci_domain_id=0,
            pci_bus_id=self.cards.index(card) + 1,
            pci_device_id=0,
        )

    def _cudart(self) -> Any:
        def mem_get_info(number: int) -> tuple[int, int]:
            card, _ = self._started()[number]
            return card.gib * GIB - GIB, card.gib * GIB

        return SimpleNamespace(cudaMemGetInfo=mem_get_info) if self.build.cuda else None


class FakeNvml:
    """The NVML of a machine; handles are a card's number, or that and its instance's."""

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        """Readings that this card does not have."""
        raise AttributeError(name)

    def nvmlInit(self) -> None:  # noqa: N802  NVML's names
        if not self._machine.nvml:
            raise Refused

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return self._machine.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        if self._machine.serves is None:
            raise Refused
        return self._machine.serves[0] * 1000 + self._machine.serves[1] * 10

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._machine.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> tuple[int, int | None]:  # noqa: N802
        if self._machine.cards[index].lost:
            raise Refused
        return index, None

    def nvmlDeviceGetName(self, handle: tuple[int, int | None]) -> str:  # noqa: N802
        return self._machine.cards[handle[0]].name

    def nvmlDeviceGetUUID(self, handle: tuple[int, int | None]) -> str:  # noqa: N802
        card = self._machine.cards[handle[0]]
        return card.uuid if handle[1] is None else (card.instances or ())[handle[1]]

    def nvmlDeviceGetMigMode(self, handle: tuple[int, int | None]) -> list[int]:  # noqa: N802
        return [int(self._machine.cards[handle[0]].instances is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: tuple[int, int | None]) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(  # noqa: N802
        self, handle: tuple[int, int | None], index: int
    ) -> tuple[int, int | None]:
        if index >= len(self._machine.cards[handle[0]].instances or ()):
            raise Refused
        return handle[0], index

    def nvmlDeviceGetGpuInstanceId(self, handle: tuple[int, int | None]) -> int:  # noqa: N802
        return (handle[1] or 0) + 1

    def nvmlDeviceGetComputeInstanceId(self, handle: tuple[int, int | None]) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: tuple[int, int | None], version: int = 1) -> Any:  # noqa: N802
        card = self._machine.cards[handle[0]]
        size = (card.gib // 8 if card.instances else card.gib) * GIB
        return SimpleNamespace(total=size, used=GIB, free=size - GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: tuple[int, int | None]) -> tuple[int, int]:  # noqa: N802
        return self._machine.cards[handle[0]].capability

    def nvmlDeviceGetPciInfo(self, handle: tuple[int, int | None]) -> Any:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{handle[0] + 1:02X}:00.0".encode())
