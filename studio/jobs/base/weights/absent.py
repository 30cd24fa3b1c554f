"""A parameter that is not in memory now: what it looks like can be asked, and computing with it is an error.

torch itself multiplies by a tensor on the meta device without a word in places, and gives whatever was in the memory.
"""

from typing import Any

import torch
from torch import Tensor

_ASKED = {
    Tensor.is_floating_point, Tensor.is_complex, Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size,
    Tensor.stride, Tensor.is_contiguous,
}  # fmt: skip


class NotLent(RuntimeError):
    """A part of the model computed with the weights of a layer that it did not call."""


class Absent(torch.nn.Parameter):
    """Stands for a parameter whose numbers are elsewhere."""

    @staticmethod
    def of(parameter: Tensor) -> "Absent":
        """Return a stand-in of the same shape."""
        made: Absent = torch.Tensor._make_subclass(Absent, parameter.detach().to("meta"), require_grad=False)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about the form, refuse all else."""
        if getattr(func, "__name__", "") == "__get__" or func in _ASKED:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise NotLent("a weight was computed with that was not in memory")
