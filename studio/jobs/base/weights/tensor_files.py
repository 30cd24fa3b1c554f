"""Reads the tensors of a model folder one at a time, by plain reads.

A memory map would do less work, but every page that it ever touched counts as resident until the system takes it back.
"""

import json
from collections.abc import Iterator
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


class TensorFiles:
    """All tensors of a model folder, in the order of its files."""

    def __init__(self, folder: Path) -> None:
        """Read the headers.

        Raises:
            BadInput: A shard is missing or damaged, or holds a format that only quantised checkpoints have.
        """
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for path in _shards(folder):
            header = read_header(path)
            start = 8 + header.header_bytes
            for key, entry in sorted(header.tensors.items(), key=lambda item: item[1].begin):
                if entry.dtype not in TORCH_DTYPES:
                    shown = f"{plain(path.name, one_line=True)} holds {plain(key, one_line=True)} as {entry.dtype}"
                    raise BadInput(f"{shown}; wanted the original 16- or 32-bit weights.")
                self.tensors[key] = Stored(path, start + entry.begin, entry)

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
            _fill(buffer.numpy().data, file, stored.path)
        return buffer.view(stored.dtype).reshape(shape)

    def row_blocks(self, key: str, rows: int) -> Iterator[Tensor]:
        """Yield one matrix as blocks of rows, as it is stored; a block is only good until the next one.

        Raises:
            OSError: The file cannot be read.
            BadInput: It has become shorter since its header was read.
        """
        stored = self.tensors[key]
        count, width = stored.entry.shape
        buffer = torch.empty(rows, width, dtype=stored.dtype)
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            for first in range(0, count, rows):
                block = buffer[: min(rows, count - first)]
                _fill(block.reshape(-1).view(torch.uint8).numpy().data, file, stored.path)
                yield block


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
