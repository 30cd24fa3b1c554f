"""Writes a merged model shard by shard. A file gets its name when it is whole; a killed merge's whole files are used.

The layout is decided before the first byte is written: every shard's header is known, and its tensors may be written in
any order.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.base.weights.tensor_files import DTYPE_NAMES
from studio.jobs.merge.steps import Output
from studio.probe.model_folder import INDEX, WEIGHTS
from studio.probe.safetensors_file import TensorEntry
from studio.probe.weight_sums import begun_sum, weight_sums
from studio.runs.atomic import sync_folder, write_whole

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in a shard; the limit is transformers' own."""
_PLAN = ".merge-plan"
_SPARE_BYTES = 64 * 2**20
"""Disk space left for config, tokenizer and the file system's own tables."""
SUMS = ".sums"
"""Ending of the file with a shard's checksums, which is there until the folder is complete."""
_ALIGN_BYTES = 8
_WRITE_BYTES = 2**20
_COPY_BYTES = 2**18


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written, and the tensors that it will hold, in order."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """dtype, shape and place of each tensor, as in the file's header."""
        found, begin = {}, 0
        for output in self.outputs:
            found[output.key] = TensorEntry(DTYPE_NAMES[output.dtype], output.shape, begin, begin + output.size_bytes)
            begin += output.size_bytes
        return found

    @property
    def header(self) -> bytes:
        """The first bytes of the file: length and JSON, padded with spaces so that the tensors are aligned."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for key, entry in self.entries.items():
            table[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGN_BYTES)
        return len(text).to_bytes(8, "little") + text

    @property
    def size_bytes(self) -> int:
        """Bytes of the file without its header."""
        return sum(output.size_bytes for output in self.outputs)


def lay_out(outputs: Iterable[Output], limit_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Return the shards of a model; a new one begins where the next tensor would exceed the limit."""
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
    """Writes the shards of one model into a folder.

    Attributes:
        folder: The scratch directory; it gets its final name when the model is complete.
        shards: All shards, in order.
        done: Names of the shards that a killed merge of the same plan has left whole.
        sums: Checksums of the tensors in all shards that are whole.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        plan: str,
        tell: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """Continue in the folder of an earlier merge of the same plan, or begin a new one.

        Args:
            folder: Where to write.
            shards: All shards.
            plan: What goes into the merge, as a text; a folder of another plan is deleted.
            tell: Told which fraction of each shard that was there is compared; may raise.

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
        """Begin a shard and return its writer.

        Raises:
            OSError: It cannot be written.
        """
        return OpenShard(self.folder, shard, self.sums)

    def finish(self) -> None:
        """Write the index if there are several shards, and delete what only another merge would need.

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
        """Return whether a shard is there with every byte as it was written; add its checksums to `sums`."""
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
    """Return whether a file has the header and the length that this shard's file would have."""
    header = shard.header
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header and path.stat().st_size == len(header) + shard.size_bytes
    except OSError:
        return False


class OpenShard:
    """A shard that is being written, under another name until it is whole; its tensors may come in any order.

    Attributes:
        name: The name that it gets.
    """

    def __init__(self, folder: Path, shard: Shard, sums: dict[str, str] | None = None) -> None:
        """Write the header.

        Args:
            folder: Where to write.
            shard: What it will hold.
            sums: The checksums of its tensors are added to it when the shard is whole.

        Raises:
            OSError: The disk refuses.
        """
        self.name = shard.name
        self._final, self._part = folder / shard.name, folder / f".{shard.name}.part"
        self._entries, self._start, self._all_sums = shard.entries, len(shard.header), sums
        self._sums: dict[str, str] = {}
        with self._part.open("wb") as file:
            file.write(shard.header)
            file.truncate(len(shard.header) + shard.size_bytes)  # makes it as long as it will be

    @contextmanager
    def writing(self, key: str) -> Iterator["StretchWriter"]:
        """Open the place of a tensor in the file; its bytes must be written in order.

        Raises:
            OSError: The disk refuses.
        """
        entry = self._entries[key]
        hashed = begun_sum(entry)
        with StretchWriter(self._part, self._start + entry.begin, hashed.update) as stretch:
            yield stretch
        self._sums[key] = hashed.hexdigest()

    def flush(self) -> None:
        """Wait until the disk has everything written so far, and drop it from the system's cache.

        Later writes are then faster (tests/bench/merge_results.md), and what is read back comes from the disk.

        Raises:
            OSError: The disk refuses.
        """
        with self._part.open("rb+") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Flush to the disk, write the checksums and give the file its name.

        Raises:
            OSError: The disk refuses.
        """
        self.flush()
        if self._all_sums is not None:
            self._all_sums |= self._sums
            # Written before the shard gets its name, so that there is never a shard without checksums.
            write_whole(self._final.with_name(self._final.name + SUMS), json.dumps(self._sums))
        self._part.replace(self._final)
        sync_folder(self._final.parent)


class StretchWriter:
    """Writes one stretch of a file, in order; other threads may write other stretches at the same time."""

    def __init__(self, path: Path, at: int, see: Callable[[memoryview], None] = lambda written: None) -> None:
        """Open a file that is there already.

        Args:
            path: The file.
            at: Where the stretch begins, in bytes from the file's start.
            see: Called with all bytes, in order, before they are written.

        Raises:
            OSError: It cannot be opened.
        """
        self._see = see
        self._buffer, self._filled = memoryview(bytearray(_WRITE_BYTES)), 0
        self._file = FileIO(path, "rb+")
        self._file.seek(at)

    def room(self, size: int) -> memoryview:
        """Return memory for the next `size` bytes, which the caller must fill before the next call.

        Results are computed directly in this memory: copying each block into it took a sixth of a merge's time.

        Raises:
            OSError: The disk refuses what was given before.
        """
        if self._filled + size > len(self._buffer):
            self._put()
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        self._filled += size
        return self._buffer[self._filled - size : self._filled]

    def write(self, data: memoryview) -> None:
        """Write bytes.

        Raises:
            OSError: The disk refuses.
        """
        for at in range(0, len(data), _COPY_BYTES):
            part = data[at : at + _COPY_BYTES]
            self.room(len(part))[:] = part

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Write the rest, unless something went wrong, and close the file."""
        with self._file:
            if kind is None:
                self._put()

    def _put(self) -> None:
        left = self._buffer[: self._filled]
        self._see(left)
        while len(left):
            left = left[self._file.write(left) :]
        self._filled = 0
