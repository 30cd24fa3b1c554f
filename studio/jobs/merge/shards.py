"""Writes a merged model shard by shard: each appears whole, and those that a killed merge left are kept.

The layout is decided before the first byte, so every shard's header is known and tensors are written as they come.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.base.weights.tensor_files import DTYPE_NAMES, Stored
from studio.jobs.merge.steps import Output
from studio.probe.model_folder import INDEX, WEIGHTS
from studio.runs.atomic import sync_folder, write_whole

SHARD_BYTES = 5 * 10**9
"""transformers' own limit of a shard."""
_PLAN = ".merge-plan"
_ALIGN_BYTES = 8
_COPY_BYTES = 32 * 2**20
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What file systems say that cannot copy among themselves (EPERM: some container sandboxes)."""
_SPARE_BYTES = 64 * 2**20
"""For config, tokenizer and the file system's own tables."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written, with the tensors that it will hold in order."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def header(self) -> bytes:
        """The first bytes of the file: length and JSON, padded with spaces so that the tensors are aligned."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for output in self.outputs:
            end = offset + output.size_bytes
            name = DTYPE_NAMES[output.dtype]
            table[output.key] = {"dtype": name, "shape": list(output.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGN_BYTES)
        return len(text).to_bytes(8, "little") + text

    @property
    def size_bytes(self) -> int:
        """Of the file without its header."""
        return sum(output.size_bytes for output in self.outputs)


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
        done: Names of the shards that were there already, from a merge of the same plan that was killed.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], plan: str) -> None:
        """Take up the folder of an earlier merge of the same plan, or begin a new one.

        Args:
            folder: Where to write.
            shards: All of them.
            plan: Says what goes into the merge; a folder of another plan is thrown away.

        Raises:
            OSError: The folder cannot be made.
            BadInput: The disk has no room for what is missing.
        """
        self.folder, self.shards = folder, shards
        digest = hashlib.sha256(plan.encode() + b"".join(shard.header for shard in shards)).hexdigest()
        if not _says(folder / _PLAN, digest):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_whole(folder / _PLAN, digest)
        wanted = {shard.name for shard in shards}
        for path in folder.iterdir():
            if path.name not in wanted and path.name != _PLAN:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.done = {shard.name for shard in shards if _is_whole(folder / shard.name, shard)}
        self._check_room()

    def open(self, shard: Shard) -> "OpenShard":
        """Begin a shard.

        Raises:
            OSError: It cannot be written.
        """
        return OpenShard(self.folder, shard)

    def finish(self) -> None:
        """Write the index where there is more than one shard, and take the plan away.

        Raises:
            OSError: The disk refuses.
        """
        if len(self.shards) > 1:
            total = sum(shard.size_bytes for shard in self.shards)
            places = {output.key: shard.name for shard in self.shards for output in shard.outputs}
            table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (self.folder / INDEX).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        (self.folder / _PLAN).unlink(missing_ok=True)

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


class OpenShard:
    """A shard that is being written, under another name until it is whole; its tensors may come in any order."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        """Write the header.

        Raises:
            OSError: The disk refuses.
        """
        self._final, self._aside = folder / shard.name, folder / f".{shard.name}.part"
        at = len(shard.header)
        self._places: dict[str, int] = {}
        for output in shard.outputs:
            self._places[output.key] = at
            at += output.size_bytes
        self._aside.write_bytes(shard.header)

    def write_blocks(self, key: str, blocks: Iterable[Tensor]) -> None:
        """Write a tensor that comes as contiguous blocks, in order.

        Raises:
            OSError: The disk refuses.
        """
        with self._at(key) as file:
            for block in blocks:
                left = block.reshape(-1).view(torch.uint8).numpy().data
                while len(left):
                    left = left[file.write(left) :]

    def copy_tensor(self, key: str, stored: Stored, heed: Callable[[], None]) -> None:
        """Write the bytes of a tensor of another file.

        Args:
            key: Of the tensor here.
            stored: The one that it repeats.
            heed: Called now and then; may raise.

        Raises:
            OSError: The disk refuses, or the other file cannot be read.
            BadInput: The other file has become shorter.
        """
        with self._at(key) as file, stored.path.open("rb", buffering=0) as source:
            source.seek(stored.offset)
            left = stored.entry.size_bytes
            while left:
                heed()
                copied = copy_some(source, file, min(left, _COPY_BYTES))
                if not copied:
                    raise BadInput(f"{plain(stored.path.name, one_line=True)} became shorter while it was read.")
                left -= copied

    def close(self) -> None:
        """Flush to the disk and give the file its name.

        Raises:
            OSError: The disk refuses.
        """
        with self._aside.open("rb+") as file:
            os.fsync(file.fileno())
        self._aside.replace(self._final)
        sync_folder(self._final.parent)

    def abandon(self) -> None:
        """Leave no result."""
        self._aside.unlink(missing_ok=True)

    def _at(self, key: str) -> FileIO:
        file = self._aside.open("rb+", buffering=0)
        file.seek(self._places[key])
        return file


def copy_some(source: FileIO, target: FileIO, count: int) -> int:
    """Copy at most `count` bytes from where one file stands to where another stands; return how many, 0 at the end.

    Raises:
        OSError: A file cannot be read or written.
    """
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), count)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
    data = memoryview(source.read(count))
    done = 0
    while done < len(data):
        done += target.write(data[done:])
    return done


def _says(path: Path, digest: str) -> bool:
    try:
        return path.read_text("utf-8") == digest
    except (OSError, ValueError):
        return False


def _is_whole(path: Path, shard: Shard) -> bool:
    """Whether a file is the one that would be written: it got this name only after its last byte was on the disk."""
    header = shard.header
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header and path.stat().st_size == len(header) + shard.size_bytes
    except OSError:
        return False
