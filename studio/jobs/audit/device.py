"""Where an audit computes."""

import torch

from studio.jobs.base.device import job_device


def device_of() -> torch.device:
    """Return where blocks are run: the card that the audit was launched on, else the CPU."""
    return job_device("auto")


def wait_for(device: torch.device) -> None:
    """Return when a card has done what it was given; on a CPU that is so at any time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
