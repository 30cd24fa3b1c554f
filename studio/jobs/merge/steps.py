"""Plans a merge before it begins: which tensors are copied, which are computed, and under which names."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from studio.core.errors import BadInput, JobFailed
from studio.core.text import plain
from studio.jobs.base.weights.dequantized import Change
from studio.jobs.base.weights.folder_weights import FolderWeights, Group
from studio.jobs.base.weights.skeleton import Skeleton
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.base.weights.units import Unit, find_units, merge_unit
from studio.jobs.merge.row_sums import Room, RowSum, RowSums, is_plain, parts_of

SMALLEST_ROW_SUM_BYTES = 2**20
"""Smaller layers are merged whole: they fit the processor's caches, and libraries add up short products in another
order."""


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of the merged files."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of work that gives one or more tensors.

    Attributes:
        outputs: The tensors that it gives, in order.
        copies: The base's tensor that is copied as the one output; None where something is computed.
        groups: The groups of the base's tensors that are read and written again.
        units: The adapted units among them.
        alone: Parameters that have no tensor of their own in the base's files: name in memory, and name in the merged
            files.
        row_sum: How to compute the one output a few rows at a time; None where that does not give the same bits.
    """

    outputs: tuple[Output, ...]
    copies: str | None = None
    groups: tuple[Group, ...] = ()
    units: tuple[Unit, ...] = ()
    alone: tuple[tuple[str, str], ...] = ()
    row_sum: RowSum | None = None


