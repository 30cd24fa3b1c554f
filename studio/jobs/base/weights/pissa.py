"""Turns a PiSSA adapter into one for the ordinary base.

PiSSA subtracted the initial adapter from the base. Here it is subtracted from the trained adapter instead.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def difference(weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter minus its initial values as one adapter of twice the rank: `[A; A0]` and `[B, -B0]`.

    Their product is B A - B0 A0. A is `[rank, in]`, B `[out, rank]`.
    """
    doubled: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if "lora_" not in name:
            doubled[name] = weight  # a module trained whole: nothing was subtracted from the base for it
            continue
        first = initial[name].to(weight.device, weight.dtype)
        is_second = "lora_B" in name or "lora_embedding_B" in name
        doubled[name] = torch.cat([weight, -first], dim=1) if is_second else torch.cat([weight, first], dim=0)
    return doubled


def write_difference(weights: Path, initial: Path, to: Path) -> None:
    """Write `difference` of two files of adapter tensors.

    Args:
        weights: The trained adapter.
        initial: Its initial values.
        to: The file to write.

    Raises:
        OSError: A file cannot be read or written.
    """
    save_file(difference(load_file(weights), load_file(initial)), to, metadata={"format": "pt"})
