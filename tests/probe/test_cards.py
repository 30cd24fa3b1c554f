from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from studio.probe import cards as module
from studio.probe.cards import Card, CardProcess, Driver, Instance, read_cards

GIB = 2**30


class _Refusal(Exception):
    """As NVML's own errors: not supported, lost, unknown."""


class _Nvml:
    """Two cards; what a test puts into `broken` refuses to answer, for all cards or for one."""

    nvmlMemory_v2 = 2  # noqa: N815
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *broken: str | tuple[str, int]) -> None:
        self.broken = set(broken)
        self.inits = 0
        self.shutdowns = 0

    def _answer(self, name: str, handle: int, value: Any) -> Any:
        if name in self.broken or (name, handle) in self.broken:
            raise _Refusal(name)
        return value

    def nvmlInit(self) -> None:  # noqa: N802  NVML's names
        self.inits += 1
        self._answer("init", -1, None)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shutdowns += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return int(self._answer("count", -1, 2))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return int(self._answer("handle", index, index))

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:  # noqa: N802
        return self._answer("mig", handle, [0, 0])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        found = [SimpleNamespace(pid=70, usedGpuMemory=2 * GIB), SimpleNamespace(pid=71, usedGpuMemory=None)]
        return self._answer("compute", handle, found)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        found = [SimpleNamespace(pid=70, usedGpuMemory=1 * GIB), SimpleNamespace(pid=72, usedGpuMemory=3 * GIB)]
        return self._answer("graphics", handle, found)

    def nvmlSystemGetProcessName(self, pid: int) -> bytes:  # noqa: N802
        names = {70: b"/usr/bin/python3 train.py /data/x", 71: b"C:\\Program Files\\a game.exe", 72: b"Xorg\x1b[2J"}
        return self._answer("process", pid, names[pid])

    def nvmlDeviceGetName(self, handle: int) -> bytes | str:  # noqa: N802
        return self._answer("name", handle, b"NVIDIA \x1b[31mCard" if handle else "NVIDIA GeForce RTX 4090")

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return str(self._answer("uuid", handle, f"GPU-{handle}"))

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:  # noqa: N802
        used = 3 * GIB if version == 2 else 4 * GIB
        memory = SimpleNamespace(total=24 * GIB, used=used, free=20 * GIB)
        return self._answer(f"memory{version}", handle, memory)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return self._answer("capability", handle, (8, 9))

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        return self._answer("rates", handle, SimpleNamespace(gpu=0))

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        return int(self._answer("temperature", handle, 40))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return int(self._answer("power", handle, 25_500))


def _read(*broken: str | tuple[str, int]) -> list[Card]:
    found, _ = read_cards(lambda: _Nvml(*broken))
    assert found is not None
    return found


def test_all_readings_of_a_healthy_card() -> None:
    assert _read()[0] == Card(
        index=0,
        name="NVIDIA GeForce RTX 4090",
        uuid="GPU-0",
        total_bytes=24 * GIB,
        used_bytes=3 * GIB,
        free_bytes=20 * GIB,
        capability=(8, 9),
        busy_percent=0,
        celsius=40,
        watts=25.5,
        processes=(
            CardProcess(72, r"Xorg\x1b[2J", 3 * GIB),
            CardProcess(70, "python3", 2 * GIB),
            CardProcess(71, "a game.exe", None),
        ),
        mig=False,
    )


def test_a_driver_that_tells_one_list_of_processes_is_believed() -> None:
    assert [item.pid for item in _read("graphics")[0].processes or ()] == [70, 71]
    assert [item.name for item in _read("process")[0].processes or ()] == [None, None, None]


class _CutNvml(_Nvml):
    """A card with MIG on; its second place holds an instance of 20 GiB."""

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:  # noqa: N802
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, index: int) -> int:  # noqa: N802
        if index != 1 or "instances" in self.broken:
            raise _Refusal
        return 99

    def nvmlDeviceGetGpuInstanceId(self, handle: int) -> int:  # noqa: N802
        return 5

    def nvmlDeviceGetComputeInstanceId(self, handle: int) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:  # noqa: N802
        if handle != 99:
            return SimpleNamespace(total=80 * GIB, used=0, free=80 * GIB)
        return SimpleNamespace(total=20 * GIB, used=1 * GIB, free=19 * GIB)


