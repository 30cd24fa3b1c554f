"""A frozen linear layer and the low-rank pair beside it as one function, with few kernels and nothing kept twice.

With x `[tokens, in]`, the frozen weight W `[out, in]`, A `[rank, in]`, B `[out, rank]` and the scaling s, the output is
`x W^T + s (x A^T) B^T`. peft makes it of eight operators: it clones the frozen product of a 4-bit weight, and makes the
pair's product, its scaled copy and the sum, each as large as the output. Here the second product is added to the first
as it is made, s is a factor of a product's kernel, and A and B are cast to 16 bits together. What the backward reads
goes through `save_for_backward`, the weight's packed form and its scales included, so that a checkpoint sees all of it.
bitsandbytes keeps its weight on the context, where a checkpoint that computes a layer again does not look.

What only peft's own forward knows stays with it: DoRA, merged and switched-off adapters, several adapters at once, and
layers that torch compiles.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import bnb as peft_bnb
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from studio.core.vram.setup import PRODUCT_BY_KERNEL
from studio.jobs.base.eight_bit import EightBitLinear, dequantised, held_in_eight_bits
from studio.jobs.base.streaming.four_bit import tensors_of, with_tensors


class AdaptedLinear(peft_layer.Linear):  # type: ignore[misc]
    """peft's layer beside a plain weight, with one function for both products."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output `[.., out]` for x `[.., in]`."""
        dtype = _format_of_products(self, x) if not (args or kwargs) else None
        return super().forward(x, *args, **kwargs) if dtype is None else _adapted(self, x, dtype, dtype)


class AdaptedLinear4bit(peft_bnb.Linear4bit):  # type: ignore[misc]
    """peft's layer beside a 4-bit weight, with one function for both products.

    Attributes:
        keeps: Whether the dequantised weight is saved for the backward, which else dequantises again. For layers inside
            a checkpoint: their first forward saves nothing, and what is computed again goes backward at once.
    """

    keeps = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output `[.., out]` for x `[.., in]`, in the format of x, as bitsandbytes does."""
        dtype = _format_of_products(self, x) if not (args or kwargs) else None
        return super().forward(x, *args, **kwargs) if dtype is None else _adapted(self, x, dtype, x.dtype)


class AdaptedLinear8bit(peft_bnb.Linear8bitLt):  # type: ignore[misc]
    """The same beside an 8-bit weight."""

    keeps = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output `[.., out]` for x `[.., in]`, in the format of x."""
        dtype = _format_of_products(self, x) if not (args or kwargs) else None
        return super().forward(x, *args, **kwargs) if dtype is None else _adapted(self, x, dtype, x.dtype)


_OURS = {
    peft_layer.Linear: AdaptedLinear,
    peft_bnb.Linear4bit: AdaptedLinear4bit,
    peft_bnb.Linear8bitLt: AdaptedLinear8bit,
}


def join_products(model: PeftModel) -> PeftModel:
    """Let a model's adapted linear layers compute both products in one function; return the same model."""
    for module in model.modules():
        ours = _OURS.get(type(module))
        if ours is not None and type(module.base_layer) in (nn.Linear, Linear4bit, EightBitLinear, Conv1D):
            # peft makes such a layer itself; its hooks for classes of others go by the class of the frozen layer.
            module.__class__ = ours
    return model


def keep_dequantised(layer: nn.Module) -> int:
    """Let the adapted quantised layers of a checkpointed module keep what they dequantise; return how many do."""
    found = [module for module in layer.modules() if isinstance(module, AdaptedLinear4bit | AdaptedLinear8bit)]
    for module in found:
        module.keeps = True
    return len(found)


