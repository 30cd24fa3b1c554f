"""Which card this is, as NVML, torch, bitsandbytes and the program itself see it, and what each moment costs on it."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from studio.jobs.base.device import card_used
from studio.jobs.train.memory import _nvml_handle, _own_device_bytes
from studio.launch.start import start
from studio.probe.cards import Card
from studio.probe.device import look, place_of
from studio.probe.torch_cards import driver_words, runs_on, why_unusable
from studio.runs.status import run_status
from tests.gpu.bench import GIB, Bench, Seen, Wrong, mib

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "pyarrow", "triton")
OTHERS = ("trl", "unsloth", "liger_kernel", "flash_attn", "nvidia-ml-py")
_START_SECONDS = 100.0
_MASKS = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)


def identity(bench: Bench) -> Seen:
    """Print everything that tells this card and this software from others, in the environment that was inherited."""
    sight = look()
    cards, seen, place = sight.cards or [], torch_cards(), place_of("auto", sight)
    codes = torch.cuda.get_arch_list()
    refused = [why for card in cards if (why := why_unusable(card, sight.driver, sight.build))]
    lines = [
        f"system    {platform.platform()}, Python {platform.python_version()} ({sys.executable})",
        f"WSL       {'yes' if is_wsl() else 'no'}",
        f"driver    {driver_words(sight.driver) if sight.cards else 'no answer from NVML'}",
        f"torch     {torch.__version__}, built for CUDA {torch.version.cuda or '- (a build for CPUs)'}",
        f"archs     {' '.join(codes) or '-'}",
        *(f"inherited {name}={os.environ[name]}" for name in _MASKS if name in os.environ),
        *(f"NVML {card.index}    {nvml_line(card)}" for card in cards),
        *(f"torch {index}   {card['name']}  {card['uuid']}  PCI {card['pci']}" for index, card in enumerate(seen)),
        *(f"pair      {line}" for line in pairs(cards, seen)),
        *(f"unusable  {why}" for why in refused),
        f"auto is   {place.refusal or (nvml_line(place.card) if place.card else 'the CPU')}",
        f"bitsandbytes {version('bitsandbytes')}, loaded {native_library()}",
        f"compiler  {compiler()}; Triton {installed('triton')}",
        "packages  " + "  ".join(f"{name} {installed(name)}" for name in (*PACKAGES, *OTHERS)),
    ]
    figures = {
        "nvml": [asdict(card) for card in cards],
        "torch": seen,
        "driver": {"driver": sight.driver.version, "cuda": sight.driver.cuda},
        "versions": {name: installed(name) for name in PACKAGES + OTHERS},
        "torch_cuda": torch.version.cuda,
        "archs": codes,
        "native_library": native_library(),
        "wsl": is_wsl(),
        "auto": place.card.uuid if place.card else None,
    }
    shown = Seen("", tuple(lines), figures)
    if bench.rehearsed:
        return replace(shown, said=f"a CPU in the card's place{', although there is a card' if cards else ''}")
    silent = "" if sight.cards else "no NVIDIA driver answers"
    if not seen:
        raise Wrong(f"torch can use no card: {'; '.join(refused) or place.refusal or silent or 'unknown why'}", shown)
    strange = [line for line in pairs(cards, seen) if "not in" in line]
    if cards and strange:
        raise Wrong(f"NVML and torch name different cards: {strange}", shown)
    for index, card in enumerate(seen):
        own = torch.cuda.get_device_capability(index)
        if codes and not any(runs_on(code, own) for code in codes):
            raise Wrong(f"torch has no code for {card['name']}: {codes}", shown)
    taken = nvml_line(place.card) if place.card else seen[0]["name"]
    return replace(shown, said=f"{len(seen)} card(s) for torch; {taken} is taken")


def torch_cards() -> list[dict[str, str]]:
    """Return name, UUID and PCI address of all cards that torch can use, as it numbers them."""
    if not torch.cuda.is_available():
        return []
    found = (card_used(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return [{"pci": "-", **card} for card in found]


def pairs(nvml: Sequence[Card], seen: Sequence[dict[str, str]]) -> list[str]:
    """Return which of NVML's numbers is which of torch's, by UUID, or by PCI address: an instance has its card's."""
    lines = []
    for index, card in enumerate(seen):
        same = [one for one in nvml if card["uuid"] and one.uuid == card["uuid"]]
        same = same or [one for one in nvml if one.pci and one.pci.lower().endswith(card["pci"].lower())]
        lines.append(f"torch {index} is {f'NVML {same[0].index}' if same else 'not in NVML' + chr(39) + 's list'}")
    return lines


