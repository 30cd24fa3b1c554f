"""Parameters of a model folder by their names in memory: whole, or a few rows of a large one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from studio.core.errors import BadInput, JobFailed
from studio.core.text import plain
from studio.jobs.base.weights.checkpoint_names import CheckpointNames, Group
from studio.jobs.base.weights.skeleton import build_clean
from studio.jobs.base.weights.tensor_files import TensorFiles


class FolderWeights:
    """Reads what a model needs, when it needs it.

    Attributes:
        clean: The model's structure; parameters are on the meta device.
        files: The tensors.
    """

    def __init__(self, folder: Path, vocabulary: int | None = None) -> None:
        """Build the structure and read the headers.

        Args:
            folder: Holds config and safetensors.
            vocabulary: Number of tokens, where an adapter brings an embedding of another size.

        Raises:
            BadInput: transformers cannot build this model, or a file of it is damaged.
        """
        self.clean: PreTrainedModel = build_clean(folder, vocabulary)
        self.files = TensorFiles(folder)
        self._names = CheckpointNames(self.clean, self.files)
        self._groups = {name: group for group in self._names.groups for name in group.names}
        self._tied: dict[str, str] = dict(getattr(self.clean, "all_tied_weights_keys", None) or {})

    def read(self, name: str) -> Tensor:
        """Return a parameter by its name in memory, as it is stored.

        Raises:
            JobFailed: The files lack it.
            OSError: A file cannot be read.
        """
        source, group = self._find(name)
        return self._names.load(group, {key: self.files.read(key) for key in group.keys})[source]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `[stop - start, ...]` of a parameter, reading only those where its tensor is stored as it is.

        Raises:
            JobFailed: The files lack it.
            BadInput: A file became shorter since its header was read.
            OSError: A file cannot be read.
        """
        _, group = self._find(name)
        if group.converter is not None:
            return self.read(name)[start:stop]
        stored = self.files.tensors[group.keys[0]]
        count, *rest = stored.entry.shape
        rows, row_bytes = min(stop, count) - start, stored.entry.size_bytes // count
        with stored.path.open("rb") as file:
            file.seek(stored.offset + start * row_bytes)
            data = bytearray(file.read(rows * row_bytes))
        if len(data) != rows * row_bytes:
            raise BadInput(f"{plain(stored.path.name, one_line=True)} became shorter while it was read.")
        return torch.frombuffer(data, dtype=stored.dtype).reshape(rows, *rest)

    def picked(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return single rows `[rows, ...]` of a parameter.

        Raises:
            JobFailed: The files lack it.
            OSError: A file cannot be read.
        """
        return torch.cat([self.rows(name, row, row + 1) for row in rows])

    def _find(self, name: str) -> tuple[str, Group]:
        source = name if name in self._groups else self._tied.get(name, name)
        group = self._groups.get(source)
        if group is None:
            raise JobFailed(
                "weights_not_found",
                f"the model's files do not hold {plain(name, one_line=True)}",
                "download or copy the model again; if it stays so, report the model's name",
            )
        return source, group
