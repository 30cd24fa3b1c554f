"""The merge itself: every step in order, into shards, one tensor at a time."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from studio.core.errors import StudioError
from studio.jobs.merge.shards import OpenShard, ShardWriter, lay_out
from studio.jobs.merge.steps import MergeSteps, Output, Step


class Stopped(StudioError):
    """The user asked for an early end."""


def write_steps(
    steps: MergeSteps,
    folder: Path,
    plan: str,
    *,
    limit_bytes: int,
    tell: Callable[[float, str], None],
    stopping: Callable[[], bool],
) -> ShardWriter:
    """Write all shards that are not there yet; return the writer, whose folder lacks only its index.

    Args:
        steps: What to write.
        folder: Where, under a name of its own.
        plan: Says what goes into the merge.
        limit_bytes: Of a shard.
        tell: Gets the fraction done and the name of the shard.
        stopping: Asked before every tensor.

    Raises:
        Stopped: The user asked for it.
        BadInput: The disk has no room.
        JobFailed: A number is not finite.
        OSError: A file cannot be read or written.
    """
    shards = lay_out((output for step in steps.steps for output in step.outputs), limit_bytes)
    writer = ShardWriter(folder, shards, plan)
    step_of = {output.key: step for step in steps.steps for output in step.outputs}
    total = sum(shard.size_bytes for shard in shards) or 1
    held = _Held(steps, step_of)
    done = 0
    for shard in shards:
        if shard.name in writer.done:
            done += shard.size_bytes
            continue
        file = writer.open(shard)
        try:
            for output in shard.outputs:
                _heed(stopping)
                _write(file, output, held)
                done += output.size_bytes
                tell(done / total, shard.name)
        except BaseException:
            file.abandon()
            raise
        file.close()
    return writer


def _heed(stopping: Callable[[], bool]) -> None:
    if stopping():
        raise Stopped("stopped before the merged model was whole")


class _Held:
    """Tensors that a step made and that are still to be written: a step's tensors may fall into two shards."""

    def __init__(self, steps: MergeSteps, step_of: dict[str, Step]) -> None:
        self.steps, self.step_of = steps, step_of
        self._made: dict[str, Tensor] = {}

    def take(self, key: str) -> Tensor:
        if key not in self._made:
            self._made = self.steps.compute(self.step_of[key])
        return self._made.pop(key)


def _write(file: OpenShard, output: Output, held: _Held) -> None:
    source = held.step_of[output.key].copies
    if source is None:
        file.write_tensor(held.take(output.key))
    elif held.steps.files.tensors[source].dtype is output.dtype:
        for chunk in held.steps.files.chunks(source):
            file.write(chunk)
    else:
        file.write_tensor(held.steps.files.read(source).to(output.dtype))