def nvml_line(card: Card) -> str:
    """Return a card in one line."""
    total = f"{card.total_bytes / GIB:.1f} GiB" if card.total_bytes else "memory unknown"
    mig = {True: f", MIG with {len(card.instances)} instances", False: ", MIG off", None: ""}[card.mig]
    own = ".".join(map(str, card.capability)) if card.capability else "?"
    return f"{card.name}  {card.uuid or 'no UUID'}  PCI {card.pci or '-'}  capability {own}  {total}{mig}"


def is_wsl() -> bool:
    """Whether this is Windows' Linux."""
    return "microsoft" in platform.release().lower()


def native_library() -> str:
    """Return the file that bitsandbytes really loaded."""
    import bitsandbytes.cextension as native

    path = getattr(getattr(native.lib, "_lib", None), "_name", None)
    return Path(path).name if path else f"none ({type(native.lib).__name__})"


def compiler() -> str:
    """Return the C compiler's first line, and CUDA's where it is installed."""
    said = []
    for program in (os.environ.get("CC", "cc"), "nvcc"):
        path = shutil.which(program)
        if path:
            done = subprocess.run([path, "--version"], check=False, capture_output=True, text=True, timeout=20)
            said.append((done.stdout.splitlines() or [program])[0 if program != "nvcc" else -1])
    return ", ".join(said) or "none"


def installed(name: str) -> str:
    """Return a package's version, or a dash."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def context_bytes(bench: Bench) -> Seen:
    """What a process holds beside tensors: after the context, the first matrix product, bitsandbytes' first use."""
    device = bench.place
    moments: list[tuple[str, int | None]] = []

    def note(name: str) -> None:
        held, reserved = _held(bench), 0 if bench.rehearsed else torch.cuda.memory_reserved(device)
        moments.append((name, None if held is None else held - reserved))

    kept = [torch.zeros(1, device=device)]
    note("context")
    one = torch.randn(256, 256, device=device)
    kept.append(one @ one)
    note("first matrix product")
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(one.to(torch.float32 if bench.rehearsed else torch.float16))
    kept.append(bnb.dequantize_4bit(packed, state))
    note("first use of bitsandbytes")
    told = ", ".join(f"{name} {mib(size)}" for name, size in moments)
    whose = "rehearsed: the resident set" if bench.rehearsed else f"{_whose(bench)}, less what torch reserved"
    assert bench.rehearsed or all(size and size > 0 for _, size in moments), f"no reading: {told}"
    return Seen(f"MiB of {whose}: {told}", (), {f"{name.replace(' ', '_')}_bytes": size for name, size in moments})


def _held(bench: Bench) -> int | None:
    """Return the bytes of this process: on the card by NVML, or of all on it where NVML cannot tell them apart."""
    if bench.rehearsed:
        import psutil

        return int(psutil.Process().memory_info().rss)
    torch.cuda.synchronize()
    own = _own_device_bytes(_nvml_handle(bench.place))
    if own is not None:
        return own
    free, total = torch.cuda.mem_get_info()
    return total - free


def _whose(bench: Bench) -> str:
    return "all processes" if _own_device_bytes(_nvml_handle(bench.place)) is None else "this process"


def device_chosen(bench: Bench) -> Seen:
    """A run that is started as a user starts it, under the inherited mask, trains on the card that its plan is for."""
    shown = []
    for word in ("cpu",) if bench.rehearsed else ("auto", "cuda", "cuda:0"):
        paths = start(bench.tiny(train__steps=3, device__device=word), bench.folder / "runs")
        end = time.monotonic() + _START_SECONDS
        while run_status(paths).live and time.monotonic() < end:
            time.sleep(0.2)
        history = bench.history(paths)
        assert history.finished is not None and history.planned is not None, f"{word}: {history.failed or 'no end'}"
        planned, ran = json.loads(paths.plan.read_text("utf-8")).get("card"), history.planned.card
        if word == "cpu":
            assert not planned and not ran and history.planned.device == "cpu", (planned, ran)
            return Seen(f"rehearsed: planned for no card, trained on {history.planned.device}")
        assert planned and ran, f"{word}: planned for {planned}, trained on {ran}"
        assert planned["uuid"] == ran["uuid"], f"{word}: planned for {planned}, trained on {ran}"
        shown.append(f"{word}: {ran['name']} {ran['uuid']}")
    return Seen("; ".join(shown))
