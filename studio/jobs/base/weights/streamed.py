"""A forward pass through a model whose weights stay in their files.

Linear layers read their matrix a few rows at a time. An embedding, with the head the largest matrix of a model, reads
only the rows of the tokens. Everything else is lent: read when its module runs, and taken back afterwards. A parameter
that is not in memory is an `Absent`, which raises when it is computed with. A plain tensor on the meta device would not
do: some of torch's products accept one without an error and return whatever was in the memory.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from studio.jobs.base.head_form import formed, head_form_of
from studio.jobs.base.model_class import backbone_of, class_of
from studio.jobs.base.threads import workers
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import Skeleton, clean_name
from studio.jobs.base.weights.tensor_files import TensorFiles, block_rows
from studio.jobs.base.weights.units import Read, put


class Weights(Protocol):
    """Where the parameters of a model come from."""

    @property
    def files(self) -> TensorFiles:
        """The tensors in the files; some of them are parameters as they are."""

    def read(self, name: str) -> Tensor:
        """Return a parameter by its name in the base."""

    def key_of(self, name: str) -> str | None:
        """Return the tensor in the files that is equal to a parameter; None where the parameter is computed."""


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
        model: Its parameters on the meta device come from `weights`; it has the others itself.
        weights: Of the base.
        ids: `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.
        prefix: What precedes the base's names inside `model`.
        tell: Told the fraction done; may raise.

    Raises:
        NotLent: A part of the model computes with weights of another decoder layer.
    """
    by_rows = _by_rows(model, weights, prefix)

    def logits(by_rows: dict[str, tuple[nn.Module, str]]) -> Tensor:
        lending = _lending(_lent(model, prefix, by_rows), weights.read, tell)
        with lending, _computing_by_rows(by_rows, weights.files):
            return _logits_of(model, ids, mask)

    # Some models compute with the weight of a linear layer without calling it; then nothing is read by rows, and each
    # decoder layer is lent all its weights.
    with suppress(NotLent):
        return logits(by_rows)
    return logits({})


def _logits_of(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the fp32 logits of a text `[batch, seq, vocabulary]`.

    The head of a multimodal model is given the states of the decoder: the wrapper around both may want weights for what
    is not there, as Gemma 4 wants the embedding of what images are padded with.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    named = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if not class_of(causal).decoder or backbone_of(causal) is not causal.get_decoder():
        logits: Tensor = model(**named).logits
        return logits.float()
    states = cast(Any, backbone_of(causal))(**named).last_hidden_state
    return formed(causal.get_output_embeddings()(states).float(), head_form_of(causal.config))


def folder_logits(
    folder: Path, ids: Tensor, mask: Tensor, tell: Callable[[float], None] = lambda fraction: None
) -> Tensor:
    """Return the fp32 logits `[batch, seq, vocabulary]` of a model folder, with a few rows of its matrices in memory.

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
    """Return the fp32 logits `[batch, seq, vocabulary]` of base + adapter, with a few rows of its matrices in memory.

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
    """Return how many numbers of parameters a pass lends at once, at most."""
    lent = _lent(model, prefix, _by_rows(model, weights, prefix))
    return max((sum(module.get_parameter(local).numel() for local in wanted) for module, _, wanted in lent), default=0)


def _by_rows(model: nn.Module, weights: Weights, prefix: str) -> dict[str, tuple[nn.Module, str]]:
    """Return the layers that can read their weight by rows: by path, the module and its tensor in the files."""
    found: dict[str, tuple[nn.Module, str]] = {}
    closed = ""
    for path, module in model.named_modules():
        if closed and path.startswith(closed):  # whatever is inside a module follows it at once
            continue
        # Wrappers of peft other than a plain Linear use the weight of the layer inside without calling the layer.
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
"""A module, its name in the base with a dot after it, and the names of its parameters that are lent while it runs."""


def _lent(model: nn.Module, prefix: str, by_rows: dict[str, tuple[nn.Module, str]]) -> list[_Lent]:
    """Return what is lent: to every decoder layer and wrapper as a whole, and to every other module by itself."""
    lent: list[_Lent] = []
    block = ""
    for path, module in model.named_modules():
        if block and path.startswith(block):
            continue
        above = path.rpartition(".")[0]
        # A wrapper of peft may use the weights of the module inside without calling that.
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
    """Return whether a parameter is used: where a module is trained whole, the original one beside it is not called."""
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
    """Let linear layers and embeddings compute in fp32 from files while the context lasts.

    Args:
        modules: By any name, the module, whose weight is on the meta device, and the key of that weight in the files.
        files: Where the weights are.

    Raises:
        NotLent: Raised inside the context when another module computes with such a weight.
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
    share = -(-count // rows // pool._max_workers) * rows  # rows for each thread, in whole blocks

    def part(first: int, columns: Tensor, result: Tensor) -> None:
        """Fill rows of the result `[out, tokens]`; columns are `[in, tokens]`."""
        with torch.no_grad():
            last = min(count, first + share)
            weight = torch.empty(rows, width)
            for block in files.row_blocks(key, rows, first, last):
                torch.mm(weight[: len(block)].copy_(block), columns, out=result[first : first + len(block)])
                first += len(block)

    def forward(hidden: Tensor) -> Tensor:
        # `[in, tokens]`: W @ x has the rows of W as its own rows, so that each thread fills a part by itself.
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
        # The system gives memory only to pages that are written, so only these tokens' rows take any.
        weight = torch.empty(files.shape(key))
        weight[wanted] = files.picked(key, wanted).float()
        put(module, "weight", nn.Parameter(weight, requires_grad=False))

    def take_back(*called: Any) -> None:
        put(module, "weight", absent)

    return [
        module.register_forward_pre_hook(lend, with_kwargs=True),
        module.register_forward_hook(take_back, always_call=True),
    ]


# What may be asked of a parameter without its numbers.
_ASKED = {
    Tensor.is_floating_point, Tensor.is_complex, Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size,
    Tensor.stride, Tensor.is_contiguous, Tensor.detach,
}  # fmt: skip


class NotLent(RuntimeError):
    """A part of the model computed with weights that were not lent, those of a layer that it did not call."""


class Absent(torch.nn.Parameter):
    """A parameter without numbers: it tells its shape and dtype, and raises when it is computed with."""

    @staticmethod
    def of(parameter: Tensor, device: torch.device | str = "meta") -> "Absent":
        """Return a stand-in of the same shape and dtype, which says that it is on a device."""
        with _disable_current_modes():  # a fake tensor has its own class already
            empty = torch.empty((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            made: Absent = torch.Tensor._make_subclass(Absent, empty, require_grad=False)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about shape and dtype, refuse everything else.

        Raises:
            NotLent: Another function was called with this parameter.
        """
        if getattr(func, "__name__", "") == "__get__" or func in _ASKED:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise NotLent("a weight was computed with that was not in memory")
