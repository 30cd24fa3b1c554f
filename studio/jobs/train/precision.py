"""Which number formats a run computes in, and the autocast and gradient scaler that go with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from studio.core.recipe import Dtype

_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Precision:
    """The 16- or 32-bit format of weights and arithmetic on one device. Adapters and optimizer state stay fp32."""

    name: str
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of frozen weights and matrix products."""
        return _TORCH[self.name]

    @property
    def autocast(self) -> Callable[[], Any]:
        """A maker of autocast contexts; does nothing for fp32."""
        return lambda: torch.autocast(self.device_type, dtype=self.dtype, enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Return a loss scaler: at work for fp16, whose gradients underflow without it, and idle otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(wanted: Dtype, device: torch.device) -> Precision:
    """Return what was asked for; `auto` is bf16 where the device computes in it natively, else fp16 (CUDA), fp32 (CPU).

    bf16 before fp16: the QLoRA authors' README says that only 80 % of 7B runs with fp16 finish without error.
    """
    if wanted != "auto":
        return Precision(wanted, device.type)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision("bf16" if native else "fp16", device.type)
    return Precision("bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32", device.type)