def _format_of_products(layer: Any, x: Tensor) -> torch.dtype | None:
    """Return the number format of both products; None where peft's own forward has to run."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or torch.compiler.is_compiling():
        return None
    if active[0] not in layer.lora_A or active[0] in layer.lora_variant:
        return None
    kind, weight = x.device.type, layer.base_layer.weight
    held: torch.dtype = weight.dtype if weight.is_floating_point() else layer.base_layer.compute_dtype
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return wanted if wanted == held else None


def _adapted(layer: Any, x: Tensor, compute: torch.dtype, result: torch.dtype) -> Tensor:
    name: str = layer.active_adapters[0]
    into, back = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = layer.lora_dropout[name]
    dropped = dropout(x).to(compute) if layer.training and getattr(dropout, "p", 0.0) > 0 else None
    keeps = getattr(layer, "keeps", False) and layer.training and torch.is_grad_enabled()
    how = layer.base_layer, layer.scaling[name], keeps
    made: Any = cast(Any, _Adapted).apply(x.to(compute), dropped, into, back, how)
    return cast(Tensor, made.to(result))


class _Adapted(torch.autograd.Function):
    """Both products, forward and backward, outside of autocast: every tensor comes in the format of products."""

    @staticmethod
    def forward(  # noqa: PLR0917  autograd passes arguments by position
        ctx: Any, x: Tensor, dropped: Tensor | None, into: Tensor, back: Tensor, how: tuple[Any, float, bool]
    ) -> Tensor:
        base, scaling, keeps = how
        rows = x.reshape(-1, x.shape[-1])
        read = rows if dropped is None else dropped.reshape(rows.shape)
        wants_x, wants_dropped = ctx.needs_input_grad[:2]
        state = getattr(base.weight, "quant_state", None)
        keeps = keeps and wants_x and _dequantises(state, rows)
        whole = matrix_of(state, held_tensors(base.weight), rows.dtype) if keeps else None
        with torch.autocast(x.device.type, enabled=False):
            made: Tensor = base(rows) if whole is None else _product(rows, whole, base.bias)
            first, second = _cast((into, back), x.dtype)
            # With a beta of 0 what is added is not read, only its shape must fit.
            narrow = torch.addmm(read[:1, :1], read, first.t(), beta=0, alpha=scaling)
            made.addmm_(narrow, second.t())
        held = () if not wants_x else held_tensors(base.weight) if whole is None else (whole,)
        # Without its tensors, which may lie in a buffer that another layer has by then.
        ctx.form = None if state is None or whole is not None else with_tensors(state, repeat(None))
        ctx.turned, ctx.scaling, ctx.shape = type(base) is Conv1D, scaling, x.shape
        ctx.save_for_backward(read, narrow, second, first if wants_x or wants_dropped else None, *held)
        # Not a view, which nobody could write into (Llama 4 adds to its shared expert's output in place).
        return cast(Tensor, torch.ops.aten._unsafe_view(made, [*x.shape[:-1], made.shape[-1]]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, narrow, second, first, *held = ctx.saved_tensors
        wants_x, wants_dropped, *wants_factors = ctx.needs_input_grad[:4]
        of_made = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_dropped = of_into = of_back = None
        with torch.autocast(gradient.device.type, enabled=False):
            of_narrow = torch.addmm(of_made[:1, :1], of_made, second, beta=0, alpha=ctx.scaling)
            if any(wants_factors):
                of_into, of_back = _cast((of_narrow.t() @ read, of_made.t() @ narrow), torch.float32)
            if wants_x:
                weight = matrix_of(ctx.form, held, of_made.dtype)
                of_x = of_made @ (weight.t() if ctx.turned else weight)
                del weight
            if wants_dropped:
                of_dropped = (of_narrow @ first).reshape(ctx.shape)
            elif of_x is not None:
                of_x.addmm_(of_narrow, first)
        return None if of_x is None else of_x.reshape(ctx.shape), of_dropped, of_into, of_back, None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(rows, weight, None if bias is None else bias.to(rows.dtype))


def _dequantises(state: QuantState | None, rows: Tensor) -> bool:
    """Return whether a weight is dequantised for its product with x, into the format that it came in.

    In 8 bits, which have no state, each is; in 4 bits bitsandbytes has a kernel for a few rows.
    """
    if state is None:
        return True
    return rows.shape[0] > PRODUCT_BY_KERNEL and state.dtype == rows.dtype and state.shape[1] == rows.shape[1]


def _cast(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Return both tensors in a format, by one kernel; the tensors themselves where they have it."""
    if pair[0].dtype == dtype or pair[0].dtype == torch.float64:
        return pair
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in pair]
    torch._foreach_copy_(made, list(pair))
    return made


def held_tensors(weight: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a frozen weight: of a quantised one its packed form, its scales and its tables."""
    state = getattr(weight, "quant_state", None)
    if hasattr(weight, "SCB"):
        return held_in_eight_bits(weight)
    return (weight,) if state is None else (weight.data, *tensors_of(state))


def matrix_of(form: QuantState | None, held: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return a frozen weight as a matrix, dequantised where it is in 4 or 8 bits.

    Args:
        form: How it is quantised in 4 bits, its own tensors left out; None where it is not.
        held: The tensors that `held_tensors` returned.
        dtype: The format of the result.
    """
    packed, *more = held
    if form is None:
        return dequantised(packed, more[0], dtype) if more else packed.to(dtype)
    return cast(Tensor, dequantize_4bit(packed, with_tensors(form, iter(more))).to(dtype))
