"""Where an audit computes."""

import torch


def device_of() -> torch.device:
    """Return where blocks are run: the first CUDA card, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
