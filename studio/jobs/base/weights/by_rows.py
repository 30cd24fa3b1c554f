"""Linear layers and embeddings that compute with weights left in their files, a few rows in memory at a time.

The largest matrices of a model are its embedding and its head: of the first only the rows of the tokens are read.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from studio.jobs.base.weights.absent import Absent
from studio.jobs.base.weights.tensor_files import TensorFiles, block_rows
from studio.jobs.base.weights.units import put

MOST_WORKERS = 8
"""Reading is soon bound by memory and disk."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def workers(alone: bool = True) -> Iterator[ThreadPoolExecutor]:
    """Give a thread to every processor.

    Args:
        alone: Each computes in itself only, so that together they do not wait for each other.
    """
    count = min(torch.get_num_threads(), MOST_WORKERS)
    with one_thread() if alone else nullcontext(), ThreadPoolExecutor(count) as pool:
        yield pool


@contextmanager
def computing_by_rows(modules: Mapping[str, tuple[nn.Module, str]], files: TensorFiles) -> Iterator[None]:
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
    count, width = files.tensors[key].entry.shape
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
        weight = torch.empty(files.tensors[key].entry.shape)
        weight[wanted] = files.read_rows(key, wanted).float()
        put(module, "weight", nn.Parameter(weight, requires_grad=False))

    def take_back(*called: Any) -> None:
        put(module, "weight", absent)

    return [
        module.register_forward_pre_hook(lend, with_kwargs=True),
        module.register_forward_hook(take_back, always_call=True),
    ]
