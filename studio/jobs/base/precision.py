"""Which number formats a job computes in: asked here by every job, decided for a card in `core.gpu_catalogue`.

And the autocast and the gradient scaler that go with them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from studio.core.gpu_catalogue import emulated, sixteen_bit
from studio.core.recipe import Dtype
from studio.core.text import plain

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""torch's formats by the words of recipes and flags."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The 16- or 32-bit format of weights and arithmetic on one device. Adapters and optimizer state stay fp32."""

    name: str
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of frozen weights and matrix products."""
        return DTYPES[self.name]

    @property
    def autocast(self) -> Callable[[], Any]:
        """A maker of autocast contexts; does nothing for fp32."""
        return lambda: torch.autocast(self.device_type, dtype=self.dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler: at work for fp16, whose gradients underflow without it, and idle otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(wanted: Dtype, device: torch.device) -> Precision:
    """Return what was asked for; `auto` is a card's own 16-bit format, on a CPU bf16 where it has that, else fp32."""
    if wanted != "auto":
        return Precision(wanted, device.type)
    if device.type == "cuda":
        return Precision(half_format(device), device.type)
    return Precision("bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32", device.type)


def half_format(device: torch.device) -> Literal["bf16", "fp16"]:
    """Return the 16-bit format in which a device computes: a card's own one, and bf16 on a CPU."""
    return sixteen_bit(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


def half_dtype(device: torch.device) -> torch.dtype:
    """Return torch's name of `half_format`."""
    return DTYPES[half_format(device)]


def without_own_format(precision: Precision, device: torch.device) -> str:
    """Return what is to be said where a card computes in a format that it does not have; empty where it has it."""
    if device.type != "cuda":
        return ""
    name = plain(torch.cuda.get_device_name(device), one_line=True)
    return emulated(precision.name, name, torch.cuda.get_device_capability(device))


def steadier_format(precision: Precision, device: torch.device) -> str:
    """Return what to set where numbers left the range of a format; empty where another format has no wider range."""
    if precision.name != "fp16":
        return ""
    if device.type == "cuda" and half_format(device) != "bf16":
        return "set model.dtype to fp32, at twice the bytes (this card has no bf16 of its own)"
    return "set model.dtype to bf16, which has the range of fp32"