class MergeSteps:
    """The steps of a merge.

    Attributes:
        skeleton: Base and adapter as structure.
        files: The base's tensors.
        names: Matches the files' tensors with the model's parameters.
        changed: Names of the parameters that are changed before the adapter is added.
        row_sums: Computes row sums.
        untied: Whether the head becomes another than the embedding, which it shares in the base.
        steps: All steps, in the order of the base's files.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        files: TensorFiles,
        *,
        dtype: torch.dtype | None = None,
        change: Change | None = None,
        changed: frozenset[str] = frozenset(),
    ) -> None:
        """Plan the steps.

        Args:
            skeleton: Base and adapter as structure.
            files: The base's tensors.
            dtype: New dtype of all floating-point tensors; None keeps each tensor's own.
            change: Applied to the base's parameters named in `changed`, before the adapter is added.
            changed: Names in memory.

        Raises:
            BadInput: The adapter changes something that the base's files do not hold, or that cannot be written back.
        """
        self.skeleton, self.files = skeleton, files
        self._base = FolderWeights(skeleton.clean, files)
        self.names = self._base.names
        self._dtype, self._change, self.changed = dtype, change, changed
        self._shapes = {name: tuple(value.shape) for name, value in skeleton.clean.state_dict().items()}
        self._groups = dict(self._base.groups)
        self._tied, self._dropped = self._really_tied()
        self.row_sums = RowSums(files)
        self._units = {name: unit for unit in find_units(skeleton.adapted) for name in _merged_names(unit)}
        self.untied = self._untied()
        self._touched = self._units.keys() | skeleton.replaced.keys() | changed
        self.steps = self._steps() + self._without_source()

    def compute(self, step: Step) -> dict[str, Tensor]:
        """Return the tensors of a step that is no copy, by name, in the dtypes of its outputs.

        Raises:
            BadInput: A tensor would get another shape than planned.
            JobFailed: A number is not finite.
            OSError: A file cannot be read.
        """
        parameters: dict[str, Tensor] = {}
        for unit in step.units:
            parameters |= merge_unit(unit, self.read)
        for name in [name for group in step.groups for name in group.names] + [name for name, _ in step.alone]:
            if name not in parameters:
                parameters[name] = self.read(name)
        stored = self.names.store(parameters, step.groups) | {key: parameters[name] for name, key in step.alone}
        made = {}
        for output in step.outputs:
            tensor = stored.pop(output.key).to(output.dtype).contiguous()
            if tensor.shape != output.shape:
                raise BadInput(f"{plain(output.key, one_line=True)} would get another shape: {tuple(tensor.shape)}.")
            made[output.key] = _finite(tensor, output)
        return made

    def blocks(self, row_sum: RowSum, output: Output, room: Room) -> Iterator[Tensor]:
        """Yield the one tensor of a step that has a row sum, as blocks of rows.

        Args:
            row_sum: The step's row sum.
            output: The step's one output.
            room: Returns the memory for each block.

        Raises:
            JobFailed: A number is not finite.
            OSError: A file cannot be read.
        """
        return (_finite(block, output) for block in self.row_sums.blocks(row_sum, room))

    def read(self, name: str) -> Tensor:
        """Return a parameter of the base, or the one that the adapter brings in its place, by its name in memory.

        Raises:
            OSError: A file cannot be read.
        """
        if name in self.skeleton.replaced:
            return self.skeleton.replaced[name]
        self._group_of(name)
        value = self._base.read(name)
        self._check_shape(name, tuple(value.shape))
        return self._change(name, value) if self._change and name in self.changed else value

    def key_of(self, name: str) -> str | None:
        """Return the tensor in the files that is equal to a parameter; None where it is computed, or not there."""
        return None if name in self.skeleton.replaced or name in self.changed else self._base.key_of(name)

    def _really_tied(self) -> tuple[dict[str, str], set[str]]:
        """Return which parameters share another one's values, and the names of tensors in the files that repeat it.

        If the files hold two tensors that differ, transformers loads both, whatever the config says: they are not tied.
        """
        tied: dict[str, str] = {}
        repeated: set[str] = set()
        for name, of in self.skeleton.tied.items():
            group, other = self._groups.get(name), self._groups.get(of)
            if group and other:
                if not self.files.are_equal(group.keys[0], other.keys[0]):
                    continue
                repeated.update(group.keys)
                del self._groups[name]
            tied[name] = of
        return tied, repeated

    def _untied(self) -> bool:
        """Return whether parameters that are tied in the base differ after the merge.

        An adapter on one of them does not act through the other. peft's own merge would change both.
        """
        for name, of in self._tied.items():
            made = [self._value_if_touched(one) for one in (name, of)]
            if (made[0] is None) != (made[1] is None):
                return True
            if made[0] is not None and made[1] is not None and not torch.equal(made[0], made[1]):
                return True
        return False

    def _value_if_touched(self, name: str) -> Tensor | None:
        if unit := self._units.get(name):
            return merge_unit(unit, self.read)[name]
        return self.skeleton.replaced.get(name)

    def _steps(self) -> list[Step]:
        done: set[str] = set(self._dropped)
        steps: list[Step] = []
        for group in self.names.groups:
            if group.keys[0] in done:
                continue
            if not self._touched & set(group.names):
                if group.converter is None and group.names:
                    self._check_shape(group.names[0], self.files.shape(group.keys[0]))
                steps += [self._copy(key, key) for key in group.keys]
                done.update(group.keys)
                continue
            step = self._around(group)
            done.update(key for member in step.groups for key in member.keys)
            steps.append(step)
        return steps

    def _around(self, group: Group) -> Step:
        """Return a step with all units and groups that must be computed together to write a group.

        A unit may have parameters in several groups, and a group parameters of several units, so both are followed
        until nothing is added.
        """
        groups, units, names = [group], list[Unit](), list(group.names)
        seen: set[str] = set()
        while names:
            name = names.pop()
            if name in seen:
                continue
            seen.add(name)
            unit = self._units.get(name)
            if unit and unit not in units:
                units.append(unit)
                names += _merged_names(unit)
            member = self._groups.get(name)
            if member and member not in groups:
                groups.append(member)
                names += member.names
        outputs = [self._output(key, key, self._shape_of(member)) for member in groups for key in member.keys]
        step = Step(tuple(outputs), groups=tuple(groups), units=tuple(units))
        return replace(step, row_sum=self._row_sum(step))

    def _row_sum(self, step: Step) -> RowSum | None:
        if len(step.outputs) != 1 or len(step.units) != 1 or step.groups[0].converter or not is_plain(step.units[0]):
            return None
        (output,), (name,) = step.outputs, step.groups[0].names
        small = output.size_bytes < SMALLEST_ROW_SUM_BYTES
        if small or name in self.changed or output.shape != self.files.shape(output.key):
            return None
        row_sum = RowSum(output.key, output.dtype, parts_of(step.units[0]))
        return row_sum if self.row_sums.can(row_sum) else None

    def _shape_of(self, group: Group) -> tuple[int, ...] | None:
        """Return the model's shape of a tensor that is not converted; the file's is smaller if tokens were added."""
        return self._shapes[group.names[0]] if group.converter is None else None

    def _without_source(self) -> list[Step]:
        """Return steps for parameters that get a tensor of their own although the base's files have none."""
        wanted = set(self._tied) if self.untied else self._touched - self._groups.keys() - self._tied.keys()
        steps = []
        for name in sorted(wanted):
            source, key = self._group_of(name).keys[0], self.names.key_of(name)
            if name not in self._touched:
                self._check_shape(name, self.files.shape(source))
                steps.append(self._copy(source, key))
                continue
            units = (self._units[name],) if name in self._units else ()
            steps.append(Step((self._output(source, key, self._shapes[name]),), units=units, alone=((name, key),)))
        return steps

    def _group_of(self, name: str) -> Group:
        group = self._groups.get(self._tied.get(name, name))
        if group is None:
            raise BadInput(f"the base's files do not hold {plain(name, one_line=True)}, which the adapter changes.")
        return group

    def _check_shape(self, name: str, found: tuple[int, ...]) -> None:
        if found != self._shapes[name]:
            raise BadInput(
                f"the base's {plain(name, one_line=True)} has the shape {list(found)}; base and adapter together want "
                f"{list(self._shapes[name])}. Where tokens were added, the adapter must hold embeddings and head whole."
            )

    def _copy(self, source: str, key: str) -> Step:
        return Step((self._output(source, key),), copies=source)

    def _output(self, source: str, key: str, shape: tuple[int, ...] | None = None) -> Output:
        dtype = self.files.dtype(source)
        if self._dtype is not None and dtype.is_floating_point:
            dtype = self._dtype
        return Output(key, dtype, self.files.shape(source) if shape is None else shape)


def _merged_names(unit: Unit) -> tuple[str, ...]:
    """Return the names of the parameters that merging a unit changes: in a plain linear layer not the bias."""
    return (f"{unit.name}.weight",) if is_plain(unit) else unit.parameters


def _finite(tensor: Tensor, output: Output) -> Tensor:
    # The sum is NaN or infinite if any number is, and takes half of the time that the extremes take. But a sum of
    # finite numbers can overflow too, so then the extremes decide.
    sound = not tensor.numel() or math.isfinite(float(tensor.sum()))
    if not sound and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        raise JobFailed(
            "merged_nonfinite",
            f"the merged tensor {plain(output.key, one_line=True)} holds NaN or infinity in {output.dtype}",
            "look at the adapter's last losses; if they are sound, merge with --dtype bf16 or --dtype fp32",
        )
    return tensor
