"""A forward pass through a model whose weights stay in their files: matrices are read by rows, the rest is lent."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.jobs.base.weights.absent import Absent, NotLent
from studio.jobs.base.weights.by_rows import computing_by_rows
from studio.jobs.base.weights.checkpoint_names import CheckpointNames
from studio.jobs.base.weights.skeleton import Skeleton, build_clean, clean_name
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.base.weights.units import Read, put


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the parameters of a model come from.

    Attributes:
        read: Gives a parameter by its name in the base.
        files: Tensors, some of which are parameters.
        key_of: Names the tensor in the files that is a parameter as it is; None where it is made.
    """

    read: Read
    files: TensorFiles
    key_of: Callable[[str], str | None]


@torch.no_grad()
def streamed_logits(
    model: nn.Module,
    weights: Weights,
    ids: Tensor,
    mask: Tensor,
    prefix: str = "",
    *,
    tell: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """Return fp32 logits `[batch, seq, vocabulary]`.

    Args:
        model: Its parameters on the meta device are lent, all others are its own.
        weights: Of the base.
        ids: `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.
        prefix: What stands before the base's names inside `model`.
        tell: Gets the fraction done; may raise.

    Raises:
        NotLent: A part of the model computes with weights of another decoder layer.
    """
    by_rows = _by_rows(model, weights, prefix)

    def logits(by_rows: dict[str, tuple[nn.Module, str]]) -> Tensor:
        lending = _lending(_lent(model, prefix, by_rows), weights.read, tell)
        with lending, computing_by_rows(by_rows, weights.files):
            made: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return made.float()

    with suppress(NotLent):
        return logits(by_rows)
    return logits({})  # each decoder layer is lent all its weights


def folder_logits(
    folder: Path, ids: Tensor, mask: Tensor, tell: Callable[[float], None] = lambda fraction: None
) -> Tensor:
    """Return the fp32 logits `[batch, seq, vocabulary]` of a model folder, a few rows of its matrices in memory.

    Args:
        folder: Holds config and safetensors in 16 or 32 bit.
        ids: `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.
        tell: Gets the fraction done; may raise.

    Raises:
        BadInput: transformers cannot build this model, or a file of it is damaged.
        JobFailed: The files lack a parameter of the model.
        OSError: A file cannot be read.
    """
    clean = build_clean(folder)
    return streamed_logits(clean, _weights(clean, TensorFiles(folder)), ids, mask, tell=tell)


def adapted_logits(skeleton: Skeleton, folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the fp32 logits `[batch, seq, vocabulary]` of base + adapter, a few rows of its matrices in memory.

    Args:
        skeleton: Base and adapter as structure.
        folder: The base.
        ids: `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.

    Raises:
        BadInput: A file of the base is damaged.
        JobFailed: The files lack a parameter of the model.
        OSError: A file cannot be read.
    """
    weights = _weights(skeleton.clean, TensorFiles(folder))
    return streamed_logits(skeleton.adapted, weights, ids, mask, "base_model.model.")


def most_lent(model: nn.Module, weights: Weights, prefix: str = "") -> int:
    """Return the most elements of parameters that a pass lends at once."""
    lent = _lent(model, prefix, _by_rows(model, weights, prefix))
    return max((sum(module.get_parameter(local).numel() for local in wanted) for module, _, wanted in lent), default=0)


def _by_rows(model: nn.Module, weights: Weights, prefix: str) -> dict[str, tuple[nn.Module, str]]:
    """Find the layers that can compute from files, by path: the module and its tensor."""
    found: dict[str, tuple[nn.Module, str]] = {}
    closed = ""
    for path, module in model.named_modules():
        if closed and path.startswith(closed):  # whatever is inside a module follows it at once
            continue
        # Other wrappers of peft's use the weight of the layer inside without calling it.
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not _calls_its_layer(module):
            closed = f"{path}."
        if (type(module) is nn.Linear or isinstance(module, nn.Embedding)) and module.weight.is_meta:
            key = weights.key_of(clean_name(f"{path}.weight".removeprefix(prefix)))
            if key is not None and weights.files.tensors[key].entry.shape == module.weight.shape:
                found[path] = module, key
    return found


def _calls_its_layer(wrapper: nn.Module) -> bool:
    layer: Any = wrapper
    return type(wrapper) is Linear and not layer.lora_variant


_Lent = tuple[nn.Module, str, list[str]]
"""A module, its name in the base with a dot behind it, and which of its parameters are lent while it runs."""


def _lent(model: nn.Module, prefix: str, by_rows: dict[str, tuple[nn.Module, str]]) -> list[_Lent]:
    """Find every decoder layer and wrapper, and every module outside them that has parameters of its own."""
    lent: list[_Lent] = []
    block = ""
    for path, module in model.named_modules():
        if block and path.startswith(block):
            continue
        above = path.rpartition(".")[0]
        # A wrapper of peft's may use the weights of the module inside without calling it.
        is_wrapper = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        is_block = is_wrapper or (bool(above) and isinstance(model.get_submodule(above), nn.ModuleList))
        if is_block:
            block = f"{path}."
        names = dict(module.named_parameters(recurse=is_block, remove_duplicate=False))
        wanted = [
            local
            for local, parameter in names.items()
            if parameter.is_meta and _is_used(f"{path}.{local}") and not _is_read_by_rows(f"{path}.{local}", by_rows)
        ]
        if wanted:
            lent.append((module, f"{path}.".removeprefix(prefix), sorted(wanted)))
    return lent


def _is_used(path: str) -> bool:
    """A module saved whole takes the place of the original one, which is not called."""
    return ".original_module." not in path


def _is_read_by_rows(path: str, by_rows: dict[str, tuple[nn.Module, str]]) -> bool:
    owner, _, leaf = path.rpartition(".")
    return leaf == "weight" and owner in by_rows


@contextmanager
def _lending(lent: list[_Lent], read: Read, tell: Callable[[float], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for done, (module, place, wanted) in enumerate(lent, 1):
            for local in wanted:
                stack.callback(put, module, local, module.get_parameter(local))
            lend, take_back = _lender(module, place, wanted, read)
            take_back()
            for handle in (
                module.register_forward_pre_hook(lend),
                module.register_forward_hook(take_back, always_call=True),
                module.register_forward_hook(lambda *called, done=done: tell(done / len(lent))),
            ):
                stack.callback(handle.remove)
        yield


def _lender(
    module: nn.Module, place: str, wanted: list[str], read: Read
) -> tuple[Callable[..., None], Callable[..., None]]:
    def lend(*called: Any) -> None:
        for local in wanted:
            put(module, local, nn.Parameter(read(clean_name(place + local)).float(), requires_grad=False))

    def take_back(*called: Any) -> None:
        for local in wanted:
            put(module, local, absent[local])

    absent = {local: Absent.of(module.get_parameter(local)) for local in wanted}
    return lend, take_back


def _weights(clean: Any, files: TensorFiles) -> Weights:
    names = CheckpointNames(clean, files)
    groups = {name: group for group in names.groups for name in group.names}
    tied = getattr(clean, "all_tied_weights_keys", None) or {}

    def read(name: str) -> Tensor:
        source = name if name in groups else tied.get(name, name)
        group = groups.get(source)
        if group is None:
            raise JobFailed(
                "merged_incomplete",
                f"the model's files do not hold {plain(name, one_line=True)}",
                "merge again; if it stays so, report the model's name",
            )
        return names.load(group, {key: files.read(key) for key in group.keys})[source]

    def key_of(name: str) -> str | None:
        group = groups.get(name if name in groups else tied.get(name, name))
        return group.keys[0] if group and group.converter is None else None

    return Weights(read, files, key_of)
