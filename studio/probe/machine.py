"""What a fine-tune finds on this machine: cards, driver, memory, disk. Nothing here raises; what is unknown is None."""

import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from studio.probe.cards import Card, read_cards


@dataclass(frozen=True, slots=True)
class Machine:
    """One look at the machine.

    Attributes:
        cards: NVIDIA cards; None where no driver answers.
        driver: The NVIDIA driver's version.
        ram_bytes: Main memory in all.
        free_ram_bytes: Main memory that can be had without swapping.
        disk_bytes: Free on the disk that runs are kept on.
        cores: Cores that this process may use.
        system: Operating system in words.
        spills: Whether the driver moves what does not fit the card into main memory instead of failing (on Windows and
            WSL).
        cuda: The newest CUDA that the driver serves, such as (13, 0).
    """

    cards: list[Card] | None
    driver: str | None
    ram_bytes: int | None
    free_ram_bytes: int | None
    disk_bytes: int | None
    cores: int | None
    system: str
    spills: bool
    cuda: tuple[int, int] | None = None


def read_machine(folder: Path) -> Machine:
    """Look at the machine.

    Args:
        folder: Where runs are kept; need not exist yet.
    """
    cards, driver = read_cards()
    ram, free_ram = _ram()
    return Machine(
        cards=cards,
        driver=driver.version,
        ram_bytes=ram,
        free_ram_bytes=free_ram,
        disk_bytes=free_disk_bytes(folder),
        cores=_cores(),
        system=f"{platform.system()} {platform.release()}",
        spills=spills_to_ram(),
        cuda=driver.cuda,
    )


def spills_to_ram() -> bool:
    """Return whether the driver moves what does not fit the card into main memory, as those of Windows and WSL do."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def growing_segments() -> dict[str, str]:
    """Return the environment that lets torch's allocator grow its segments on a card, to be set before torch starts.

    Blocks that would not fit into each other's segments then join. It is left alone where somebody has said how it is
    to allocate, and under Windows and WSL, of whose drivers nobody here knows whether they can.
    """
    said = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    return {} if said or spills_to_ram() else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def free_disk_bytes(folder: Path) -> int | None:
    """Return what is free on the disk of a folder, or of its nearest parent that exists."""
    place = folder.absolute()
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        return shutil.disk_usage(place).free
    except OSError:
        return None


def ram_bytes() -> int | None:
    """Return the main memory in all; None where the system does not tell."""
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        with suppress(OSError, ValueError):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _ram()[0]


def free_ram_bytes() -> int | None:
    """Return the main memory that can be had without swapping; None where the system does not tell."""
    return _ram()[1]


def _ram() -> tuple[int | None, int | None]:
    try:
        import psutil  # noqa: PLC0415  20 ms that only this look pays

        memory = psutil.virtual_memory()
    except Exception:  # noqa: BLE001  /proc may be missing or hidden
        return None, None
    return int(memory.total), int(memory.available)


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
