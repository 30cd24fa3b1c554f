"""Reads the tensors of a model folder one at a time, by plain reads.

A memory map would do less work, but every page that it ever touched counts as resident until the system takes it back.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import torch
from torch import Tensor

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.model_folder import INDEX, WEIGHTS
from studio.probe.safetensors_header import TensorEntry, read_header

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""Formats of a checkpoint that is not quantised, by their name in safetensors."""
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
BLOCK_ELEMENTS = 2**18
"""1 MiB in fp32: a core's second cache holds a block of a matrix and what it is added to."""
_PIECE_BYTES = 2**19
"""A core's second cache holds it, for who looks at the bytes next."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file; `offset` is bytes from the start of the file."""

    path: Path
    offset: int
    entry: TensorEntry

    @property
    def dtype(self) -> torch.dtype:
        """Format of its numbers."""
        return TORCH_DTYPES[self.entry.dtype]

    def pieces(self) -> Iterator[memoryview]:
        """Yield its bytes in pieces; one is only good until the next.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        view = memoryview(bytearray(min(_PIECE_BYTES, self.entry.size_bytes)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for at in range(0, self.entry.size_bytes, _PIECE_BYTES):
                piece = view[: self.entry.size_bytes - at]
                _fill(piece, file, self.path)
                yield piece


class TensorFiles:
    """All tensors of a model folder, in the order of its files."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            BadInput: A shard is missing or damaged, or holds a format that only quantised checkpoints have.
        """
        self.folder = folder
        self.tensors = {key: stored for path in _shards(folder) for key, stored in stored_in(path).items()}

    def read(self, key: str) -> Tensor:
        """Return one tensor as it is stored.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        stored = self.tensors[key]
        shape = stored.entry.shape
        if not stored.entry.size_bytes:
            return torch.empty(shape, dtype=stored.dtype)
        buffer = torch.empty(stored.entry.size_bytes, dtype=torch.uint8)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            _fill(_bytes_of(buffer), file, stored.path)
        return buffer.view(stored.dtype).reshape(shape)

    def row_blocks(self, key: str, rows: int, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield rows of one matrix in blocks, as it is stored; a block is only good until the next one.

        Args:
            key: Of the matrix `[rows, columns]`.
            rows: Of a block.
            first: The first row.
            last: The row after the last one; None for all.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        stored = self.tensors[key]
        count, width = stored.entry.shape
        count = count if last is None else last
        buffer = torch.empty(rows, width, dtype=stored.dtype)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset + first * width * stored.dtype.itemsize)
            for at in range(first, count, rows):
                block = buffer[: min(rows, count - at)]
                _fill(_bytes_of(block), file, stored.path)
                yield block

    def read_rows(self, key: str, wanted: Sequence[int]) -> Tensor:
        """Return some rows of one matrix, in the order asked for, as they are stored.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        stored = self.tensors[key]
        rows = torch.empty(len(wanted), stored.entry.shape[1], dtype=stored.dtype)
        with stored.path.open("rb", buffering=0) as file:
            for place, row in enumerate(wanted):
                file.seek(stored.offset + row * rows.shape[1] * stored.dtype.itemsize)
                _fill(_bytes_of(rows[place]), file, stored.path)
        return rows

    def are_equal(self, key: str, other: str) -> bool:
        """Whether two tensors have the same form and bytes.

        Raises:
            OSError: A file cannot be read.
            BadInput: One has become shorter since its header was read.
        """
        one, two = self.tensors[key], self.tensors[other]
        if (one.dtype, one.entry.shape) != (two.dtype, two.entry.shape):
            return False
        return all(bytes(piece) == bytes(same) for piece, same in zip(one.pieces(), two.pieces(), strict=True))


def stored_in(path: Path) -> dict[str, Stored]:
    """Return the tensors of one file, in its order.

    Raises:
        BadInput: It is damaged, or holds a format that only quantised checkpoints have.
    """
    header = read_header(path)
    start = 8 + header.header_bytes
    found = {}
    for key, entry in sorted(header.tensors.items(), key=lambda item: item[1].begin):
        if entry.dtype not in TORCH_DTYPES:
            shown = f"{plain(path.name, one_line=True)} holds {plain(key, one_line=True)} as {entry.dtype}"
            raise BadInput(f"{shown}; wanted the original 16- or 32-bit weights.")
        found[key] = Stored(path, start + entry.begin, entry)
    return found


def block_rows(count: int, width: int, apart: int = 1) -> int:
    """Return how many of `count` rows of this width make a block: a multiple of `apart` where there are that many."""
    return min(count, max(1, BLOCK_ELEMENTS // max(1, width) // apart) * apart)


def _bytes_of(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def _fill(view: memoryview, file: RawIOBase, path: Path) -> None:
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise BadInput(f"{plain(path.name, one_line=True)} became shorter while it was read.")
        done += got


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = json.loads((folder / INDEX).read_text("utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]
