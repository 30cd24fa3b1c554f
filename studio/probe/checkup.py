"""Whether this machine has what a fine-tune needs: libraries, a card that torch can use, memory, room on the disk.

Also what the Hugging Face hub's client has here, and what the terminal can show. The hub is not asked.

Versions are read from the installed packages' metadata, without importing the packages. `import_libraries` imports them
in a process of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal, TextIO

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.cards import Driver
from studio.probe.device import MASK, Place, Sight, place_of
from studio.probe.embedded_model import find_embedded
from studio.probe.machine import Machine
from studio.probe.torch_cards import ask_torch, driver_words, serves, torch_build, why_unusable
from studio.runs.data_cache import MOST_BYTES, data_cache, kept_bytes
from studio.runs.store import left_over

Verdict = Literal["ok", "note", "problem"]

_PACKAGE = "lora-studio"
_LEAST_PYTHON = (3, 11)
_LEAST_DISK_BYTES, _COMFORTABLE_DISK_BYTES = 200 * 10**6, 10 * 10**9
_REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)[^;]*?(?:>=|==)\s*([0-9][0-9.]*)")
_ROOM_FOR_A_MODEL_BYTES = 16 * 10**9
_LEAST_COLUMNS, _LEAST_LINES = 80, 24
_VARIABLES_OF_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_LOGIN = (
    "open models and plans need none; gated ones (Llama, Gemma 1 to 3) and private ones do: accept the terms on the "
    "model's page, then run hf auth login, or set HF_TOKEN"
)
_OTHER_CACHE = "set HF_HOME to a folder that can be written, on a disk with room for models"
_AROUND = {"TMUX": "in tmux", "STY": "in screen", "SSH_CONNECTION": "over SSH"}
_IMPORT_SECONDS = 120.0
_IMPORTS = """
import json, torch, transformers, peft, bitsandbytes
cuda, why = torch.cuda.is_available(), ""
if not cuda:
    try:
        torch.cuda.init()
    except Exception as error:
        why = str(error)
print(json.dumps({
    "why": why,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "cards": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "codes": torch.cuda.get_arch_list(),
    "bf16": bool(cuda and torch.cuda.is_bf16_supported(including_emulation=False)),
}))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        verdict: `ok`, `note` (worth knowing, stops nothing) or `problem`.
        found: What was found, in words.
        advice: What to do; empty where there is nothing to do.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def check_up(machine: Machine, runs_root: Path) -> list[Check]:
    """Return every check of this machine, in the order in which they are shown.

    Args:
        machine: As it was found.
        runs_root: Where runs will lie; need not exist yet.
    """
    return [
        _python(),
        *_libraries(),
        _torch_build(machine),
        *_cards(machine),
        *_device(machine),
        _memory(machine),
        _disk(machine, runs_root),
        _runs(runs_root),
        _data_cache(),
        *_hub(os.environ),
        terminal_check(os.environ, shutil.get_terminal_size((0, 0)), sys.stdout),
        *(Check("left over", "note", left.words, left.advice) for left in left_over(runs_root)),
        _embedded(),
    ]


def import_libraries(machine: Machine) -> tuple[Check, dict[str, Any] | None]:
    """Return whether torch, transformers, peft and bitsandbytes can be imported, and what torch sees of the cards.

    Takes seconds: it happens in a process of its own, as a job's would begin, so that nothing of it stays here.
    """
    place = _place(machine)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORTS],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
            env={**os.environ, **place.environment},
        )
        seen = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return Check("imports", "problem", plain(f"{type(error).__name__}: {error}", one_line=True, limit=200)), None
    if not isinstance(seen, dict):
        last = plain((done.stderr.strip().splitlines() or ["no output"])[-1], one_line=True, limit=200)
        return Check("imports", "problem", last, "install lora-studio again in a fresh environment"), None
    cards = seen.get("cards") or []
    if place.card and not cards:
        said = plain(str(seen.get("why") or "it does not say why"), one_line=True, limit=200)
        found = f"torch does not see {place.card.name}, which the driver shows: {said}"
        return Check("imports", "problem", found, trouble_of(machine) or "look at the driver and what it logs"), seen
    on = f"sees {len(cards)} card(s)" if cards else "sees no card: jobs run on the CPU"
    return Check("imports", "ok", f"torch, transformers, peft and bitsandbytes import; torch {on}"), seen


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _LEAST_PYTHON:
        return Check("python", "problem", found, "Python 3.11 or newer is needed")
    return Check("python", "ok", found)


def _libraries() -> list[Check]:
    """Return a check for each required library, against the lowest version that our own metadata names."""
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


def trouble_of(machine: Machine) -> str:
    """Return why a run with device.device = auto would not start here; empty where it would.

    Args:
        machine: As it was found.
    """
    return _place(machine).refusal


def _place(machine: Machine) -> Place:
    driver = Driver(machine.driver, machine.cuda)
    return place_of(
        "auto", Sight(machine.cards, driver, torch_build(), os.environ, lambda masked: ask_torch(masked=masked))
    )


def _torch_build(machine: Machine) -> Check:
    build = torch_build()
    if build is None:
        return Check("torch build", "problem", "not installed")
    made_for = f"CUDA {'.'.join(map(str, build.cuda))}" if build.cuda else f"ROCm {build.hip}" if build.hip else "CPUs"
    found = f"{plain(build.version, one_line=True, limit=40)}, built for {made_for}"
    if machine.cards and build.cuda is None:
        return Check("torch build", "problem" if trouble_of(machine) else "note", found)
    if machine.cards is None:
        return Check("torch build", "ok", f"{found}; no NVIDIA driver answers")
    return Check("torch build", "ok", found)


