"""Imitates what a CUDA card does differently from a CPU, while fake tensors whose device is "cpu" are traced.

It imitates attention by flash or memory-efficient kernels, fused dropout, autocast's longer list of fp32 operators,
optimizer state in unified memory, and what kernels take while they run. It does not know workspaces of cuDNN and
cuBLASLt, the kernels that a driver chooses at run time, or fragmentation.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from studio.core.vram.stages import CUBLAS_WORKSPACE_BYTES, HOPPER_CUBLAS_WORKSPACE_BYTES
from studio.jobs.base import attention, sinks
from studio.jobs.base.swapped import swapped
from studio.jobs.measure.storages import HOST, PAGED, Storages
from studio.jobs.train import fused_forms

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_PAGED_FROM = 100_000
"""Smallest number of elements of a state tensor that bitsandbytes pages (optim/optimizer.py get_state_buffer)."""

_IN_FP32 = {
    *("layer_norm", "native_layer_norm", "group_norm", "norm", "pow", "__pow__", "__rpow__", "exp", "expm1", "log"),
    *("log10", "log2", "log1p", "rsqrt", "reciprocal", "softplus", "cross_entropy", "nll_loss", "mse_loss"),
    *("cosh", "sinh", "tan", "acos", "asin", "erfinv"),
}
_INTO_FP32 = {"softmax", "log_softmax", "cumsum", "cumprod", "sum", "prod"}
"""Operators that autocast runs in fp32 on CUDA. It casts the inputs of `_IN_FP32`, and sets the `dtype` argument of
`_INTO_FP32` (aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE)."""


class CudaFunctions(TorchFunctionMode):
    """Lets torch's functions do on fake tensors what they would do on a card."""

    def __init__(self, storages: Storages, capability: tuple[int, int]) -> None:
        """Prepare for a card.

        Args:
            storages: Counts what is allocated.
            capability: The card's compute capability.
        """
        super().__init__()
        self._storages = storages
        self._has_flash = capability >= (8, 0)
        self.cublas_bytes = HOPPER_CUBLAS_WORKSPACE_BYTES if capability == (9, 0) else CUBLAS_WORKSPACE_BYTES
        """Bytes of both cuBLAS workspaces: the forward pass and autograd's backward thread have one each."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function as a card would."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.backward:
            # torch switches a mode off inside its own handler. But checkpointed layers are computed again inside this
            # call and need the mode, so it is switched on and the engine called directly.
            loss = args[0]
            with self:
                run = torch.autograd.Variable._execution_engine.run_backward
                return run(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if _leaves(name, args, kwargs):
            with self._storages.newborn(HOST):
                return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if name == "dropout" and _drops(*args, **kwargs):
            rate = kwargs["p"] if "p" in kwargs else args[1]
            return torch.native_dropout(kwargs.get("input", args[0] if args else None), rate, True)[0]
        if name == "softmax" and _widens(args, kwargs):
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            return _aten._softmax(kwargs.get("input", args[0] if args else None), dim, True)
        if torch.is_autocast_enabled("cpu"):
            if name in _IN_FP32:
                args, kwargs = tree_map_only(Tensor, _in_fp32, (args, kwargs))
            elif name in _INTO_FP32 and kwargs.get("dtype") is None and _is_half(args):
                kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)

    def has_grouped_kernel(self, key: Tensor) -> bool:
        """Return what `studio.jobs.base.attention.has_grouped_kernel` would return on the card."""
        return self._has_flash and (key.dtype in _HALF or torch.is_autocast_enabled("cpu"))

    def sink_kernel(self, device: torch.device, dtype: torch.dtype) -> sinks.Kernel:
        """Return what `studio.jobs.base.sinks.kernel_for` would return on the card."""
        return "flash" if self._has_flash and dtype in _HALF else "efficient"

    def _attention(  # noqa: PLR0917  the order of torch's function
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return attention `[batch, heads, seq, head_dim]` from the kernel that torch would choose.

        Flash takes 16-bit heads of at most 256 numbers without a mask, and grouped ones if `enable_gqa` is set; values
        must be as wide as keys, which those of latent attention (DeepSeek) are not. The memory-efficient kernel takes
        masks, fp32 and values of their own width, but no grouped heads. The plain one takes everything, and makes
        matrices of seq x seq (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
        """
        if torch.is_autocast_enabled("cpu"):
            lower = torch.get_autocast_dtype("cpu")
            query, key, value = (t.to(lower) if t.is_floating_point() else t for t in (query, key, value))
        half, fits = query.dtype in _HALF, query.shape[-1] <= 256 and query.shape[-1] == value.shape[-1]
        with torch.autocast("cpu", enabled=False):
            grouped = key.shape[1] != query.shape[1]
            if self._has_flash and half and fits and attn_mask is None and (enable_gqa or not grouped):
                made = _aten._scaled_dot_product_flash_attention(
                    query, key, value, dropout_p, is_causal, False, scale=scale
                )
                return cast(Tensor, made[0])
            if grouped:
                plain = _aten._scaled_dot_product_attention_math
                made = plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
                return cast(Tensor, made[0])
            mask = _additive(attn_mask, query)
            efficient = _aten._scaled_dot_product_efficient_attention
            # The kernel allocates the log-sum-exp only if a backward pass may follow.
            wanted = any(t.requires_grad for t in (query, key, value))
            return cast(Tensor, efficient(query, key, value, mask, wanted, dropout_p, is_causal, scale=scale)[0])


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask as numbers in the query's dtype, expanded to every head as the kernel needs it."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=query.dtype))
    return mask.expand(query.shape[0], query.shape[1], *mask.shape[-2:])


