"""Which card this is, as NVML, torch, bitsandbytes and the program itself see it, and what each moment costs on it."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from studio.core.text import plain
from studio.jobs.train.memory import _nvml_handle, _own_device_bytes
from studio.probe.start import start_training
from studio.runs.status import run_status
from tests.gpu.bench import Bench, Seen, mib

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "datasets", "triton")
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
    """Print everything that tells this card and this software from others."""
    cards, driver = nvml_cards()
    seen = torch_cards()
    lines = [
        f"system    {platform.platform()}, Python {platform.python_version()} ({sys.executable})",
        f"WSL       {'yes' if is_wsl() else 'no'}",
        f"driver    {driver.get('driver') or 'no answer from NVML'}, made for CUDA {driver.get('cuda') or '-'}",
        f"torch     {torch.__version__}, built for CUDA {torch.version.cuda or '- (a build for CPUs)'}",
        f"verdict   {driver_verdict(driver.get('cuda'), torch.version.cuda)}",
        f"archs     {' '.join(torch.cuda.get_arch_list()) or '-'}",
        *(f"inherited {name}={os.environ[name]}" for name in _MASKS if name in os.environ),
        *(f"NVML {card['index']}    {card_line(card)}" for card in cards),
        *(f"torch {card['index']}   {card_line(card)}" for card in seen),
        *(f"pair      {line}" for line in pairs(cards, seen)),
        f"bitsandbytes {version('bitsandbytes')}, loaded {native_library()}",
        f"compiler  {compiler()}; Triton {installed('triton')}",
        "packages  " + "  ".join(f"{name} {installed(name)}" for name in (*PACKAGES, *OTHERS)),
    ]
    figures = {"nvml": cards, "torch": seen, "driver": driver, "versions": {n: installed(n) for n in PACKAGES + OTHERS}}
    figures |= {"torch_cuda": torch.version.cuda, "native_library": native_library(), "wsl": is_wsl()}
    if bench.rehearsed:
        return Seen(
            "a CPU in the card's place" + (", although there is a card" if cards else ""), tuple(lines), figures
        )
    assert seen, f"torch can use no card: {driver_verdict(driver.get('cuda'), torch.version.cuda)}"
    name = seen[0]["name"]
    unpaired = [line for line in pairs(cards, seen) if "not in" in line]
    assert not unpaired or not cards, f"NVML and torch name different cards: {unpaired}"
    assert has_kernels(seen[0]["capability"], torch.cuda.get_arch_list()), (
        f"this torch has no kernels for compute capability {seen[0]['capability']}: {torch.cuda.get_arch_list()}"
    )
    return Seen(f"{name}, compute capability {seen[0]['capability']}", tuple(lines), figures)


def nvml_cards(nvml: Any = None) -> tuple[list[dict[str, Any]], dict[str, str | None]]:
    """Return all cards of this machine as NVML numbers them, and the driver's versions; nothing where it is silent."""
    try:
        if nvml is None:
            import pynvml as nvml  # type: ignore[no-redef]
        nvml.nvmlInit()
    except Exception:
        return [], {}

    def ask(name: str, *words: Any) -> Any:
        try:
            value = getattr(nvml, name)(*words)
        except Exception:
            return None
        return (
            plain(value.decode() if isinstance(value, bytes) else value) if isinstance(value, (bytes, str)) else value
        )

    number = ask("nvmlSystemGetCudaDriverVersion_v2") or ask("nvmlSystemGetCudaDriverVersion")
    driver = {
        "driver": ask("nvmlSystemGetDriverVersion"),
        "cuda": f"{number // 1000}.{number % 1000 // 10}" if number else None,
    }
    cards = []
    for index in range(ask("nvmlDeviceGetCount") or 0):
        handle = ask("nvmlDeviceGetHandleByIndex", index)
        memory, mode = ask("nvmlDeviceGetMemoryInfo", handle), ask("nvmlDeviceGetMigMode", handle)
        major_minor = ask("nvmlDeviceGetCudaComputeCapability", handle)
        pci = ask("nvmlDeviceGetPciInfo", handle)
        cards.append(
            {
                "index": index,
                "name": ask("nvmlDeviceGetName", handle),
                "uuid": ask("nvmlDeviceGetUUID", handle),
                "pci": _pci(getattr(pci, "busId", None)),
                "capability": ".".join(map(str, major_minor)) if major_minor else None,
                "total_bytes": getattr(memory, "total", None),
                "used_bytes": getattr(memory, "used", None),
                "mig": None if mode is None else bool(mode[0]),
            }
        )
    return cards, driver


