"""A file of merged tensors: its layout, known before the first byte, and the writing of it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64

from studio.jobs.base.weights.stretches import StretchWriter
from studio.jobs.base.weights.tensor_files import DTYPE_NAMES
from studio.jobs.merge.steps import Output
from studio.runs.atomic import sync_folder, write_whole

SUMS = ".sums"
"""Behind a shard's name: the file of its checksums, while the folder is not whole."""
_ALIGN_BYTES = 8


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

    @property
    def places(self) -> dict[str, int]:
        """Where each tensor begins, in bytes from the start of the file."""
        at = len(self.header)
        found = {}
        for output in self.outputs:
            found[output.key] = at
            at += output.size_bytes
        return found


class OpenShard:
    """A shard that is being written, under another name until it is whole; its tensors may come in any order."""

    def __init__(self, folder: Path, shard: Shard, sums: dict[str, str] | None = None) -> None:
        """Write the header.

        Args:
            folder: Where to.
            shard: What it will hold.
            sums: Gets the checksums of its tensors, once the shard is whole.

        Raises:
            OSError: The disk refuses.
        """
        self._final, self._aside = folder / shard.name, folder / f".{shard.name}.part"
        self._places, self._all_sums = shard.places, sums
        self._sums: dict[str, str] = {}
        with self._aside.open("wb") as file:
            file.write(shard.header)
            file.truncate(len(shard.header) + shard.size_bytes)

    @contextmanager
    def writing(self, key: str) -> Iterator[StretchWriter]:
        """Take the bytes of a tensor, in order.

        Raises:
            OSError: The disk refuses.
        """
        hashed = xxh3_64()
        with StretchWriter(self._aside, self._places[key], hashed.update) as stretch:
            yield stretch
        self._sums[key] = hashed.hexdigest()

    def flush(self) -> None:
        """Wait until the disk has what was written so far, and leave the system's cache to others.

        New pages then cost less (tests/bench/merge_results.md), and what is read back is what the disk holds.

        Raises:
            OSError: The disk refuses.
        """
        with self._aside.open("rb+") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Flush to the disk and give the file its name.

        Raises:
            OSError: The disk refuses.
        """
        self.flush()
        if self._all_sums is not None:
            self._all_sums |= self._sums
            # Before the shard has its name, so that there is no shard without sums.
            write_whole(self._final.with_name(self._final.name + SUMS), json.dumps(self._sums))
        self._aside.replace(self._final)
        sync_folder(self._final.parent)

    def abandon(self) -> None:
        """Leave no result."""
        self._aside.unlink(missing_ok=True)
