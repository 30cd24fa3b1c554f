"""Fake tensors, which have no memory, for running the real training loop.

Sizes are exact, and floating-point values do not exist. Whole numbers do: token ids, masks and labels are computed
beside their fake tensors, because what is allocated depends on how many tokens are labelled and on whether anything is
masked.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import bitsandbytes.functional as bitsandbytes_functional
import torch
from peft.tuners.lora import dora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import import_utils

from studio.core.errors import JobFailed
from studio.jobs.base.experts import visits
from studio.jobs.base.swapped import swapped

_aten = torch.ops.aten
_MOST_ELEMENTS = 2**27
"""Largest tensor of whole numbers that is computed: a seq x seq mask of 11 thousand tokens."""


class Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes whole numbers, and single floating-point numbers, beside the fake tensors that stand for them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = WeakTensorKeyDictionary()

    def batch(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a batch as fake tensors; `make` makes the real ones, outside of all modes."""
        with _disable_current_modes():
            real = make()
        return {name: self.tensor(value) if isinstance(value, Tensor) else value for name, value in real.items()}

    def tensor(self, real: Tensor) -> Tensor:
        """Return the fake tensor that stands for a real one."""
        made = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)
        self._values[made] = real
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on fake tensors, and also on the real numbers if all of its inputs are known."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is _aten._amp_foreach_non_finite_check_and_unscale_.default:
            return None  # gradients are taken to be finite: found_inf stays as it is
        if func in _SHAPED_BY_VALUES:
            return self._shaped(func, args, kwargs)
        if func in _INDEXING:
            args = (args[0], self._whole_indices(args[1]), *args[2:])
        out = func(*args, **kwargs)
        self._work_out(func, args, kwargs, out)
        return out

    def _work_out(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        written = _written(func, args)
        if not all(leaf in self._values for leaf in inputs) or not all(map(_is_countable, outputs)):
            for leaf in written:
                if leaf in self._values:
                    del self._values[leaf]
            return
        values = self._values
        real_args, real_kwargs = tree_map_only(Tensor, lambda leaf: values[leaf], (args, kwargs))
        with unset_fake_temporarily():
            real = func(*real_args, **real_kwargs)
        for leaf, value in zip(outputs, (x for x in tree_iter(real) if isinstance(x, Tensor)), strict=True):
            if leaf not in written:
                values[leaf] = value

    def _scalar(self, tensor: Tensor) -> Any:
        if tensor in self._values:
            with unset_fake_temporarily():
                return self._values[tensor].item()
        # Nobody knows this value. It must not stop a guard of the loop, so it is True, or 1.
        return True if tensor.dtype == torch.bool else 1 if not tensor.is_floating_point() else 1.0

    def _whole_indices(self, indices: Any) -> Any:
        """Return indices in which each mask is replaced by the positions where it is True.

        Only then does the result's size follow from the indices' sizes.
        """
        made: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                made.append(index)
                continue
            with unset_fake_temporarily():
                positions = self._value(index).nonzero(as_tuple=True)
            made.extend(map(self.tensor, positions))
        return made

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        known = tree_map_only(Tensor, self._value, (args, kwargs)) if func is not _aten.masked_select.default else None
        with unset_fake_temporarily():
            made = func(*known[0], **known[1]) if known else torch.empty(int(self._value(args[1]).sum()), device="meta")
        return self.tensor(made) if known else torch.empty(made.shape, dtype=args[0].dtype)

    def _value(self, tensor: Tensor) -> Tensor:
        if tensor not in self._values:
            raise JobFailed(
                "not_traceable",
                "what this model allocates depends on values that only real weights give",
                "measure it on a card, or trust the wider range of `lora-studio plan`",
            )
        value: Tensor = self._values[tensor]
        return value


_SHAPED_BY_VALUES = {_aten.nonzero.default, _aten.masked_select.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}


def _written(func: Any, args: Any) -> list[Tensor]:
    declared = func._schema.arguments[: len(args)]
    written = [
        value for value, said in zip(args, declared, strict=True) if said.alias_info and said.alias_info.is_write
    ]
    return [leaf for leaf in tree_iter(written) if isinstance(leaf, Tensor)]


def _is_countable(tensor: Tensor) -> bool:
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    return tensor.numel() <= (_MOST_ELEMENTS if whole else 1)


class _OneMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A fake mode that is not copied with its tensors: peft copies modules that are trained whole."""

    def __deepcopy__(self, memo: Any) -> "_OneMode":
        return self


@contextmanager
def fake_world() -> Iterator[Numbers]:
    """Make every tensor inside the context fake; yield what turns real whole numbers into fake tensors."""
    numbers = Numbers()
    with ExitStack() as stack:
        stack.enter_context(swapped(nn.Module, "_apply", _apply))  # its docstring says why
        # transformers does not look into masks of fake tensors; here their numbers are known.
        stack.enter_context(swapped(import_utils, "is_fake_tensor", lambda tensor: False))
        # bitsandbytes caches its tables in a global: fake ones must not stay there, and real ones not be used here.
        stack.enter_context(swapped(bitsandbytes_functional, "name2qmap", {}))
        # peft recognises 4-bit weights by the name of their class, which a fake tensor cannot have.
        stack.enter_context(swapped(dora, "dequantize_module_weight", _dequantised))
        # Which experts are chosen depends on the weights' values: here all of them equally often.
        stack.enter_context(swapped(visits, "rows_by_expert", _evenly))
        stack.enter_context(swapped(visits, "visited", _as_many_as_tokens))
        stack.enter_context(_OneMode())
        stack.enter_context(numbers)
        yield numbers


def _evenly(experts: Tensor, count: int) -> list[int]:
    rows = experts.numel()
    return [rows * (number + 1) // count - rows * number // count for number in range(count)]


def _as_many_as_tokens(rows: Tensor, count: int) -> Tensor:
    return torch.arange(rows.shape[0] // count)


def _dequantised(module: nn.Module) -> Any:
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if hasattr(weight, "SCB"):
        return bitsandbytes_functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return weight if state is None else bitsandbytes_functional.dequantize_4bit(weight.data, state)


def _apply(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """Convert parameters and buffers by replacing them.

    torch's own `_apply` swaps fake tensors in place, which fails while there are weak references to them (here
    `Numbers` and `Storages` hold some).
    """
    for child in module.children() if recurse else ():
        child._apply(convert)  # type: ignore[no-untyped-call]
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                made = convert(parameter)
            if made is not parameter:
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no memory."""
    return isinstance(tensor, FakeTensor)
