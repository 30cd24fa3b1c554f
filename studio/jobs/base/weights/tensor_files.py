"""Reads the tensors of a model folder one at a time, whole or a few rows of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.model_folder import weight_files
from studio.probe.safetensors_file import stored_in

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""dtypes of checkpoints that are not quantised, by their names in safetensors."""
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
BLOCK_ELEMENTS = 2**18
"""Numbers in a block of a matrix: 1 MiB in fp32, so that a core's second-level cache holds it with what is added."""
PIECE_BYTES = 2**19
"""Bytes read at once: few enough that they are still in a core's second-level cache when they are used."""


class TensorFiles:
    """All tensors of a model folder, in the order of its files.

    Attributes:
        folder: The folder.
        tensors: By name, where each tensor lies.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            BadInput: A shard is missing or damaged, or holds a format that only quantised checkpoints have.
        """
        self.folder = folder
        self.tensors = {key: stored for path in weight_files(folder) for key, stored in stored_in(path).items()}
        for key, stored in self.tensors.items():
            if stored.entry.dtype not in TORCH_DTYPES:
                shown = f"{plain(stored.path.name, one_line=True)} holds {plain(key, one_line=True)}"
                raise BadInput(f"{shown} as {stored.entry.dtype}; wanted the original 16- or 32-bit weights.")

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return TORCH_DTYPES[self.tensors[key].entry.dtype]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.tensors[key].entry.shape

    def read(self, key: str) -> Tensor:
        """Return one tensor as it is stored.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        made = torch.empty(self.shape(key), dtype=self.dtype(key))
        self._fill(made, key, 0)
        return made

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Return rows `[last - first, ...]` of a tensor as it is stored; fewer where it ends before `last`.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        count, *rest = self.shape(key)
        made = torch.empty(min(last, count) - first, *rest, dtype=self.dtype(key))
        self._fill(made, key, first)
        return made

    def picked(self, key: str, rows: Sequence[int]) -> Tensor:
        """Return single rows `[rows, ...]` of a tensor, in the order asked for, as they are stored.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        made = torch.empty(len(rows), *self.shape(key)[1:], dtype=self.dtype(key))
        for place, row in enumerate(rows):
            self._fill(made[place : place + 1], key, row)
        return made

    def row_blocks(self, key: str, rows: int, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield the rows of one matrix in blocks, as it is stored; the next block overwrites the one before.

        Args:
            key: Name of the matrix `[rows, columns]`.
            rows: Rows of a block.
            first: The first row.
            last: The row after the last one; None for all.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        count, width = self.shape(key)
        last = count if last is None else last
        block = torch.empty(min(rows, last - first), width, dtype=self.dtype(key))
        row_bytes = width * block.itemsize
        if not row_bytes:
            return
        for piece in self.tensors[key].pieces(bytes_of(block), first * row_bytes, last * row_bytes):
            yield block[: len(piece) // row_bytes]

    def are_equal(self, key: str, other: str) -> bool:
        """Return whether two tensors have the same dtype, shape and bytes.

        Raises:
            OSError: A file cannot be read.
            BadInput: One has become shorter since its header was read.
        """
        one, two = self.tensors[key], self.tensors[other]
        if (one.entry.dtype, one.entry.shape) != (two.entry.dtype, two.entry.shape):
            return False
        pieces = (stored.pieces(memoryview(bytearray(PIECE_BYTES))) for stored in (one, two))
        return all(piece == same for piece, same in zip(*pieces, strict=True))

    def _fill(self, made: Tensor, key: str, first: int) -> None:
        """Fill a contiguous tensor with rows of a stored one, beginning at row `first`."""
        room = bytes_of(made)
        if room:
            begin = first * (len(room) // len(made)) if made.dim() else 0
            for _ in self.tensors[key].pieces(room, begin, begin + len(room)):
                pass


def block_rows(count: int, width: int, apart: int = 1) -> int:
    """Return how many of `count` rows of `width` numbers make a block: a multiple of `apart`, unless count is less."""
    return min(count, max(1, BLOCK_ELEMENTS // max(1, width) // apart) * apart)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view
