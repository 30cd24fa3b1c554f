"""A forward pass through a model whose weights are lent to it one decoder layer at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.jobs.base.weights.checkpoint_names import CheckpointNames
from studio.jobs.base.weights.skeleton import Skeleton, build_clean, clean_name
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.base.weights.units import Read, put


@torch.no_grad()
def streamed_logits(model: nn.Module, read: Read, ids: Tensor, mask: Tensor, prefix: str = "") -> Tensor:
    """Return fp32 logits `[batch, seq, vocabulary]`.

    Args:
        model: Its parameters on the meta device are lent, all others are its own.
        read: Gives a parameter by its name in the base.
        ids: `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.
        prefix: What stands before the base's names inside `model`.
    """
    with _lending(model, read, prefix):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float()


def folder_logits(folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the fp32 logits `[batch, seq, vocabulary]` of a model folder, one decoder layer in memory at a time.

    Args:
        folder: Holds config and safetensors in 16 or 32 bit.
        ids: `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.

    Raises:
        BadInput: transformers cannot build this model, or a file of it is damaged.
        JobFailed: The files lack a parameter of the model.
        OSError: A file cannot be read.
    """
    clean = build_clean(folder)
    return streamed_logits(clean, _reader(clean, TensorFiles(folder)), ids, mask)


def adapted_logits(skeleton: Skeleton, folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the fp32 logits `[batch, seq, vocabulary]` of base + adapter, one decoder layer in memory at a time.

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
    read = _reader(skeleton.clean, TensorFiles(folder))
    return streamed_logits(skeleton.adapted, read, ids, mask, "base_model.model.")


@contextmanager
def _lending(model: nn.Module, read: Read, prefix: str) -> Iterator[None]:
    """Hook every decoder layer and wrapper, and every module outside them that has parameters of its own."""
    handles: list[Any] = []
    blocks: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{block}.") for block in blocks):
            continue
        above = path.rpartition(".")[0]
        # A wrapper of peft's may use the weights of the module inside without calling it.
        is_wrapper = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        is_block = is_wrapper or (bool(above) and isinstance(model.get_submodule(above), nn.ModuleList))
        if is_block:
            blocks.append(path)
        names = dict(module.named_parameters(recurse=is_block, remove_duplicate=False))
        wanted = {local for local, parameter in names.items() if parameter.is_meta and not _unused(f"{path}.{local}")}
        if wanted:
            lend, take_back = _lender(module, f"{path}.".removeprefix(prefix), sorted(wanted), read)
            handles += [module.register_forward_pre_hook(lend), module.register_forward_hook(take_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unused(path: str) -> bool:
    """A module saved whole takes the place of the original one, which is not called."""
    return ".original_module." in path


def _lender(
    module: nn.Module, place: str, wanted: list[str], read: Read
) -> tuple[Callable[..., None], Callable[..., None]]:
    before = {local: module.get_parameter(local) for local in wanted}

    def lend(*called: Any) -> None:
        for local in wanted:
            put(module, local, nn.Parameter(read(clean_name(place + local)).float(), requires_grad=False))

    def take_back(*called: Any) -> None:
        for local, parameter in before.items():
            put(module, local, parameter)

    return lend, take_back


def _reader(clean: Any, files: TensorFiles) -> Read:
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

    return read