def _leaves(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether a function allocates in the host's memory.

    The traced card's tensors are on device "cpu" without anybody naming it. Code that names "cpu" means the host.
    """
    to_host = name == "cpu" or (name == "to" and "cpu" in (*args[1:], kwargs.get("device")))
    return to_host or bool(kwargs.get("pin_memory")) or kwargs.get("device") == "cpu"


def _norm_by_kernel(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """Make what torch's RMS norm makes, by one operator as there: its own would be written out on a CPU."""
    if x.dtype != weight.dtype:
        return None
    return x * weight, torch.empty((*x.shape[:-1], 1), dtype=torch.float32)


def _drops(_input: Any = None, p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any) -> bool:
    return 0 < p < 1 and training and not inplace


def _widens(args: Any, kwargs: Any) -> bool:
    """Return whether softmax reads fp16 and writes fp32 in one kernel (aten/src/ATen/native/SoftMax.cpp: only Half)."""
    tensor = kwargs.get("input", args[0] if args else None)
    return bool(tensor.dtype == torch.float16 and kwargs.get("dtype") == torch.float32)


def _is_half(args: Any) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].dtype in _HALF


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what CUDA kernels take while they run. Entered after `Storages`, so that results are counted first."""

    def __init__(self, storages: Storages, cublas_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = storages
        self._handle_bytes = cublas_bytes // 2
        self._has_handle = {False: False, True: False}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count its temporaries beside its results."""
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and not out.is_meta:
            self._take_handle(torch._C._current_autograd_node() is not None)
        if func in _TEMPORARIES:
            self._storages.passing(_TEMPORARIES[func](args, out))
        return out

    def _take_handle(self, in_backward: bool) -> None:
        """Count cuBLAS's workspace at the first product of each thread; it is kept for good."""
        if not self._has_handle[in_backward]:
            self._has_handle[in_backward] = True
            self._storages.lasting(self._handle_bytes)


