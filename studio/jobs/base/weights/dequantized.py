"""The base as a QLoRA adapter saw it in training: quantised to 4 bits and dequantised again.

Measured on one adapter: merged into this base, the result is closer to the model of the training run than if merged
into the 16-bit original (KL .0006 against .377), but has the higher task loss of the two. It must not be quantised
again (KL 1.99).
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from studio.jobs.base.experts.forms import packable
from studio.jobs.base.load import FourBit, left_alone

Change = Callable[[str, Tensor], Tensor]
"""Changes a parameter of the base, by its name in memory, before the adapter is added."""


def quantised_parameters(clean: PreTrainedModel, skip: Collection[str] = ()) -> frozenset[str]:
    """Return the names of the weights that are quantised to 4 bits when a base is loaded: linear layers and stacks.

    Args:
        clean: The model's structure.
        skip: Modules that stay in 16 bit (`FourBit.skip`).
    """
    stacks = {name for name, _ in packable(clean, left_alone(clean, skip))}
    return _quantised(clean, skip, nn.Linear) | stacks


def turned_parameters(clean: PreTrainedModel, skip: Collection[str] = ()) -> frozenset[str]:
    """Return the names of the weights stored `[in, out]` (GPT-2's Conv1D), which 4-bit loading transposes first.

    Args:
        clean: The model's structure.
        skip: Modules that stay in 16 bit (`FourBit.skip`).
    """
    return _quantised(clean, skip, Conv1D)


def _quantised(clean: PreTrainedModel, skip: Collection[str], kind: type[nn.Module]) -> frozenset[str]:
    kept = left_alone(clean, skip)
    return frozenset(
        f"{name}.weight"
        for name, module in clean.named_modules()
        if isinstance(module, kind) and should_convert_module(name, kept)
    )


def through_four_bits(quant: FourBit, compute: torch.dtype) -> Change:
    """Return a function that quantises a weight to 4 bits and dequantises it.

    Args:
        quant: The 4-bit form.
        compute: The format in which the training run held its other weights, and computed.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: PLC0415  only this merge needs it

    from studio.jobs.base.experts.stacks import packed_and_back  # noqa: PLC0415  the same

    def change(name: str, weight: Tensor) -> Tensor:
        if weight.dim() == 3:
            return packed_and_back(weight.to(compute), quant_type=quant.quant_type, double_quant=quant.double_quant)
        packed, state = quantize_4bit(
            weight.to(compute).contiguous(), quant_type=quant.quant_type, compress_statistics=quant.double_quant
        )
        back: Tensor = dequantize_4bit(packed, state)
        return back

    return change
