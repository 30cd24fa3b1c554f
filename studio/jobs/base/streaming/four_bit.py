"""The 4-bit product of a streamed layer.

bitsandbytes' own (`MatMul4Bit`, 0.50) keeps the packed weight and its scales on `ctx`, past `save_for_backward`.
Neither checkpoints nor any other hook on saved tensors sees them there. The backward pass would read them where they
were on the way forward, in a buffer that has been filled with another layer since: right losses, wrong gradients.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor, nn


def show_products(layer: nn.Module) -> None:
    """Let the 4-bit linear maps of a decoder layer save for the backward pass what hooks can see."""
    for module in layer.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.forward = partial(_forward, module)


def tensors_of(state: QuantState) -> Iterator[Tensor]:
    """Yield the tensors beside a packed weight: scales, tables, and what the scales are quantised with."""
    yield state.absmax
    yield state.code
    if state.state2 is not None:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def with_tensors(state: QuantState, tensors: Iterator[Any]) -> QuantState:
    """Return a state like another with other tensors, in the order of `tensors_of`."""
    made: QuantState = copy.copy(state)
    made.absmax, made.code = next(tensors), next(tensors)
    if state.state2 is not None:
        made.offset, made.state2 = next(tensors), copy.copy(state.state2)
        made.state2.absmax, made.state2.code = next(tensors), next(tensors)
    return made


def parameter_of(kind: type, said: dict[str, Any], held: Tensor, state: QuantState | None) -> nn.Parameter:
    """Return a frozen parameter like another one.

    Args:
        kind: Its class.
        said: Its attributes.
        held: Its numbers.
        state: How they are quantised; None where they are not.
    """
    # Not by the constructors of 4-bit classes, which quantise; a fake tensor has no such class.
    packed = issubclass(kind, bnb.nn.Params4bit)
    made: Any = Tensor._make_subclass(kind, held, False) if packed else nn.Parameter(held, requires_grad=False)
    vars(made).update(said)
    if state is not None:
        made.quant_state = state
    parameter: nn.Parameter = made
    return parameter


def on_device(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return a frozen parameter on a device, with what belongs to a 4-bit one."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        state = with_tensors(state, (tensor.to(device) for tensor in tensors_of(state)))
    return parameter_of(type(parameter), vars(parameter), plain(parameter).to(device), state)


def plain(parameter: Tensor) -> Tensor:
    """Return a parameter's numbers as a tensor of no special class."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


def _forward(module: Any, x: Tensor) -> Tensor:
    """Do what bitsandbytes' `Linear4bit.forward` does for a weight that is quantised already."""
    if not module.compute_type_is_set:
        module.set_compute_type(x)
        module.compute_type_is_set = True
    dtype = x.dtype if module.compute_dtype is None else module.compute_dtype
    bias = None if module.bias is None else module.bias.to(dtype)
    state = module.weight.quant_state
    made: Tensor = _Product.apply(x.to(dtype), bias, state, plain(module.weight), *tensors_of(state))  # type: ignore[no-untyped-call]
    return made.to(x.dtype)


class _Product(torch.autograd.Function):
    """`x @ W.T + bias` with a frozen W in 4 bits: the arithmetic of `MatMul4Bit`, bit for bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, state: QuantState, packed: Tensor, *more: Tensor) -> Tensor:
        ctx.form = with_tensors(state, iter([None] * len(more)))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(packed, *more)
        made: Tensor = bnb.matmul_4bit(x, packed, bias=bias, quant_state=state)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, *more = ctx.saved_tensors
        weight = dequantize_4bit(packed, with_tensors(ctx.form, iter(more))).to(gradient.dtype)
        return torch.matmul(gradient, weight), None, None, None, *(None for _ in more)