def test_a_process_gets_one_instance_of_a_card_that_is_cut() -> None:
    card = (read_cards(_CutNvml)[0] or [])[0]
    assert (card.mig, card.total_bytes, card.free_bytes) == (True, 20 * GIB, 19 * GIB)
    assert card.instances == (Instance("GPU-99", (5, 0), 20 * GIB, 1 * GIB, 19 * GIB),)
    without = (read_cards(lambda: _CutNvml("instances"))[0] or [])[0]
    assert (without.mig, without.total_bytes) == (True, None), "80 GiB that nobody can have are not promised"


def test_unified_memory_is_main_memory_and_only_on_chips_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    main = SimpleNamespace(total=119 * GIB, used=20 * GIB, free=99 * GIB)
    monkeypatch.setattr(module, "main_memory", lambda: main)
    monkeypatch.setattr(_Nvml, "nvmlDeviceGetName", lambda self, handle: "NVIDIA GB10" if handle else "NVIDIA A10G")
    lost, spark = _read("memory1", "memory2")
    assert (lost.unified, lost.total_bytes) == (False, None)
    assert (spark.unified, spark.total_bytes, spark.used_bytes, spark.free_bytes) == (
        True,
        119 * GIB,
        20 * GIB,
        99 * GIB,
    )


def test_a_name_cannot_command_the_terminal() -> None:
    assert _read()[1].name == r"NVIDIA \x1b[31mCard"


@pytest.mark.parametrize(
    ("broken", "fields"),
    [
        ("uuid", ["uuid"]),
        ("capability", ["capability"]),
        ("rates", ["busy_percent"]),
        ("temperature", ["celsius"]),
        ("power", ["watts"]),
        ("mig", ["mig"]),
    ],
)
def test_a_reading_that_is_not_supported_is_none_and_the_others_stay(broken: str, fields: list[str]) -> None:
    whole, card = _read()[0], _read(broken)[0]
    for field in whole.__slots__:
        wanted = None if field in fields else getattr(whole, field)
        assert getattr(card, field) == wanted


def test_an_old_driver_tells_memory_without_its_reserve() -> None:
    assert _read("memory2")[0].used_bytes == 4 * GIB


def test_a_card_that_tells_no_memory_has_no_sizes_and_no_zeros() -> None:
    card = _read("memory1", "memory2")[0]
    assert (card.total_bytes, card.used_bytes, card.free_bytes) == (None, None, None)


def test_a_lost_card_does_not_hide_the_other() -> None:
    cards = _read(("handle", 0))
    assert cards[0] == Card(0, "NVIDIA GPU")
    assert cards[1].total_bytes == 24 * GIB


@pytest.mark.parametrize("broken", ["init", "count"])
def test_without_a_working_driver_there_is_no_reading(broken: str) -> None:
    assert read_cards(lambda: _Nvml(broken)) == (None, Driver())


@pytest.mark.parametrize("broken", [(), ("count",)])
def test_a_driver_that_was_opened_is_closed(broken: tuple[str, ...]) -> None:
    nvml = _Nvml(*broken)
    read_cards(lambda: nvml)
    assert (nvml.inits, nvml.shutdowns) == (1, 1)


def test_a_missing_or_foreign_module_is_no_driver() -> None:
    def missing() -> Any:
        raise ImportError

    assert read_cards(missing) == (None, Driver())
    assert read_cards(SimpleNamespace) == (None, Driver())


def test_a_driver_says_its_version_and_the_cuda_that_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_cards(_Nvml)[1] == Driver(), "one that tells neither"
    monkeypatch.setattr(_Nvml, "nvmlSystemGetDriverVersion", lambda self: b"580.65.06", raising=False)
    monkeypatch.setattr(_Nvml, "nvmlSystemGetCudaDriverVersion", lambda self: 12040, raising=False)
    assert read_cards(_Nvml)[1] == Driver("580.65.06", (12, 4)), "an old one has the first call alone"
    monkeypatch.setattr(_Nvml, "nvmlSystemGetCudaDriverVersion_v2", lambda self: 13000, raising=False)
    assert read_cards(_Nvml)[1] == Driver("580.65.06", (13, 0))


def test_on_this_machine_the_real_library_answers_as_it_does_by_itself() -> None:
    try:
        pynvml.nvmlInit()
        counted, version = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        assert read_cards() == (None, Driver())
        return
    cards, driver = read_cards()
    assert [card.index for card in cards or ()] == list(range(counted))
    assert driver.version == version