def torch_cards(cuda: Any = torch.cuda) -> list[dict[str, Any]]:
    """Return all cards that torch can use, as it numbers them."""
    if not cuda.is_available():
        return []
    found = []
    for index in range(cuda.device_count()):
        card = cuda.get_device_properties(index)
        uuid = str(getattr(card, "uuid", "") or "")
        bus = [getattr(card, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        found.append(
            {
                "index": index,
                "name": plain(card.name),
                "uuid": uuid if uuid.startswith(("GPU-", "MIG-")) or not uuid else f"GPU-{uuid}",
                "pci": None if None in bus else _pci("{:08x}:{:02x}:{:02x}.0".format(*bus)),
                "capability": f"{card.major}.{card.minor}",
                "total_bytes": card.total_memory,
                "mig": None,
            }
        )
    return found


def pairs(nvml: list[dict[str, Any]], seen: list[dict[str, Any]]) -> list[str]:
    """Return which of NVML's numbers is which of torch's, by UUID, or by PCI address where torch has no UUID."""
    lines = []
    for card in seen:
        same = [one for one in nvml if card["uuid"] and one["uuid"] == card["uuid"]]
        same = same or [one for one in nvml if card["pci"] and one["pci"] == card["pci"]]
        other = f"NVML {same[0]['index']}" if same else "not in NVML's list"
        lines.append(f"torch {card['index']} is {other}")
    return lines


def driver_verdict(driver: str | None, built: str | None) -> str:
    """Return in words whether a driver can run what torch was built for; CUDA runs on drivers of its major version."""
    if built is None:
        return "this torch is a build for CPUs: install one for CUDA"
    if driver is None:
        return f"NVML does not answer: whether the driver can run CUDA {built} is not known"
    if int(driver.split(".")[0]) < int(built.split(".")[0]):
        return (
            f"too old: the driver is made for CUDA {driver}, torch for {built}; update the driver or take another build"
        )
    return f"the driver's CUDA {driver} runs torch's {built}"


def has_kernels(capability: str, archs: list[str]) -> bool:
    """Whether a build has kernels for a card: of its major version up to its minor one, or code that is compiled."""
    major, minor = (int(part) for part in capability.split("."))
    for arch in archs:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("af")
        one = (int(digits[:-1]), int(digits[-1])) if digits.isdecimal() else (99, 0)
        if (kind == "sm" and one[0] == major and one[1] <= minor) or (kind == "compute" and one <= (major, minor)):
            return True
    return False


def card_line(card: dict[str, Any]) -> str:
    """Return a card in one line."""
    total = f"{card['total_bytes'] / 2**30:.1f} GiB" if card.get("total_bytes") else "memory unknown"
    mig = {True: ", MIG on", False: ", MIG off", None: ""}[card.get("mig")]
    return f"{card['name']}  {card['uuid'] or 'no UUID'}  PCI {card['pci'] or '-'}  {card['capability']}  {total}{mig}"


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


def _pci(bus: Any) -> str | None:
    if bus is None:
        return None
    text = bus.decode() if isinstance(bus, bytes) else str(bus)
    return text.lower().rjust(16, "0")


def context_bytes(bench: Bench) -> Seen:
    """What the process holds beside tensors: after the context, the first matrix product, bitsandbytes' first use."""
    device = bench.place
    moments = [("before", _held(bench))]
    torch.zeros(1, device=device)
    moments.append(("context", _held(bench)))
    one = torch.randn(256, 256, device=device)
    float((one @ one).sum())
    moments.append(("matrix product", _held(bench)))
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(one.to(torch.float16 if not bench.rehearsed else torch.float32))
    float(bnb.dequantize_4bit(packed, state).sum())
    moments.append(("bitsandbytes", _held(bench)))
    reserved = 0 if bench.rehearsed else torch.cuda.memory_reserved(device)
    told = ", ".join(f"{name} {mib(size)}" for name, size in moments)
    figures = {f"{name.replace(' ', '_')}_bytes": size for name, size in moments} | {"reserved_bytes": reserved}
    word = "rehearsed: the process's resident set" if bench.rehearsed else "what the driver counts"
    if not bench.rehearsed and moments[1][1] is not None:
        sizes = [size or 0 for _, size in moments]
        assert sizes == sorted(sizes), f"the driver counts less later: {told}"
    return Seen(f"MiB, {word}: {told}; torch reserved {mib(reserved)}", (), figures)


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


def device_chosen(bench: Bench) -> Seen:
    """A run that is started as a user starts it trains on the card that its plan is for."""
    shown = []
    for word in ("cpu",) if bench.rehearsed else ("auto", "cuda", "cuda:0"):
        paths = start_training(bench.tiny(train__steps=3, device__device=word), bench.folder / "runs")
        end = time.monotonic() + _START_SECONDS
        while run_status(paths).live and time.monotonic() < end:
            time.sleep(0.2)
        history = bench.history(paths)
        assert history.finished is not None and history.planned is not None, f"{word}: {history.failed or 'no end'}"
        plan = json.loads(paths.plan.read_text("utf-8"))
        planned, ran = (plan.get("gpu") or {}).get("name"), history.planned.device
        if word == "cpu":
            assert planned is None and ran == "cpu", (planned, ran)
            return Seen(f"rehearsed: planned for no card, trained on {ran}")
        assert planned and ran.startswith(planned), f"{word}: planned for {planned}, trained on {ran}"
        shown.append(f"{word}: {ran}")
    return Seen("; ".join(shown))
