"""Does the merge: every step, shard by shard. Copies and row sums run in parallel, all other steps one at a time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from threading import Lock
from typing import TypeVar

from torch import Tensor

from studio.jobs.base.failures import Cancelled
from studio.jobs.base.threads import workers
from studio.jobs.base.weights.tensor_files import PIECE_BYTES, bytes_of
from studio.jobs.merge.shards import OpenShard, ShardWriter
from studio.jobs.merge.steps import MergeSteps, Output, Step

T = TypeVar("T")
_FLUSH_BYTES = 64 * 2**20
"""After so many bytes the disk begins to write. Flushing 2.9 GB at the end took 0.5 of 1.6 seconds, in between 0.2 of
1.3."""


def write_steps(
    steps: MergeSteps, writer: ShardWriter, *, tell: Callable[[float, str], None], stopping: Callable[[], bool]
) -> None:
    """Write all shards that are not there yet; the folder then lacks only its index.

    Args:
        steps: What to write.
        writer: Writes the shards.
        tell: Told the fraction done and the name of the shard.
        stopping: Returns whether the user asked for a stop; asked before every tensor, and often within large ones.

    Raises:
        Cancelled: The user asked for a stop.
        JobFailed: A number is not finite.
        OSError: A file cannot be read or written.
    """
    total = sum(shard.size_bytes for shard in writer.shards) or 1
    # Row sums run in several threads, of which each computes alone. Without any, peft's merges use all cores.
    alone = any(step.row_sum is not None for step in steps.steps)
    with workers(alone) as pool, ThreadPoolExecutor(1) as flusher:
        work = _Work(steps, total, tell, stopping, flusher)
        for shard in writer.shards:
            if shard.name in writer.done:
                work.count(shard.size_bytes, shard.name)
                continue
            file = writer.open(shard)
            beside = [output for output in shard.outputs if not work.needs_the_model(output)]
            running = [pool.submit(work.write, file, output) for output in beside]
            try:
                for output in shard.outputs:
                    if work.needs_the_model(output):
                        work.write(file, output)
                for done in wait(running, return_when=FIRST_EXCEPTION).done:
                    done.result()
            except BaseException:
                work.abandoned = True
                wait([one for one in running if not one.cancel()])
                raise
            work.flushing.append(flusher.submit(file.close))
        for flushed in work.flushing:
            flushed.result()


class _Work:
    """What the threads of a merge share: the steps, the bytes done, and whether to go on."""

    def __init__(
        self,
        steps: MergeSteps,
        total: int,
        tell: Callable[[float, str], None],
        stopping: Callable[[], bool],
        flusher: ThreadPoolExecutor,
    ) -> None:
        self.steps, self._total, self._tell, self._stopping = steps, total, tell, stopping
        self.step_of = {output.key: step for step in steps.steps for output in step.outputs}
        self._made: dict[str, Tensor] = {}  # computed but not written: a step's tensors may be in two shards
        self._done, self._lock, self._flusher = 0, Lock(), flusher
        self.flushing: list[Future[None]] = []  # flushes that were begun, in order
        self.abandoned = False

    def needs_the_model(self, output: Output) -> bool:
        """Return whether computing a tensor fills a module of the model, which only one thread may do at a time."""
        step = self.step_of[output.key]
        return step.copies is None and step.row_sum is None

    def write(self, file: OpenShard, output: Output) -> None:
        """Write one tensor."""
        self._heed()
        _write(file, output, self)
        if self.count(output.size_bytes, file.name):
            # In a thread of its own: the disk writes while the rest is computed.
            self.flushing.append(self._flusher.submit(file.flush))

    def count(self, size_bytes: int, shard: str) -> bool:
        """Count bytes as done; return whether it is time for a flush."""
        with self._lock:
            before, self._done = self._done, self._done + size_bytes
            self._tell(self._done / self._total, shard)
            return before // _FLUSH_BYTES != self._done // _FLUSH_BYTES

    def pieces(self, step: Step, output: Output) -> Iterator[memoryview]:
        """Return the bytes of a tensor that is copied, or merged by peft, in pieces."""
        files = self.steps.files
        if step.copies is None:
            if output.key not in self._made:
                self._made = self.steps.compute(step)
            return iter([bytes_of(self._made.pop(output.key))])
        if files.dtype(step.copies) is output.dtype:
            return files.tensors[step.copies].pieces(memoryview(bytearray(PIECE_BYTES)))
        return iter([bytes_of(files.read(step.copies).to(output.dtype))])

    def _heed(self) -> None:
        if self.abandoned or self._stopping():
            raise Cancelled("stopped before the merged model was whole")

    def heeding(self, pieces: Iterable[T]) -> Iterator[T]:
        """Yield the given items; raise `Cancelled` in between if the merge ends early."""
        for place, piece in enumerate(pieces):
            if place % 16 == 0:
                self._heed()
            yield piece


def _write(file: OpenShard, output: Output, work: _Work) -> None:
    """Compute or copy a tensor and write it; a row sum is computed directly in the writer's memory."""
    step = work.step_of[output.key]
    with file.writing(output.key) as stretch:
        if step.row_sum is not None:
            for _ in work.heeding(work.steps.blocks(step.row_sum, output, stretch.room)):
                pass
            return
        for piece in work.heeding(work.pieces(step, output)):
            stretch.write(piece)
