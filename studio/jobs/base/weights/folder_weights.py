"""Matches the tensors in a model folder's files with the model's parameters in memory, in both directions.

transformers 5 renames, stacks and splits tensors while it loads them: a mixture's experts are single tensors on disk
and one 3-D parameter in memory. Its own rules are used here, as `convert_and_load_state_dict_in_model` applies them.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from studio.core.errors import BadInput, JobFailed
from studio.core.text import plain
from studio.jobs.base.weights.skeleton import build_clean
from studio.jobs.base.weights.tensor_files import TensorFiles


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors in the files that are loaded together.

    Attributes:
        keys: Their names in the files.
        names: The parameters in memory that they become; empty where the model does not use them.
        converter: transformers' converter; None where a tensor only gets another name.
        patterns: For each key, which of the converter's patterns it matched.
        target: The converter's name for the result.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    converter: Any = None
    patterns: tuple[str, ...] = ()
    target: str = ""


class CheckpointNames:
    """Converts a checkpoint's tensors into parameters and back, group by group.

    Attributes:
        groups: All groups of tensors, in the order of the files.
    """

    def __init__(self, clean: PreTrainedModel, files: TensorFiles) -> None:
        """Match every tensor of the files with the model's parameters."""
        self._model = clean
        self._known = clean.state_dict()
        self._mapping = get_model_conversion_mapping(clean)
        self._renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        self.groups = self._group(files)
        setattr(clean, "_weight_conversions", self._mapping)  # noqa: B010  `revert_weight_conversion` reads it

    def load(self, group: Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters in memory that a group's tensors become."""
        if group.converter is None:
            return {name: tensors[key] for key, name in zip(group.keys, group.names, strict=True)}
        converter = deepcopy(group.converter)  # it collects the tensors that are added to it
        for key, pattern in zip(group.keys, group.patterns, strict=True):
            converter.add_tensor(group.target, key, pattern, tensors[key])
        made = converter.convert(group.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def store(self, parameters: dict[str, Tensor], groups: Iterable[Group]) -> dict[str, Tensor]:
        """Return the tensors in the files that parameters in memory become: the reverse of `load`.

        Raises:
            BadInput: transformers cannot undo what it did to this checkpoint.
        """
        stored: dict[str, Tensor] = {}
        for group in groups:
            if group.converter is None:
                stored |= {key: parameters[name] for key, name in zip(group.keys, group.names, strict=True)}
                continue
            back = revert_weight_conversion(self._model, {name: parameters[name] for name in group.names})
            if back.keys() != set(group.keys):
                raise BadInput(
                    f"the tensors of {plain(group.target, one_line=True)} cannot be written as they lie in the base's "
                    "files: this version of transformers does not undo its own conversion. Update it."
                )
            stored |= back
        return stored

    def key_of(self, name: str) -> str:
        """Return the name that a parameter would have in the files, for one that is not in them (a tied head)."""
        key: str = next(iter(revert_weight_conversion(self._model, {name: torch.empty(0, device="meta")})))
        return key

    def _group(self, files: TensorFiles) -> list[Group]:
        plain_groups: list[Group] = []
        converted: dict[str, list[tuple[str, str]]] = {}
        for key in sorted(files.tensors, key=dot_natural_key):
            name, pattern = self._name_of(key)
            if name not in self._known:
                plain_groups.append(Group((key,), ()))
            elif pattern is None:
                plain_groups.append(Group((key,), (name,)))
            else:
                converted.setdefault(name, []).append((key, pattern))
        groups = plain_groups + [self._converted(name, pairs, files) for name, pairs in converted.items()]
        first = {key: place for place, key in enumerate(files.tensors)}
        return sorted(groups, key=lambda group: min(first[key] for key in group.keys))

    def _name_of(self, key: str) -> tuple[str, str | None]:
        prefix = self._model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._known)
        # A rule may rename a tensor that already has the model's name; then it is kept as it is.
        if name not in self._known and key in self._known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=self._known)
        return name, pattern

    def _converted(self, target: str, pairs: list[tuple[str, str]], files: TensorFiles) -> Group:
        by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        keys, patterns = tuple(key for key, _ in pairs), tuple(pattern for _, pattern in pairs)
        # The converter alone knows the names of its results: they are found by converting shapes without numbers.
        trial = Group(keys, (), by_pattern[patterns[0]], patterns, target)
        shapes = {key: torch.empty(files.shape(key), device="meta") for key in keys}
        return Group(keys, tuple(self.load(trial, shapes)), trial.converter, patterns, target)


class FolderWeights:
    """Reads the parameters of a model folder on demand, whole or a few rows of them.

    Attributes:
        clean: The model's structure; its parameters are on the meta device.
        files: The tensors in the files.
        names: Matches tensors with parameters.
        groups: By a parameter's name, the group that it is loaded from; tied parameters are not in it.
    """

    def __init__(self, clean: PreTrainedModel, files: TensorFiles) -> None:
        """Match the model's parameters with the tensors.

        Raises:
            BadInput: A conversion of transformers does not fit the tensors.
        """
        self.clean, self.files = clean, files
        self.names = CheckpointNames(clean, files)
        self.groups = {name: group for group in self.names.groups for name in group.names}
        self._tied: dict[str, str] = dict(getattr(clean, "all_tied_weights_keys", None) or {})

    @classmethod
    def of(cls, folder: Path, vocabulary: int | None = None) -> Self:
        """Return the weights of a folder with config and safetensors.

        Args:
            folder: The folder.
            vocabulary: Number of tokens where it is not the config's: an adapter may bring a larger embedding.

        Raises:
            BadInput: transformers cannot build this model, or a file of it is damaged.
        """
        return cls(build_clean(folder, vocabulary), TensorFiles(folder))

    def read(self, name: str) -> Tensor:
        """Return a parameter by its name in memory, as it is stored.

        Raises:
            JobFailed: The files lack it.
            OSError: A file cannot be read.
        """
        source, group = self._find(name)
        return self.names.load(group, {key: self.files.read(key) for key in group.keys})[source]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `[stop - start, ...]` of a parameter; a converted one is read whole, of others only these rows.

        Raises:
            JobFailed: The files lack it.
            OSError: A file cannot be read.
        """
        _, group = self._find(name)
        return self.read(name)[start:stop] if group.converter else self.files.rows(group.keys[0], start, stop)

    def picked(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return single rows `[rows, ...]` of a parameter.

        Raises:
            JobFailed: The files lack it.
            OSError: A file cannot be read.
        """
        _, group = self._find(name)
        return self.read(name)[list(rows)] if group.converter else self.files.picked(group.keys[0], rows)

    def key_of(self, name: str) -> str | None:
        """Return the tensor in the files that is equal to a parameter; None where it is converted, or not there."""
        group = self.groups.get(self._source_of(name))
        return group.keys[0] if group and group.converter is None else None

    def _source_of(self, name: str) -> str:
        return name if name in self.groups else self._tied.get(name, name)

    def _find(self, name: str) -> tuple[str, Group]:
        source = self._source_of(name)
        if source not in self.groups:
            raise JobFailed(
                "weights_not_found",
                f"the model's files do not hold {plain(name, one_line=True)}",
                "download or copy the model again; if it stays so, report the model's name",
            )
        return source, self.groups[source]
