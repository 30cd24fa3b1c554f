"""The number format that a job computes in, with the autocast and the loss scaler that belong to it.

Every job asks here. Which format a card has is decided in `core.gpu_catalogue`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from studio.core.gpu_catalogue import emulated, sixteen_bit
from studio.core.recipe import Dtype
from studio.core.text import plain

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""torch's dtypes by the words of recipes and flags."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The 16- or 32-bit format of frozen weights and of products on a device. Adapter and optimizer state stay fp32."""

    name: str
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of frozen weights and matrix products."""
        return DTYPES[self.name]

    @property
    def autocast(self) -> Callable[[], Any]:
        """A function that makes autocast contexts; for fp32 they do nothing."""
        return lambda: torch.autocast(self.device_type, dtype=self.dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler. It works for fp16, whose small gradients would become 0, and does nothing otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(wanted: Dtype, device: torch.device) -> Precision:
    """Return the wanted format; `auto` is a card's own 16-bit format, and on a CPU bf16 if it has that, else fp32."""
    if wanted != "auto":
        return Precision(wanted, device.type)
    if device.type == "cuda":
        return Precision(half_format(device), device.type)
    return Precision("bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32", device.type)


def half_format(device: torch.device) -> Literal["bf16", "fp16"]:
    """Return the 16-bit format that a device computes in: a card's own, and bf16 on a CPU."""
    return sixteen_bit(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def half_dtype(device: torch.device) -> torch.dtype:
    """Return torch's name of `half_format`."""
    return DTYPES[half_format(device)]


def without_own_format(precision: Precision, device: torch.device) -> str:
    """Return a warning where a card has to emulate the format; empty where it has the format, and on a CPU."""
    if device.type != "cuda":
        return ""
    name = plain(torch.cuda.get_device_name(device), one_line=True)
    return emulated(precision.name, name, torch.cuda.get_device_capability(device))


def steadier_format(precision: Precision, device: torch.device) -> str:
    """Return advice for numbers beyond a format's range: which wider format to set; empty where there is none."""
    if precision.name != "fp16":
        return ""
    if device.type == "cuda" and half_format(device) != "bf16":
        return "set model.dtype to fp32, at twice the bytes (this card has no bf16 of its own)"
    return "set model.dtype to bf16, which has the range of fp32"
