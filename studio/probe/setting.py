"""For which plans an observation counts: the device, the method, this program, and the libraries of its jobs."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from studio import __version__
from studio.core.calibration import Setting
from studio.core.errors import StudioError
from studio.core.gpu_catalogue import find_gpu
from studio.core.text import plain

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
"""The libraries whose versions decide how many bytes and seconds a step takes."""

CPU = "cpu"

CARD_USED = "card_used_bytes"
"""Key of `plan.json`: what was in use on the card when the run was planned, before its own process existed."""

_CPU_INFO = Path("/proc/cpuinfo")


def setting_of(device: str, method: str, versions: Mapping[str, str] | None = None) -> Setting:
    """Return for which plans an observation on a device counts.

    Args:
        device: A card's name as CUDA, NVML or the catalogue has it, or `cpu`.
        method: lora or qlora.
        versions: Library versions by name; None takes the installed ones.
    """
    named = f"cpu: {processor_name()}" if device == CPU else _catalogued(device)
    known = installed_versions() if versions is None else versions
    kept = tuple(sorted((name, known[name]) for name in LIBRARIES if name in known))
    return Setting(plain(named, one_line=True, limit=120), f"studio {__version__}", method, kept)


def _catalogued(name: str) -> str:
    try:
        return find_gpu(name).name
    except StudioError:
        return name


@lru_cache(maxsize=1)
def installed_versions() -> dict[str, str]:
    """Return the installed versions of the job's libraries, read without importing them."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  20 ms, seldom needed

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def processor_name() -> str:
    """Return the processor's own name, or else its kind."""
    try:
        with _CPU_INFO.open(encoding="utf-8", errors="replace") as lines:
            named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    if named:
        return named
    import platform  # noqa: PLC0415  1 ms, seldom needed

    return platform.processor() or platform.machine() or "unknown"
