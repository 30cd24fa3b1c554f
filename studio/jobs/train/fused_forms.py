"""Norms and rotary positions with fewer kernels, in place of what transformers writes out operator by operator.

A norm as Llama has it is eight operators forward and thirteen backward, and keeps its input in fp32; torch has one
kernel for each way, which keeps the input as it is and a number per row. Queries and keys are turned by three operators
instead of five, and by three instead of nine on the way back. Both are put only where the family's own code is Llama's
to the byte, so that a family that does anything else keeps what it has. Layers that torch compiles run as written
(`unfuse_forms`): the compiler fuses them itself. Without CUDA a norm is computed by transformers' own formula and keeps
as little.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama as llama

_aten = torch.ops.aten
_ROTATES = "apply_rotary_pos_emb"


def fuse_forms(model: nn.Module) -> None:
    """Let a model's frozen norms and its attention layers compute in fewer kernels from now on."""
    attentions: dict[Any, Callable[..., Any]] = {}
    for module in model.modules():
        kind = type(module)
        if _same_code(kind.forward, llama.LlamaRMSNorm.forward):
            if not cast(Any, module).weight.requires_grad:
                module.forward = MethodType(_normed, module)
        elif _rotates_as_llama(module):
            if kind not in attentions:
                attentions[kind] = _with_turned(inspect.unwrap(kind.forward))
            module.forward = MethodType(attentions[kind], module)


def unfuse_forms(model: nn.Module) -> Callable[[], None]:
    """Let a model's norms and attention layers run as transformers wrote them; return what fuses them again."""
    for module in model.modules():
        forward = vars(module).get("forward")
        function = forward.__func__ if isinstance(forward, MethodType) else None
        if function is _normed or getattr(function, "__globals__", {}).get(_ROTATES) is turned:
            del module.forward
    return partial(fuse_forms, model)


def _same_code(one: Any, other: Any) -> bool:
    """Return whether two functions do the same: bytecode, names and constants, docstrings left out."""
    codes = [getattr(inspect.unwrap(function), "__code__", None) for function in (one, other)]
    if None in codes:
        return False
    first, second = (
        (code.co_code, code.co_names, code.co_varnames, [c for c in code.co_consts if not isinstance(c, str)][1:])
        for code in cast(Any, codes)
    )
    return bool(first == second)


def _rotates_as_llama(module: nn.Module) -> bool:
    """Return whether an attention layer turns whole heads by the function that Llama has."""
    forward = inspect.unwrap(type(module).forward)
    known = getattr(forward, "__globals__", {})
    if _ROTATES not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    if not all(_same_code(known.get(name), getattr(llama, name)) for name in (_ROTATES, "rotate_half")):
        return False
    if hasattr(module, "kv_lora_rank"):
        return False  # latent attention turns a part of each head
    said = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    return float(said.get("partial_rotary_factor", 1.0)) == 1.0


def _with_turned(forward: Any) -> Callable[..., Any]:
    """Return a layer's own forward, to which the name of the function that turns means ours."""
    known = {**forward.__globals__, _ROTATES: turned}
    made = FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def norm_by_kernel(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """Return an RMS norm of x and what x was multiplied by, fp32 `[.., 1]`; None where torch has no kernel for it."""
    if x.device.type != "cuda" or x.dtype != weight.dtype or not hasattr(_aten, "_fused_rms_norm"):
        return None
    return cast(tuple[Tensor, Tensor], _aten._fused_rms_norm(x, [x.shape[-1]], weight, eps))


def _normed(module: Any, hidden_states: Tensor) -> Tensor:
    normed: Tensor = cast(Any, _RmsNorm).apply(hidden_states, module.weight, module.variance_epsilon)
    return normed


class _RmsNorm(torch.autograd.Function):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, the mean in fp32, for a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        by_kernel = norm_by_kernel(x, weight, eps)
        ctx.fused = by_kernel is not None
        if by_kernel is not None:
            out, inverse = by_kernel
        else:
            wide = x.to(torch.float32)
            inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            out = weight * _scaled(x, wide, inverse).to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if ctx.fused:
            made = _aten._fused_rms_norm_backward(gradient, x, [x.shape[-1]], inverse, weight, [True, False])
            return made[0], None, None
        normed = _scaled(x, x.to(torch.float32), inverse)
        of_normed = _scaled(gradient, gradient.to(torch.float32), weight)
        along = (of_normed * normed).mean(-1, keepdim=True)
        return of_normed.sub_(normed.mul_(along)).mul_(inverse).to(x.dtype), None, None


def _scaled(x: Tensor, wide: Tensor, factor: Tensor) -> Tensor:
    """Return `wide * factor`, over `wide` itself where that is a copy of x."""
    return x * factor if wide is x else wide.mul_(factor)


def turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by their positions, each `[batch, heads, seq, head_dim]`.

    Args:
        query: `[batch, heads, seq, head_dim]`.
        key: `[batch, key-value heads, seq, head_dim]`.
        cos: `[batch, seq, head_dim]`, both halves alike.
        sin: Like `cos`.
        unsqueeze_dim: The dimension of the heads.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    run = cast(Any, _Turned).apply
    return run(query, cos, sin), run(key, cos, sin)


class _Turned(torch.autograd.Function):
    """`x * cos + rotate_half(x) * sin`; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(gradient, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    out, half = x * cos, x.shape[-1] // 2
    # cos and sin repeat their halves, so that turning back is turning by the negative.
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-way)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=way)
    return out
