"""Reads the tensors of a model folder one at a time, by plain reads.

A memory map would do less work, but every page that it ever touched counts as resident until the system takes it back.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.base.weights.stretches import read_stretch
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
    """A tensor in a file.

    Attributes:
        path: The file.
        offset: Bytes from its start.
        entry: Format and shape.
    """

    path: Path
    offset: int
    entry: TensorEntry

    @property
    def dtype(self) -> torch.dtype:
        """Format of its numbers."""
        return TORCH_DTYPES[self.entry.dtype]

    def pieces(self, piece: int = _PIECE_BYTES, first: int = 0, last: int | None = None) -> Iterator[memoryview]:
        """Yield its bytes in pieces of so many; one is only good until the next.

        Args:
            piece: Bytes of each but the last.
            first: The first byte of the tensor that is wanted.
            last: The byte after the last one; None for all.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        size = (self.entry.size_bytes if last is None else last) - first
        try:
            yield from read_stretch(self.path, self.offset + first, size, piece)
        except EOFError:
            raise BadInput(f"{plain(self.path.name, one_line=True)} became shorter while it was read.") from None


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
        for whole in stored.pieces(max(1, stored.entry.size_bytes)):
            return torch.frombuffer(whole, dtype=stored.dtype).reshape(stored.entry.shape)
        return torch.empty(stored.entry.shape, dtype=stored.dtype)

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
        row_bytes = width * stored.dtype.itemsize
        if not row_bytes:
            return
        last = count if last is None else last
        for block in stored.pieces(rows * row_bytes, first * row_bytes, last * row_bytes):
            yield torch.frombuffer(block, dtype=stored.dtype).view(-1, width)

    def read_rows(self, key: str, wanted: Sequence[int]) -> Tensor:
        """Return some rows of one matrix, in the order asked for, as they are stored.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        stored = self.tensors[key]
        rows = torch.empty(len(wanted), stored.entry.shape[1], dtype=stored.dtype)
        for place, row in enumerate(wanted):
            for block in self.row_blocks(key, 1, row, row + 1):
                rows[place] = block[0]
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


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = json.loads((folder / INDEX).read_text("utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]
