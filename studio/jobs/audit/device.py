"""Where an audit computes."""

import torch


def device_of() -> torch.device:
    """Return where blocks are run: the first CUDA card, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for(device: torch.device) -> None:
    """Return when a card has done what it was given; on a CPU that is so at any time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
