"""The base as a QLoRA adapter saw it in training: quantised to 4 bits and dequantised again.

Measured on one adapter: merged into this base, the result is closer to the model of the training run than if merged
into the 16-bit original (KL .0006 against .377), but has the higher task loss of the two. It must not be quantised
again (KL 1.99).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from studio.core.layer_precision import INT8, Table, precision_at
from studio.jobs.base.experts.forms import packable
from studio.jobs.base.load import FourBit, left_alone

Change = Callable[[str, Tensor], Tensor]
"""Changes a parameter of the base, by its name in memory, before the adapter is added."""


def quantised_parameters(clean: PreTrainedModel, precision: Table = ()) -> frozenset[str]:
    """Return the names of the weights that are quantised when a base is loaded: linear layers and stacks.

    Args:
        clean: The model's structure.
        precision: What is held in other bits than 4 (`FourBit.precision`).
    """
    stacks = {name for name, _ in packable(clean, left_alone(clean, precision))}
    return _quantised(clean, precision, nn.Linear) | stacks


def turned_parameters(clean: PreTrainedModel, precision: Table = ()) -> frozenset[str]:
    """Return the names of the weights stored `[in, out]` (GPT-2's Conv1D), which quantised loading transposes first.

    Args:
        clean: The model's structure.
        precision: What is held in other bits than 4 (`FourBit.precision`).
    """
    return _quantised(clean, precision, Conv1D)


def _quantised(clean: PreTrainedModel, precision: Table, kind: type[nn.Module]) -> frozenset[str]:
    kept = left_alone(clean, precision)
    return frozenset(
        f"{name}.weight"
        for name, module in clean.named_modules()
        if isinstance(module, kind) and should_convert_module(name, kept)
    )


def through_four_bits(quant: FourBit, compute: torch.dtype) -> Change:
    """Return a function that quantises a weight to 4 bits, or 8 where the base has those, and dequantises it.

    Args:
        quant: The 4-bit form, and what is held in other bits.
        compute: The format in which the training run held its other weights, and computed.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: PLC0415  only this merge needs it

    from studio.jobs.base.eight_bit import codes_and_scales, dequantised  # noqa: PLC0415  the same
    from studio.jobs.base.experts.stacks import packed_and_back  # noqa: PLC0415  the same

    def change(name: str, weight: Tensor) -> Tensor:
        if weight.dim() == 3:
            return packed_and_back(weight.to(compute), quant_type=quant.quant_type, double_quant=quant.double_quant)
        if quant.precision and precision_at(quant.precision, name.removesuffix(".weight")) == INT8:
            return dequantised(*codes_and_scales(weight.to(compute)), compute)
        packed, state = quantize_4bit(
            weight.to(compute).contiguous(), quant_type=quant.quant_type, compress_statistics=quant.double_quant
        )
        back: Tensor = dequantize_4bit(packed, state)
        return back

    return change
