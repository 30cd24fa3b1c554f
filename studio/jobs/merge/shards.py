"""Writes a merged model shard by shard: each appears whole, and those that a killed merge left are kept.

The layout is decided before the first byte, so every shard's header is known and tensors are written as they come.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.merge.shard_file import SUMS, OpenShard, Shard
from studio.jobs.merge.steps import Output
from studio.probe.model_folder import INDEX, WEIGHTS
from studio.probe.weight_sums import weight_sums
from studio.runs.atomic import write_whole

SHARD_BYTES = 5 * 10**9
"""transformers' own limit of a shard."""
_PLAN = ".merge-plan"
_SPARE_BYTES = 64 * 2**20
"""For config, tokenizer and the file system's own tables."""


def lay_out(outputs: Iterable[Output], limit_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Return the shards of a model: a new one begins where the next tensor would pass the limit."""
    rooms: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if rooms[-1] and size + output.size_bytes > limit_bytes:
            rooms.append([])
            size = 0
        rooms[-1].append(output)
        size += output.size_bytes
    if len(rooms) == 1:
        return [Shard(WEIGHTS, tuple(rooms[0]))]
    stem, suffix = WEIGHTS.split(".")
    return [Shard(f"{stem}-{i:05d}-of-{len(rooms):05d}.{suffix}", tuple(room)) for i, room in enumerate(rooms, 1)]


class ShardWriter:
    """A folder that fills up with shards.

    Attributes:
        folder: The folder, which has another name until it is whole.
        shards: All of them, in order.
        done: Names of the shards that were there already, every byte as it was written by a merge of the same plan
            that was killed.
        sums: Checksums of the tensors in all shards that are whole.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        plan: str,
        tell: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """Take up the folder of an earlier merge of the same plan, or begin a new one.

        Args:
            folder: Where to write.
            shards: All of them.
            plan: Says what goes into the merge; a folder of another plan is thrown away.
            tell: Gets the fraction compared of each shard that was there; may raise.

        Raises:
            OSError: The folder cannot be made.
            BadInput: The disk has no room for what is missing.
        """
        self.folder, self.shards = folder, shards
        self.sums: dict[str, str] = {}
        digest = hashlib.sha256(plan.encode() + b"".join(shard.header for shard in shards)).hexdigest()
        if not _says(folder / _PLAN, digest):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_whole(folder / _PLAN, digest)
        wanted = {_PLAN} | {name for shard in shards for name in (shard.name, shard.name + SUMS)}
        for path in folder.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.done = {shard.name for shard in shards if self._take_up(shard, tell)}
        self._check_room()

    def open(self, shard: Shard) -> "OpenShard":
        """Begin a shard.

        Raises:
            OSError: It cannot be written.
        """
        return OpenShard(self.folder, shard, self.sums)

    def finish(self) -> None:
        """Write the index where there is more than one shard, and take away what only a later merge would need.

        Raises:
            OSError: The disk refuses.
        """
        if len(self.shards) > 1:
            total = sum(shard.size_bytes for shard in self.shards)
            places = {output.key: shard.name for shard in self.shards for output in shard.outputs}
            table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (self.folder / INDEX).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        (self.folder / _PLAN).unlink(missing_ok=True)
        for shard in self.shards:
            (self.folder / (shard.name + SUMS)).unlink(missing_ok=True)

    def _take_up(self, shard: Shard, tell: Callable[[float], None]) -> bool:
        """Whether a shard is there with every byte as it was written."""
        path = self.folder / shard.name
        sums = _sums_in(path.with_name(path.name + SUMS))
        if not _has_header(path, shard) or sums is None or weight_sums([path], tell, anew=True).sums != sums:
            return False
        self.sums |= sums
        return True

    def _check_room(self) -> None:
        needed = sum(shard.size_bytes for shard in self.shards if shard.name not in self.done) + _SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            where = plain(str(self.folder.parent), one_line=True)
            if not self.done:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise BadInput(
                f"the merged model needs {needed / 1e9:.2f} GB in {where}, where {free / 1e9:.2f} GB are free. "
                "Free some space, or choose another --out."
            )


def _says(path: Path, digest: str) -> bool:
    try:
        return path.read_text("utf-8") == digest
    except (OSError, ValueError):
        return False


def _sums_in(path: Path) -> dict[str, str] | None:
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return {str(key): str(value) for key, value in table.items()} if isinstance(table, dict) else None


def _has_header(path: Path, shard: Shard) -> bool:
    """Whether a file has the header and the length of the one that would be written."""
    header = shard.header
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header and path.stat().st_size == len(header) + shard.size_bytes
    except OSError:
        return False
