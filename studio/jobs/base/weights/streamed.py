"""A forward pass through a model whose weights stay in their files: matrices are read by rows, the rest is lent.

The largest matrices of a model are its embedding and its head: of the first only the rows of the tokens are read.
What is not in memory is an `Absent`: torch itself multiplies by a tensor on the meta device without a word in places,
and gives whatever was in the memory.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from studio.jobs.base.threads import workers
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import Skeleton, clean_name
from studio.jobs.base.weights.tensor_files import TensorFiles, block_rows
from studio.jobs.base.weights.units import Read, put


class Weights(Protocol):
    """Where the parameters of a model come from."""

    @property
    def files(self) -> TensorFiles:
        """Tensors, some of which are parameters."""

    def read(self, name: str) -> Tensor:
        """Return a parameter by its name in the base."""

    def key_of(self, name: str) -> str | None:
        """Return the tensor in the files that is a parameter as it is; None where it is made."""


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
        with lending, _computing_by_rows(by_rows, weights.files):
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
    weights = FolderWeights.of(folder)
    return streamed_logits(weights.clean, weights, ids, mask, tell=tell)


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
    weights = FolderWeights(skeleton.clean, TensorFiles(folder))
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
            if key is not None and weights.files.shape(key) == module.weight.shape:
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


@contextmanager
def _computing_by_rows(modules: Mapping[str, tuple[nn.Module, str]], files: TensorFiles) -> Iterator[None]:
    """Let linear layers and embeddings compute in fp32 from files.

    Args:
        modules: Any name; the module, its weight on the meta device; the key of that weight in the files.
        files: Where the weights are.

    Raises:
        NotLent: Inside; another module computes with such a weight.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(workers()) if modules else None
        for module, key in modules.values():
            before = module.get_parameter("weight")
            stack.callback(put, module, "weight", before)
            put(module, "weight", Absent.of(before))
            if isinstance(module, nn.Linear) and pool is not None:
                setattr(module, "forward", _linear(module, files, key, pool))  # noqa: B010  an instance's own forward
                stack.callback(delattr, module, "forward")
            else:
                for handle in _lend_rows(module, files, key):
                    stack.callback(handle.remove)
        yield


def _linear(module: nn.Linear, files: TensorFiles, key: str, pool: ThreadPoolExecutor) -> Any:
    count, width = files.shape(key)
    rows = block_rows(count, width)
    share = -(-count // rows // pool._max_workers) * rows

    def part(first: int, columns: Tensor, result: Tensor) -> None:
        """Fill rows of the result `[out, tokens]`; columns are `[in, tokens]`."""
        with torch.no_grad():
            last = min(count, first + share)
            weight = torch.empty(rows, width)
            for block in files.row_blocks(key, rows, first, last):
                torch.mm(weight[: len(block)].copy_(block), columns, out=result[first : first + len(block)])
                first += len(block)

    def forward(hidden: Tensor) -> Tensor:
        columns = hidden.reshape(-1, width).t().contiguous()
        result = torch.empty(count, columns.shape[1])
        for done in [pool.submit(part, first, columns, result) for first in range(0, count, share)]:
            done.result()
        answer = result.t().contiguous()
        if module.bias is not None:
            answer += module.bias
        return answer.view(*hidden.shape[:-1], count)

    return forward


def _lend_rows(module: nn.Module, files: TensorFiles, key: str) -> list[Any]:
    absent = module.get_parameter("weight")

    def lend(_: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        (ids,) = [one for one in (*args, *more.values()) if isinstance(one, Tensor)]
        wanted = torch.unique(ids).tolist()
        # Pages that are never touched take no memory: only the rows of these tokens are ever there.
        weight = torch.empty(files.shape(key))
        weight[wanted] = files.picked(key, wanted).float()
        put(module, "weight", nn.Parameter(weight, requires_grad=False))

    def take_back(*called: Any) -> None:
        put(module, "weight", absent)

    return [
        module.register_forward_pre_hook(lend, with_kwargs=True),
        module.register_forward_hook(take_back, always_call=True),
    ]


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
