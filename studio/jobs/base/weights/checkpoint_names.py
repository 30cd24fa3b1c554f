"""Which tensors in the files make which parameters in memory, and back.

transformers 5 renames, stacks and splits tensors while it loads them (a mixture's experts lie one by one on disk and
as one 3-D parameter in memory). The rules are its own; this follows `convert_and_load_state_dict_in_model`.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

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

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.base.weights.tensor_files import TensorFiles


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors in the files that are loaded together.

    Attributes:
        keys: Their names in the files.
        names: The parameters in memory that they become; none where the model does not use them.
        converter: How, where it is more than a new name.
        patterns: For each key, which of the converter's patterns it matched.
        target: The converter's name for the result.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    converter: Any = None
    patterns: tuple[str, ...] = ()
    target: str = ""


class CheckpointNames:
    """The groups of a checkpoint, and the way back."""

    def __init__(self, clean: PreTrainedModel, files: TensorFiles) -> None:
        """Match every tensor of the files with the model's parameters."""
        self._model = clean
        self._known = clean.state_dict()
        self._mapping = get_model_conversion_mapping(clean)
        self._renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        self.groups = self._group(files)
        setattr(clean, "_weight_conversions", self._mapping)  # noqa: B010  what `revert_weight_conversion` undoes

    def load(self, group: Group, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters in memory that a group's tensors become."""
        if group.converter is None:
            return {name: tensors[key] for key, name in zip(group.keys, group.names, strict=True)}
        converter = deepcopy(group.converter)
        for key, pattern in zip(group.keys, group.patterns, strict=True):
            converter.add_tensor(group.target, key, pattern, tensors[key])
        made = converter.convert(group.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def store(self, parameters: dict[str, Tensor], groups: Iterable[Group]) -> dict[str, Tensor]:
        """Return the tensors for the files that parameters in memory become: the way back of `load`.

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
        """Return the name in the files of a parameter that had none there of its own."""
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
        if name not in self._known and key in self._known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=self._known)
        return name, pattern

    def _converted(self, target: str, pairs: list[tuple[str, str]], files: TensorFiles) -> Group:
        by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        keys, patterns = tuple(key for key, _ in pairs), tuple(pattern for _, pattern in pairs)
        trial = Group(keys, (), by_pattern[patterns[0]], patterns, target)
        shapes = {key: torch.empty(files.tensors[key].entry.shape, device="meta") for key in keys}
        return Group(keys, tuple(self.load(trial, shapes)), trial.converter, patterns, target)
