"""Which of this machine's cards the installed torch can use, without importing torch here.

What torch was built for is read from its files. Only where NVML does not answer, or where CUDA alone knows the order of
the cards, is torch itself asked, in a process of its own, which takes seconds.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio.core.text import plain
from studio.probe.cards import Card, Driver

_ASK = """
import json, torch
seen = []
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    seen.append([p.name, f"GPU-{p.uuid}", p.total_memory, p.major, p.minor])
print(json.dumps(seen))
"""
_ASK_SECONDS = 60.0
_MASK, _ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_NODES = ("nvidiactl", "nvidia0", "dxg", "nvgpu", "nvhost-gpu", "nvmap")
"""Devices under /dev of a driver that CUDA can use: on a PC, under WSL, on Tegra chips."""
_LEAST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""The oldest driver on Linux for each major version of CUDA, with any minor (CUDA release notes, "CUDA Toolkit and
Minimum Required Driver Version for CUDA Minor Version Compatibility")."""
_ALONE = (53, 62, 72, 87)
"""Capabilities of integrated chips, which run only code built for exactly them (torch/cuda/__init__.py
DEVICE_REQUIREMENT)."""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What an installed torch was built for.

    Attributes:
        version: Such as `2.13.0+cu130`.
        cuda: CUDA's version, such as (13, 0); None for a build without.
        hip: ROCm's version; None for a build without.
        releases: By CUDA version, the capabilities (10 x major + minor) that the published builds of this release have
            code for; empty where the release does not say.
    """

    version: str
    cuda: tuple[int, int] | None = None
    hip: str | None = None
    releases: Mapping[tuple[int, int], frozenset[int]] = field(default_factory=dict)

    @property
    def capabilities(self) -> frozenset[int]:
        """The capabilities that this build has code for; empty where they are not known, as for an unofficial build."""
        local = self.version.partition("+")[2]
        published = "a0" not in self.version and (not local or re.fullmatch(r"cu\d+", local))
        return self.releases.get(self.cuda, frozenset()) if self.cuda and published else frozenset()

    def __str__(self) -> str:
        return f"torch {plain(self.version, one_line=True, limit=40)}"


def torch_build() -> TorchBuild | None:
    """Return what the installed torch was built for, read from its files; None where there is none to read."""
    spec = find_spec("torch")
    places = spec.submodule_search_locations if spec else None
    return read_build(Path(next(iter(places)))) if places else None


@lru_cache(maxsize=4)
def read_build(folder: Path) -> TorchBuild | None:
    """Return what a torch was built for.

    Args:
        folder: The package's folder, with `version.py` and `cuda/__init__.py` in it.
    """
    try:
        text = (folder / "version.py").read_text("utf-8")
    except (OSError, ValueError):
        return None
    version = _assigned(text, "__version__")
    if not isinstance(version, str):
        return None
    cuda, hip = _assigned(text, "cuda"), _assigned(text, "hip")
    return TorchBuild(version, numbers_of(cuda), hip if isinstance(hip, str) else None, _releases(folder))


def why_unusable(card: Card, driver: Driver, build: TorchBuild | None) -> str:
    """Return why the installed torch cannot compute on a card that the driver shows, and what would help.

    Empty where it can, and where it cannot be told from here: the job itself looks again.

    Args:
        card: As NVML shows it.
        driver: The driver of this machine.
        build: The installed torch; None where it cannot be read.
    """
    if why := _why_silent(card):
        return why
    name = plain(card.name, one_line=True, limit=80)
    if build is None:
        return ""
    if build.cuda is None:
        made_for = f"AMD's ROCm {plain(build.hip, one_line=True, limit=40)}" if build.hip else "CPUs only"
        return f"{name} cannot be used: {build} is built for {made_for}. To use it, {_install(card, driver, build)}"
    if not serves(driver, build.cuda):
        least = _LEAST_DRIVER.get(build.cuda[0])
        wanted = f"a driver of version {least[0]} or newer" if least else "a newer driver"
        return (
            f"{name} cannot be used: {build} is built for CUDA {_dotted(build.cuda)}, which needs {wanted}; the driver "
            f"here is {driver_words(driver)}. Update the driver, or {_install(card, driver, build)}"
        )
    codes = build.capabilities
    if card.capability and codes and _runs(card.capability, codes) is False:
        return (
            f"{name} is too old for this torch: it has compute capability {_dotted(card.capability)}, and {build} has "
            f"code for {_dotted(divmod(min(codes), 10))} and newer. To use it, {_install(card, driver, build)}"
        )
    return ""


def _why_silent(card: Card) -> str:
    """Return why no torch could compute on a card; empty where one could."""
    if card.uuid is None and card.total_bytes is None and card.capability is None:
        return (
            f"the driver shows card {card.index}, which answers nothing: look at nvidia-smi and the kernel's log (Xid)"
        )
    if card.mig and not card.instances and card.total_bytes is None:
        name = plain(card.name, one_line=True, limit=80)
        return f"{name} has MIG on and is cut into no instance that could be used: make one with nvidia-smi mig"
    return ""


def serves(driver: Driver, cuda: tuple[int, int]) -> bool:
    """Return whether a driver serves programs built for a CUDA version; true where that is not known.

    A driver for one minor version of CUDA serves all minor versions of the same major ("minor version compatibility").
    The CUDA version that the driver names is believed before its own version: a compatibility package, as on servers
    and Jetsons, makes it serve a newer CUDA.
    """
    if driver.cuda is not None:
        return driver.cuda[0] >= cuda[0]
    found, least = numbers_of(driver.version), _LEAST_DRIVER.get(cuda[0])
    return found is None or least is None or found >= least


def driver_words(driver: Driver) -> str:
    """Return a driver's version and the CUDA that it serves, for a message."""
    version = plain(driver.version or "", one_line=True, limit=40) or "of unknown version"
    return f"{version} (CUDA {_dotted(driver.cuda)} at most)" if driver.cuda else version


