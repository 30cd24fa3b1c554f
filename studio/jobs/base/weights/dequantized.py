"""The base as a QLoRA adapter saw it while it was trained: quantised to 4 bits and back.

Measured on one adapter: merged into this, the result is closest to the model of the training run (KL .0006 against
.377 for the 16-bit original), and has the higher task loss of the two. It must not be quantised again (KL 1.99).
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from studio.jobs.base.load import FourBit

Change = Callable[[str, Tensor], Tensor]
"""Changes a parameter of the base, by its name in memory, before the adapter is added."""


def quantised_parameters(clean: PreTrainedModel, skip: Collection[str] = ()) -> frozenset[str]:
    """Return the names of the weights that `from_pretrained` would put into 4 bits: linear layers but the head.

    Args:
        clean: The model's structure.
        skip: Modules that stay in 16 bit (`FourBit.skip`).
    """
    return _quantised(clean, skip, nn.Linear)


def turned_parameters(clean: PreTrainedModel, skip: Collection[str] = ()) -> frozenset[str]:
    """Return the weights that are stored `[in, out]` (GPT-2's Conv1D), which 4-bit loading turns before it quantises.

    Args:
        clean: The model's structure.
        skip: Modules that stay in 16 bit (`FourBit.skip`).
    """
    return _quantised(clean, skip, Conv1D)


def _quantised(clean: PreTrainedModel, skip: Collection[str], kind: type[nn.Module]) -> frozenset[str]:
    left_alone = [*get_keys_to_not_convert(clean), *skip]
    return frozenset(
        f"{name}.weight"
        for name, module in clean.named_modules()
        if isinstance(module, kind) and should_convert_module(name, left_alone)
    )


def through_four_bits(quant: FourBit, compute: torch.dtype) -> Change:
    """Return what quantising does to a weight.

    Args:
        quant: The 4-bit form.
        compute: The format that the run held its other weights in, and computed in.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: PLC0415  only this merge needs it

    def change(name: str, weight: Tensor) -> Tensor:
        packed, state = quantize_4bit(
            weight.to(compute).contiguous(), quant_type=quant.quant_type, compress_statistics=quant.double_quant
        )
        back: Tensor = dequantize_4bit(packed, state)
        return back

    return change