def _dequantised(args: Any, out: Tensor) -> int:
    """Return the bytes of a 16-bit weight, and of its scales twice in fp32.

    See bitsandbytes backends/cuda/ops.py _dequant_linear_fallback.
    """
    outputs, inputs = args[2]
    scales = -(-outputs * inputs // args[4])
    return cast(int, outputs * inputs * args[0].element_size() + 2 * 4 * scales)


def _flash_backward(args: Any, out: Any) -> int:
    """Return the bytes that flash attention's backward pass takes while it runs (flash_api.cpp mha_bwd).

    These are row sums, the query's gradient in fp32 and, with grouped heads, gradients of key and value for every head.
    """
    return _flash_works(args[1], args[2])


def _flash_backward_by_token(args: Any, out: Any) -> int:
    """Return the same where tokens come before heads; of packed rows there is no batch."""
    query, key = (tensor if tensor.dim() == 4 else tensor[None] for tensor in args[1:3])
    return _flash_works(query.transpose(1, 2), key.transpose(1, 2))


def _flash_works(query: Tensor, key: Tensor) -> int:
    batch, heads, length, head_dim = query.shape
    rows, columns = -(-length // 128) * 128, -(-head_dim // 32) * 32
    sums, accumulator = 4 * batch * heads * rows, 4 * batch * heads * rows * columns
    grouped = 2 * batch * key.shape[2] * heads * head_dim * key.element_size() if key.shape[1] != heads else 0
    return int(sums + accumulator + grouped)


def _efficient_backward(args: Any, out: Any) -> int:
    """Return the bytes that memory-efficient attention's backward pass takes while it runs (attention_backward.cu).

    These are delta, and the query's gradient in fp32 if the inputs are in 16 bit.
    """
    query = args[1]
    batch, heads, length, _ = query.shape
    return int(4 * batch * heads * length + (4 * query.numel() if query.element_size() < 4 else 0))


def _of_inputs_size(args: Any, out: Any) -> int:
    return int(args[0].numel() * args[0].element_size())


_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}

_TEMPORARIES: dict[Any, Callable[[Any, Any], int]] = {
    torch.ops.bitsandbytes.gemm_4bit.default: _dequantised,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._flash_attention_backward.default: _flash_backward_by_token,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _aten._softmax_backward_data.default: _of_inputs_size,  # SoftMax.cu: grad * output
    _aten._safe_softmax.default: _of_inputs_size,  # attention.cpp: its result, once more with empty rows
    _aten.logsumexp.default: _of_inputs_size,  # ReduceOps.cpp: exp(x - max)
}


@contextmanager
def card_habits(storages: Storages, capability: tuple[int, int]) -> Iterator[None]:
    """Let everything inside the context behave as on a CUDA card, and count what its kernels take.

    Args:
        storages: Counts what is allocated.
        capability: The card's compute capability.
    """
    functions = CudaFunctions(storages, capability)

    def state_buffer(self: Any, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.is_paged or p.numel() < _PAGED_FROM:
            return torch.zeros_like(p, dtype=dtype)
        with storages.newborn(PAGED):
            return torch.zeros_like(p, dtype=dtype)

    with ExitStack() as stack:
        # Swapped because both ask a tensor for its device, which is "cpu" here.
        stack.enter_context(swapped(Optimizer8bit, "get_state_buffer", state_buffer))
        stack.enter_context(swapped(attention, "has_grouped_kernel", functions.has_grouped_kernel))
        stack.enter_context(swapped(sinks, "kernel_for", functions.sink_kernel))
        stack.enter_context(swapped(fused_forms, "norm_by_kernel", _norm_by_kernel))
        stack.enter_context(Kernels(storages, functions.cublas_bytes))
        stack.enter_context(functions)
        yield


class TracedCopies:
    """`Copies` of `studio.jobs.train.offload` for a trace, in which only sizes matter."""

    def __init__(self, storages: Storages) -> None:
        self._storages = storages

    def out(self, tensor: Tensor) -> Tensor:
        """Return the copy on the host."""
        with self._storages.newborn(HOST):
            return torch.empty_like(tensor)

    def settle(self, host: Tensor) -> None:
        """Wait for nothing."""

    def back(self, host: Tensor) -> Tensor:
        """Return the copy on the device."""
        return torch.empty_like(host)

    def arrived(self, coming: Tensor) -> Tensor:
        """Return the tensor on the device."""
        return coming