def ask_torch(python: str = sys.executable, *, masked: bool = True) -> list[Card] | None:
    """Return the cards that torch sees, in CUDA's order; None where it cannot be asked.

    A build without CUDA sees none. Any other is asked in a process of its own, which takes seconds; the answer is kept.

    Args:
        python: The interpreter that jobs run in.
        masked: Whether that process keeps `CUDA_VISIBLE_DEVICES`.
    """
    build = torch_build()
    if build is None:
        return None
    if build.cuda is None and build.hip is None:
        return []
    return _asked(python, os.environ.get(_MASK) if masked else None, os.environ.get(_ORDER))


@lru_cache(maxsize=4)
def _asked(python: str, mask: str | None, order: str | None) -> list[Card] | None:
    environment = {name: text for name, text in os.environ.items() if name not in (_MASK, _ORDER)}
    environment |= {name: text for name, text in ((_MASK, mask), (_ORDER, order)) if text is not None}
    try:
        done = subprocess.run(
            [python, "-c", _ASK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ASK_SECONDS,
            check=True,
            env=environment,
        )
        return [
            Card(index, plain(str(name), one_line=True), str(uuid), int(total), capability=(int(major), int(minor)))
            for index, (name, uuid, total, major, minor) in enumerate(json.loads(done.stdout.splitlines()[-1]))
        ]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError):
        return None


def may_have_card() -> bool:
    """Return whether there may be a card though NVML does not answer; if not, torch need not be asked."""
    return sys.platform == "win32" or any(Path("/dev", name).exists() for name in _NODES)


def numbers_of(text: object) -> tuple[int, int] | None:
    """Return the first two numbers of a version."""
    found = re.match(r"(\d+)(?:\.(\d+))?", text) if isinstance(text, str) else None
    return (int(found[1]), int(found[2] or 0)) if found else None


def runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Return whether code that torch was built with runs on a card.

    `sm_XY` is machine code for cards of the same major capability X with minor Y or newer. `compute_XY` is compiled at
    run time for any newer card. ROCm's builds name chips differently; a card that such a build has found is its own.

    Args:
        code: As `torch.cuda.get_arch_list` names it, such as `sm_86` or `compute_90a`.
        capability: The card's compute capability.
    """
    kind, _, text = code.partition("_")
    number = text.rstrip("af")
    if kind not in ("sm", "compute") or not number.isdecimal():
        return True
    own, built = 10 * capability[0] + capability[1], int(number)
    if kind == "compute":
        return own >= built
    if own in _ALONE or built in _ALONE:
        return own == built
    return own // 10 == built // 10 and own >= built


def _runs(capability: tuple[int, int], codes: frozenset[int]) -> bool | None:
    """Return whether code for some capabilities runs on a card; None for a newer card, where it may be compiled."""
    own = 10 * capability[0] + capability[1]
    if any(runs_on(f"sm_{code}", capability) for code in codes):
        return True
    return None if own > max(codes) or own in _ALONE else False


def _install(card: Card, driver: Driver, build: TorchBuild) -> str:
    """Return which torch to install for a card and the installed driver, as advice."""
    release = build.version.partition("+")[0]
    fitting = [
        cuda
        for cuda, codes in build.releases.items()
        if serves(driver, cuda) and (card.capability is None or _runs(card.capability, codes) is not False)
    ]
    if not fitting:
        return f"install a torch that suits this card and driver ({driver_words(driver)}): see pytorch.org"
    best = max([cuda for cuda in fitting if driver.cuda is None or cuda <= driver.cuda] or [min(fitting)])
    tag = f"cu{best[0]}{best[1]}"
    return (
        f"install its build for CUDA {_dotted(best)}: pip install --force-reinstall torch=={release} "
        f"--index-url https://download.pytorch.org/whl/{tag}"
    )


def _releases(folder: Path) -> dict[tuple[int, int], frozenset[int]]:
    """Return the capabilities that a release's published builds have code for, by CUDA version, from its source."""
    import platform  # noqa: PLC0415  its patterns take 4 ms, and only a refusal asks

    try:
        text = (folder / "cuda" / "__init__.py").read_text("utf-8")
        table = _assigned(text, "PYTORCH_RELEASES_CODE_CC", end=r"^\}")
        machine = "aarch64" if platform.machine().lower() in ("aarch64", "arm64") else "x86_64"
        found = {numbers_of(cuda): frozenset(by_machine[machine]) for cuda, by_machine in table.items()}
        return {cuda: codes for cuda, codes in found.items() if cuda is not None and codes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _assigned(text: str, name: str, *, end: str = r"$") -> Any:
    """Return the literal that a module's text assigns to a name; None where it does not."""
    match = re.search(rf"^{name}\b[^=\n]*=\s*(.*?{end})", text, re.MULTILINE | re.DOTALL)
    try:
        return ast.literal_eval(match[1].strip()) if match else None
    except (ValueError, SyntaxError):
        return None


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