def _device(machine: Machine) -> list[Check]:
    """Return on which device a run with device.device = auto goes; nothing without a card, which another check says."""
    if not machine.cards:
        return []
    place = _place(machine)
    mask = os.environ.get(MASK)
    under = "" if mask is None else f" under {MASK}={plain(mask, one_line=True, limit=60) or repr('')}"
    if place.refusal:
        return [Check("runs go to", "problem", f"no card{under}", place.refusal)]
    if place.card is None:
        return [Check("runs go to", "ok", f"the CPU{under}")]
    return [Check("runs go to", "ok", f"{place.card.name} ({place.card.uuid or place.card.index}){under}")]


def _cards(machine: Machine) -> list[Check]:
    if machine.cards is None:
        return [Check("card", "note", "not available: no NVIDIA driver answers; plan for one with --gpu NAME")]
    if not machine.cards:
        return [Check("card", "problem", "the NVIDIA driver answers, but shows no card", "nvidia-smi should list it")]
    build, driver = torch_build(), Driver(machine.driver, machine.cuda)
    served = build is None or build.cuda is None or serves(driver, build.cuda)
    trouble: Verdict = "problem" if trouble_of(machine) else "note"
    checks = [Check("driver", "ok" if served else trouble, driver_words(driver))]
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
        if why := why_unusable(card, driver, build):
            checks.append(Check(f"card {card.index}", trouble, "torch cannot use it", why))
        elif card.capability and card.capability < (7, 0):
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


def _data_cache() -> Check:
    size_bytes, folder = kept_bytes(), plain(str(data_cache()), one_line=True)
    found = f"{size_bytes / 1e9:.1f} of at most {MOST_BYTES / 1e9:.0f} GB: rows and tokens of large files, in {folder}"
    return Check("data cache", "ok", found if size_bytes else "empty")


def _hub(environment: Mapping[str, str]) -> list[Check]:
    """Return what the hub's client has here: a token, which is not shown, a cache, and leave to ask."""
    from huggingface_hub import constants, get_token  # noqa: PLC0415  0.24 s that only `doctor` pays

    token = Check("hub token", "note", "none known here", _LOGIN)
    if get_token():
        where = next((name for name in _VARIABLES_OF_TOKENS if environment.get(name)), "hf auth login")
        token = Check("hub token", "ok", f"known, from {where}; whether the hub accepts it is not asked")
    checks = [token, _hub_cache(Path(constants.HF_HUB_CACHE))]
    if constants.HF_HUB_OFFLINE:
        told = "offline mode is on (HF_HUB_OFFLINE): only models in the cache or in folders can be trained on"
        checks.append(Check("hub", "note", told))
    return checks


def _hub_cache(cache: Path) -> Check:
    shown = plain(str(cache), one_line=True)
    try:
        place = next(folder for folder in (cache, *cache.parents) if folder.exists())
        held = sum(blob.stat().st_size for blob in cache.glob("*/blobs/*") if blob.is_file())
        models = sum(1 for _ in cache.glob("models--*"))
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check("hub cache", "note", f"{shown} cannot be looked at: {error.strerror or error}", _OTHER_CACHE)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Check("hub cache", "note", f"{shown} cannot be written", _OTHER_CACHE)
    found = f"{models} model(s), {held / 1e9:.1f} GB, in {shown}; {free / 1e9:.1f} GB free on its disk"
    if free < _ROOM_FOR_A_MODEL_BYTES:
        return Check("hub cache", "note", found, f"an 8 B model takes 16 GB: {_OTHER_CACHE}")
    return Check("hub cache", "ok", found)


def terminal_check(environment: Mapping[str, str], size: os.terminal_size, stream: TextIO) -> Check:
    """Return what the terminal can show of the studio's screens.

    Args:
        environment: The environment's variables.
        size: Of the terminal, as columns and lines; zeros where there is none.
        stream: What is printed to.
    """
    term = environment.get("TERM", "")
    if not stream.isatty():
        return Check("terminal", "ok", "none here: this goes to a file or a program; the verbs work, screens want one")
    if environment.get("NO_COLOR"):
        colours = "no colours (NO_COLOR)"
    elif environment.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        colours = "16 million colours"
    else:
        colours = "256 colours" if "256" in term else "16 colours"
    around = [word for name, word in _AROUND.items() if environment.get(name)]
    found = ", ".join([f"{size.columns} x {size.lines}", colours, plain(term, one_line=True, limit=40), *around])
    if term in ("", "dumb"):
        return Check("terminal", "note", found, "TERM names no terminal: the verbs work, the screens may not be shown")
    if (stream.encoding or "").lower().replace("-", "") != "utf8":
        advice = "screens draw with UTF-8: set LANG to a UTF-8 locale such as C.UTF-8"
        return Check("terminal", "note", f"{found}, {stream.encoding}", advice)
    if size.columns < _LEAST_COLUMNS or size.lines < _LEAST_LINES:
        return Check("terminal", "note", found, "screens are made for 80 x 24 and more: make the window larger")
    return Check("terminal", "ok", found)


def _embedded() -> Check:
    try:
        find_embedded()
    except BadInput as error:
        return Check("embedded model", "note", "not installed", str(error))
    return Check("embedded model", "ok", "SmolLM2-135M-Instruct")
