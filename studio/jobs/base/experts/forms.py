"""Modules of fused experts: which modules of a model they are, and how each is built. Knows no 4-bit form."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from studio.core.vram.frozen import BLOCK

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_OF_LLAMA4 = "Llama4TextExperts"
"""transformers' one class of fused experts that does not follow its own interface of experts (integrations/moe.py)."""


@dataclass(frozen=True, slots=True)
class ExpertsForm:
    """How a module of fused experts is built.

    Attributes:
        up: Name of the stack that widens: gate and up joined, or up alone.
        down: Name of the stack that narrows again.
        gated: Whether `up` holds a gate too.
        transposed: Whether a stack is `[experts, in, out]`; else it is `[experts, out, in]`.
        biased: Whether each expert has biases, `[experts, out]` under the stack's name and `_bias`.
        routes: Whether the module is told which token visits which expert; else it is given all tokens for each expert.
    """

    up: str
    down: str
    gated: bool
    transposed: bool
    biased: bool
    routes: bool

    @property
    def stacks(self) -> tuple[str, str]:
        """Names of both stacks."""
        return self.up, self.down


def form_of(module: nn.Module) -> ExpertsForm | None:
    """Return how a module of fused experts is built; None for any other module, or one with a form not known here."""
    held: Any = module
    up = next((name for name in _UP if _is_stack(module, name)), None)
    if up is None or not _is_stack(module, _DOWN):
        return None
    if type(module).__name__ == _OF_LLAMA4:
        return ExpertsForm(up, _DOWN, gated=True, transposed=True, biased=False, routes=False)
    # What `use_experts_implementation` sets on every instance of a class that it decorates.
    if not all(hasattr(held, name) for name in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")):
        return None
    if held.has_post_expert_norm or held._is_expert_parallel:
        return None
    return ExpertsForm(up, _DOWN, held.has_gate, held.is_transposed, held.has_bias, routes=True)


def experts_in(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertsForm]]:
    """Yield every module of fused experts with its name and its form."""
    for name, module in model.named_modules():
        form = form_of(module)
        if form is not None:
            yield name, module, form


def shape_of(stack: Tensor) -> torch.Size:
    """Return the shape of a stack's weights `[experts, .., ..]`, however it is held."""
    state: Any = getattr(stack, "quant_state", None)
    shape: torch.Size = stack.shape if state is None else state.shape
    return shape


def _is_stack(module: nn.Module, name: str) -> bool:
    held = module._parameters.get(name)
    return held is not None and len(shape_of(held)) == 3


def can_be_packed(shape: torch.Size) -> bool:
    """Whether no block of weights that share a scale would cross from one expert to the next."""
    return shape[1] * shape[2] % BLOCK == 0


def packable(model: nn.Module, left_alone: Any) -> Iterator[tuple[str, torch.Size]]:
    """Yield the stacks that are held in 4 bits, by parameter name and shape.

    Args:
        model: The model; its parameters may be on the meta device.
        left_alone: Modules that are not quantised, as transformers names them.
    """
    for name, module, form in experts_in(model):
        if should_convert_module(name, left_alone):
            for stack in form.stacks:
                shape = shape_of(getattr(module, stack))
                # Parts of a module are named by paths too, as in `experts.down_proj`.
                if can_be_packed(shape) and should_convert_module(f"{name}.{stack}", left_alone):
                    yield f"{name}.{stack}", shape
