"""Whether this machine has what a fine-tune needs: libraries, card, room, and what its own runs say of the estimate.

Versions are read from the installed packages' metadata; nothing of them is imported here. `import_libraries` imports
them in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.embedded_model import find_embedded
from studio.probe.machine import Machine
from studio.runs.store import left_over

Verdict = Literal["ok", "note", "problem"]

_PACKAGE = "lora-studio"
_LEAST_PYTHON = (3, 11)
_LEAST_DISK_BYTES, _COMFORTABLE_DISK_BYTES = 200 * 10**6, 10 * 10**9
_REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)[^;]*?(?:>=|==)\s*([0-9][0-9.]*)")
_IMPORT_SECONDS = 120.0
_IMPORTS = """
import json, torch, transformers, peft, bitsandbytes
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "cards": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "bf16": bool(cuda and torch.cuda.is_bf16_supported(including_emulation=False)),
}))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        verdict: `ok`, `note` (worth knowing, stops nothing) or `problem`.
        found: What is there, in words.
        advice: What to do; empty where nothing is.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def check_up(machine: Machine, runs_root: Path) -> list[Check]:
    """Return every check of this machine, in the order in which a person reads them.

    Args:
        machine: As it was found.
        runs_root: Where runs will lie; need not exist yet.
    """
    return [
        _python(),
        *_libraries(),
        _torch_build(machine),
        *_cards(machine),
        _memory(machine),
        _disk(machine, runs_root),
        _runs(runs_root),
        *(Check("left over", "note", left.words, left.advice) for left in left_over(runs_root)),
        _embedded(),
    ]


def import_libraries(python: str = sys.executable) -> tuple[Check, dict[str, Any] | None]:
    """Return whether torch, transformers, peft and bitsandbytes can be imported, and what torch sees of the cards.

    Takes seconds: it happens in a process of its own, so that nothing of it stays here.

    Args:
        python: The interpreter that jobs run in.
    """
    try:
        done = subprocess.run(
            [python, "-c", _IMPORTS], capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
        seen = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return Check("imports", "problem", plain(f"{type(error).__name__}: {error}", one_line=True, limit=200)), None
    if not isinstance(seen, dict):
        last = plain((done.stderr.strip().splitlines() or ["no output"])[-1], one_line=True, limit=200)
        return Check("imports", "problem", last, "install lora-studio again in a fresh environment"), None
    cards = seen.get("cards") or []
    on = f"sees {len(cards)} card(s)" if cards else "sees no card: jobs run on the CPU"
    return Check("imports", "ok", f"torch, transformers, peft and bitsandbytes import; torch {on}"), seen


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _LEAST_PYTHON:
        return Check("python", "problem", found, "Python 3.11 or newer is needed")
    return Check("python", "ok", found)


def _libraries() -> list[Check]:
    """Return a check for each library that we require, against the floor that our own metadata names."""
    try:
        lines = requires(_PACKAGE) or []
    except PackageNotFoundError:
        return [Check("libraries", "note", "lora-studio itself is not installed, so its floors are not known here")]
    checks = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match and "extra ==" not in line:
            checks.append(_library(match[1], match[2]))
    return checks


def _library(name: str, floor: str) -> Check:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, "problem", "not installed", f"pip install '{name}>={floor}'")
    if _release(found) < _release(floor):
        return Check(name, "problem", f"{found}, older than {floor}", f"pip install '{name}>={floor}'")
    return Check(name, "ok", found)


def _release(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, `2.13.0+cpu` being (2, 13, 0); trailing zeros do not count."""
    numbers = [int(part) for part in re.match(r"[0-9.]*", text)[0].split(".") if part]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _torch_build(machine: Machine) -> Check:
    try:
        found = version("torch")
    except PackageNotFoundError:
        return Check("torch build", "problem", "not installed")
    if "+cpu" in found and machine.cards:
        advice = "this torch cannot use the card: install the CUDA build from pytorch.org"
        return Check("torch build", "problem", f"{found}, built for CPUs", advice)
    if machine.cards is None:
        return Check("torch build", "ok", f"{found}; no NVIDIA driver answers, so jobs run on the CPU")
    return Check("torch build", "ok", found)


def _cards(machine: Machine) -> list[Check]:
    if machine.cards is None:
        return [Check("card", "note", "not available: no NVIDIA driver answers; plan for one with --gpu NAME")]
    if not machine.cards:
        return [Check("card", "problem", "the NVIDIA driver answers, but shows no card", "nvidia-smi should list it")]
    checks = [Check("driver", "ok", machine.driver or "version not available")]
    for card in machine.cards:
        total = f"{card.total_bytes / 2**30:.1f} GiB" if card.total_bytes else "memory not available"
        free = f", {card.free_bytes / 2**30:.1f} free" if card.free_bytes is not None else ""
        kind = " (an instance: MIG is on)" if card.mig else " (main memory)" if card.unified else ""
        others = f"; {len(card.processes)} process(es) on it" if card.processes else ""
        lost = card.total_bytes is None
        advice = "the driver does not tell its memory: give --vram-gib to plan, or look at nvidia-smi" if lost else ""
        checks.append(
            Check(f"card {card.index}", "note" if lost else "ok", f"{card.name}, {total}{free}{kind}{others}", advice)
        )
        if card.capability and card.capability < (7, 0):
            old = ".".join(map(str, card.capability))
            checks.append(
                Check(f"card {card.index}", "note", f"compute capability {old}: 4-bit training is slow there")
            )
    if machine.spills:
        advice = (
            "what does not fit spills into main memory, many times slower: training keeps to what is free on the card "
            "when it starts; device.budget_gib keeps a margin for others"
        )
        checks.append(Check("driver", "note", "Windows or WSL", advice))
    return checks


def _memory(machine: Machine) -> Check:
    if machine.ram_bytes is None:
        return Check("main memory", "note", "not available")
    free = f", {machine.free_ram_bytes / 2**30:.1f} free" if machine.free_ram_bytes is not None else ""
    return Check("main memory", "ok", f"{machine.ram_bytes / 2**30:.1f} GiB{free}; {machine.cores or '?'} cores")


def _disk(machine: Machine, runs_root: Path) -> Check:
    free = machine.disk_bytes
    if free is None:
        return Check("disk", "note", "free room not available")
    found = f"{free / 1e9:.1f} GB free for {plain(str(runs_root), one_line=True)}"
    if free < _LEAST_DISK_BYTES:
        return Check("disk", "problem", found, "a run needs 200 MB to begin: free some or use --runs-dir")
    if free < _COMFORTABLE_DISK_BYTES:
        return Check("disk", "note", found, "a merged 7 B model alone takes 14 GB")
    return Check("disk", "ok", found)


def _runs(runs_root: Path) -> Check:
    place = runs_root.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    shown = plain(str(runs_root), one_line=True)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check("runs", "problem", f"{shown} cannot be written", "choose another place with --runs-dir")
    return Check("runs", "ok", shown if place == runs_root.absolute() else f"{shown} (made by the first run)")


def _embedded() -> Check:
    try:
        find_embedded()
    except BadInput as error:
        return Check("embedded model", "note", "not installed", str(error))
    return Check("embedded model", "ok", "SmolLM2-135M-Instruct")
