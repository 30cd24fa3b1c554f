"""The merge itself: every step, shard by shard. Copies and plain layers run side by side, all others one at a time."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from studio.core.errors import StudioError
from studio.jobs.merge.shards import OpenShard, Shard, ShardWriter
from studio.jobs.merge.steps import MergeSteps, Output, Step

_MOST_WORKERS = 8
"""Copying is soon bound by memory and disk."""


class Stopped(StudioError):
    """The user asked for an early end."""


def write_steps(
    steps: MergeSteps, writer: ShardWriter, *, tell: Callable[[float, str], None], stopping: Callable[[], bool]
) -> None:
    """Write all shards that are not there yet; the folder then lacks only its index.

    Args:
        steps: What to write.
        writer: Where.
        tell: Gets the fraction done and the name of the shard.
        stopping: Asked before every tensor, and often within large ones.

    Raises:
        Stopped: The user asked for it.
        JobFailed: A number is not finite.
        OSError: A file cannot be read or written.
    """
    step_of = {output.key: step for step in steps.steps for output in step.outputs}
    total = sum(shard.size_bytes for shard in writer.shards) or 1
    held = _Held(steps, step_of)
    progress = _Progress(total, tell, stopping)
    closing: list[Future[None]] = []
    with _pool(steps) as pool:
        for shard in writer.shards:
            if shard.name in writer.done:
                progress.add(shard.size_bytes, shard.name)
                continue
            file = writer.open(shard)
            try:
                _write_shard(file, shard, held, progress, pool)
            except BaseException:
                file.abandon()
                raise
            closing.append(pool.submit(file.close))  # the disk is slow: the next shard need not wait for it
        for future in closing:
            future.result()


def _write_shard(file: OpenShard, shard: Shard, held: "_Held", progress: "_Progress", pool: ThreadPoolExecutor) -> None:
    def one(output: Output) -> None:
        progress.heed()
        _write(file, output, held, progress)
        progress.add(output.size_bytes, shard.name)

    running = [pool.submit(one, output) for output in shard.outputs if held.is_independent(output.key)]
    try:
        for output in shard.outputs:
            if not held.is_independent(output.key):
                one(output)
        for future in wait(running, return_when=FIRST_EXCEPTION).done:
            future.result()
    except BaseException:
        progress.abandoned = True
        for future in running:
            future.cancel()
        wait(running)
        raise


def _write(file: OpenShard, output: Output, held: "_Held", progress: "_Progress") -> None:
    step, files = held.step_of[output.key], held.steps.files
    if step.row_sum is not None:
        file.write_blocks(output.key, progress.heeding(held.steps.blocks(step.row_sum, output)))
    elif step.copies is None:
        file.write_blocks(output.key, [held.take(output.key)])
    elif files.tensors[step.copies].dtype is output.dtype:
        file.copy_tensor(output.key, files.tensors[step.copies], progress.heed)
    else:
        file.write_blocks(output.key, [files.read(step.copies).to(output.dtype)])


@contextmanager
def _pool(steps: MergeSteps) -> Iterator[ThreadPoolExecutor]:
    """Workers for all processors; each computes in one thread, so that together they do not wait for each other."""
    threads = torch.get_num_threads()
    summed = any(step.row_sum is not None for step in steps.steps)
    if summed:
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, _MOST_WORKERS)) as pool:
            yield pool
    finally:
        if summed:
            torch.set_num_threads(threads)


class _Held:
    """Tensors that a step made and that are still to be written: a step's tensors may fall into two shards."""

    def __init__(self, steps: MergeSteps, step_of: dict[str, Step]) -> None:
        self.steps, self.step_of = steps, step_of
        self._made: dict[str, Tensor] = {}

    def is_independent(self, key: str) -> bool:
        """Whether a tensor needs no module of the model, which only one thread may lend weights to."""
        step = self.step_of[key]
        return step.copies is not None or step.row_sum is not None

    def take(self, key: str) -> Tensor:
        if key not in self._made:
            self._made = self.steps.compute(self.step_of[key])
        return self._made.pop(key)


class _Progress:
    """Bytes done, from several threads, and whether to go on."""

    def __init__(self, total: int, tell: Callable[[float, str], None], stopping: Callable[[], bool]) -> None:
        self._total, self._tell, self._stopping = total, tell, stopping
        self._done, self._lock = 0, Lock()
        self.abandoned = False

    def add(self, size_bytes: int, shard: str) -> None:
        with self._lock:
            self._done += size_bytes
            self._tell(self._done / self._total, shard)

    def heed(self) -> None:
        if self.abandoned or self._stopping():
            raise Stopped("stopped before the merged model was whole")

    def heeding(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        for place, block in enumerate(blocks):
            if place % 16 == 0:
                self.heed()
            yield block
