"""Units: the smallest parts of a model that peft merges at once, an adapted layer or a module that is trained whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from studio.core.errors import BadInput
from studio.jobs.base.weights.skeleton import clean_name

Read = Callable[[str], Tensor]
"""Returns a parameter of the base by its name in memory."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A wrapper that the adapter put around a module of the base.

    Attributes:
        name: The wrapped module's name in the base.
        wrapper: peft's module.
        inner: The base's module inside; its parameters are on the meta device, except those that the adapter brings.
        parameters: Names in memory of all parameters of the wrapped module.
    """

    name: str
    wrapper: nn.Module
    inner: nn.Module
    parameters: tuple[str, ...]


def find_units(adapted: PeftModel) -> list[Unit]:
    """Return all units of a model, in the order of its modules.

    Raises:
        BadInput: Wrappers are nested in a way that is not understood.
    """
    units: list[Unit] = []
    outer = ""
    for path, module in adapted.base_model.model.named_modules():
        if outer and path.startswith(outer):  # whatever is inside a module follows it at once
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            outer = f"{path}."
            inner, name = _inner(module, path), clean_name(path)
            names = tuple(f"{name}.{local}" for local, _ in inner.named_parameters())
            units.append(Unit(name, module, inner, names))
    return units


def merge_unit(unit: Unit, read: Read) -> dict[str, Tensor]:
    """Return the merged fp32 parameters of a unit by name in memory; the unit itself stays unmerged.

    Args:
        unit: What to merge.
        read: Returns the base's parameters.
    """
    with filled(unit, read), torch.no_grad():
        merged = _merged(unit.wrapper)
        return {f"{unit.name}.{path}": parameter.detach() for path, parameter in merged.named_parameters()}


@contextmanager
def filled(unit: Unit, read: Read) -> Iterator[None]:
    """Give the base's module inside a unit its weights in fp32, and take them back at the end."""
    before = dict(unit.inner.named_parameters())
    for path, parameter in before.items():
        if not parameter.is_meta:
            put(unit.inner, path, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        elif not isinstance(unit.wrapper, ModulesToSaveWrapper):  # which uses its own copy instead of the base's
            put(unit.inner, path, nn.Parameter(read(f"{unit.name}.{path}").float(), requires_grad=False))
    try:
        yield
    finally:
        for path, parameter in before.items():
            put(unit.inner, path, parameter)
        for module in unit.wrapper.modules():
            if isinstance(module, BaseTunerLayer):
                # Unmerging would subtract the delta again; here the weights were only lent, so the note of it suffices.
                module.merged_adapters = []
                getattr(module, "_caches", {}).clear()


def put(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Replace one parameter of a module; other modules that share the old one keep it.

    Args:
        module: The module that has the parameter, itself or inside.
        path: The parameter's name in the module.
        parameter: The new one.
    """
    owner, _, leaf = path.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter


def _merged(wrapper: nn.Module) -> nn.Module:
    special = getattr(wrapper, "unload_and_optionally_merge_module", None)
    if special is not None:
        merged: nn.Module = special(merge=True, safe_merge=False, adapter_names=None)
        return merged
    layer: Any = wrapper
    layer.merge(safe_merge=False)
    base: nn.Module = layer.get_base_layer()
    return base


def _inner(wrapper: nn.Module, path: str) -> nn.Module:
    if isinstance(wrapper, ModulesToSaveWrapper):
        inner: Any = wrapper.original_module
    else:
        inner = getattr(wrapper, "token_adapter", wrapper)
        while isinstance(inner, BaseTunerLayer):
            inner = inner.base_layer
    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in inner.modules()):
        raise BadInput(f"the adapter changes {path} in two ways at once; such a merge is not known to be right.")
    module: nn.Module = inner
    return module
