"""Where a job computes: on the card that its launcher chose (`studio.probe.device`), as torch sees it, or on the CPU.

accelerate is not asked. Its `Accelerator` returns a card without a number, which torch's memory limit refuses
(torch/cuda/memory.py set_per_process_memory_fraction). It takes MPS, XPU and others where there is no CUDA, keeps its
first answer for the whole process, and reads `ACCELERATE_*` variables.
"""

import os
from contextlib import suppress

import psutil
import torch
from torch import Tensor

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.probe.device import CHOSEN, look, visible_cards
from studio.probe.machine import spills_to_ram
from studio.probe.torch_cards import runs_on, why_unusable

NO_CARD = "no_card"
"""The kind of a failure: the card that a job was to run on cannot be used by torch."""
FLASH_CAPABILITY = (8, 0)
"""Compute capability from which flash attention runs: Ampere, Ada, Hopper. Of torch's own kernel (2.13
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and flash_attn) and of flash-attn 2 (its README) alike."""
_SPILL_MARGIN_BYTES = 256 * 2**20
"""Left free where the driver spills, for what torch does not allocate: kernels that are loaded later, bitsandbytes'
pages. The number was chosen, not measured."""
_TO_CPU = "to run on the CPU instead, ask for it: device.device = cpu in a recipe, --device cpu elsewhere"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of main memory on a device, without waiting for what the device is doing.

    torch's plain copy to a card waits until everything before it is done, so that the host could not launch ahead
    (aten/src/ATen/native/cuda/Copy.cu).
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def job_device(word: str) -> torch.device:
    """Return where the job computes: a CUDA card with its number, or the CPU; never anything else.

    A job that was launched on a card sees that card alone, whatever the word says. For a job that was started by hand,
    `cuda:N` counts as CUDA does. Where the driver spills, torch is limited to what is free on the card.

    Args:
        word: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        JobFailed: A card was chosen or asked for, and torch cannot compute on it.
    """
    chosen = os.environ.get(CHOSEN)  # None: started by hand; empty: launched on the CPU; else the card
    if word == "cpu" or chosen == "":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if chosen or word.startswith("cuda"):
            raise JobFailed(NO_CARD, f"torch finds no card: {_why()}", _TO_CPU)
        return torch.device("cpu")
    number = int(word[5:]) if chosen is None and word.startswith("cuda:") else 0
    if number >= torch.cuda.device_count():
        message = f"{word} is asked for, and torch finds {torch.cuda.device_count()} card(s)"
        raise JobFailed(NO_CARD, message, f"choose another card; {_TO_CPU}")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    _check(device, chosen)
    if (room := room_on_card(device)) is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
    return device


def room_on_card(device: torch.device) -> int | None:
    """Return the bytes that torch may take in all on a card whose driver spills into main memory (Windows, WSL).

    A job that is too large would not fail there but become many times slower, so it keeps to what is free now.

    Returns:
        What this process holds and what is free, less a margin; None on a CPU, and where the driver refuses what does
        not fit.
    """
    if device.type != "cuda" or not spills_to_ram():
        return None
    free = torch.cuda.mem_get_info(device)[0]  # this call makes the CUDA context, so `free` does not count its bytes
    return max(0, free + torch.cuda.memory_reserved(device) - _SPILL_MARGIN_BYTES)


def wait_for(device: torch.device) -> None:
    """Wait until a card has done everything that it was given; a CPU has at any time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device | None = None) -> int:
    """Return the free bytes of a card's memory, or of main memory for a CPU or without a device."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def card_used(device: torch.device) -> dict[str, str]:
    """Return what identifies a card: `name`, `uuid` and, where torch tells it, `pci`; nothing for a CPU."""
    if device.type != "cuda":
        return {}
    seen = torch.cuda.get_device_properties(device)
    chosen = os.environ.get(CHOSEN, "")
    # CUDA may report the whole card's UUID for a MIG instance of it; the launcher knows the instance's own.
    uuid = chosen if chosen.startswith("MIG-") else _uuid(device)
    card = {"name": plain(str(seen.name), one_line=True, limit=200), "uuid": uuid}
    parts = [getattr(seen, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    numbers = [part for part in parts if isinstance(part, int)]
    if len(numbers) == len(parts):
        card["pci"] = "{:08X}:{:02X}:{:02X}.0".format(*numbers)
    return card


def _uuid(device: torch.device) -> str:
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    return uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _check(device: torch.device, chosen: str | None) -> None:
    """Make sure that the card is the chosen one and that torch has code for it.

    Without this check a card that torch has no code for would fail only at the first kernel.

    Raises:
        JobFailed: It is another card, or torch has no code for it.
    """
    found = _uuid(device)
    if chosen and chosen.startswith("GPU-") and found and not found.startswith(chosen):
        message = f"the job was to run on {plain(chosen, one_line=True)}, and torch computes on {found}"
        raise JobFailed(NO_CARD, message, "report this, with the output of lora-studio doctor --imports")
    codes, own = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(device)
    if codes and not any(runs_on(code, own) for code in codes):
        message = (
            f"{torch.cuda.get_device_name(device)} has compute capability {own[0]}.{own[1]}, and torch "
            f"{torch.__version__} has code for {', '.join(codes)} only"
        )
        raise JobFailed(NO_CARD, message, f"install a torch that has (see pytorch.org); {_TO_CPU}")


def _why() -> str:
    """Return why torch finds no card: what the driver's figures explain, else torch's own message."""
    sight = look()
    for card in visible_cards(sight).cards:
        if why := why_unusable(card, sight.driver, sight.build):
            return why
    said = "it does not say why"
    with suppress(Exception):
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            said = plain(str(error).splitlines()[0] if str(error) else type(error).__name__, one_line=True, limit=300)
    return f"{said} (torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, driver {sight.driver.version})"
