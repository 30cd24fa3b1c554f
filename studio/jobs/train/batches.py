"""Batches: the order of rows as a pure function of seed and step, and rows made into tensors beside each other.

Where rows are grouped by length they are sorted by it within windows of a random order, cut into micro-batches, and
these are shuffled: what a micro-batch holds is similar, what a step holds next to nothing is (transformers' and
fairseq's way, and its window).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example

_EARLY_STEPS = 20

Batch = dict[str, Any]
"""What the model is called with: tensors `[batch, seq]` and, of packed rows, their lengths."""


@dataclass(frozen=True, slots=True)
class Batcher:
    """How rows become batches: padded beside each other, or packed one behind the other.

    Attributes:
        micro_batch: Most rows of a padded batch.
        pad_id: Token that fills short rows.
        device: Where the batches go.
        packed_tokens: Most tokens of a packed batch; 0 pads.
    """

    micro_batch: int
    pad_id: int
    device: torch.device
    packed_tokens: int = 0

    @property
    def groups_rows(self) -> bool:
        """Whether rows share micro-batches in which the short ones are filled up."""
        return self.micro_batch > 1 and not self.packed_tokens

    def groups(self, rows: Sequence[Example]) -> list[list[Example]]:
        """Return the rows in micro-batches, longest first: least padding, and the one that needs most memory first."""
        ordered = sorted(rows, key=lambda example: -len(example.input_ids))
        if self.packed_tokens:
            return best_fit(ordered, self.packed_tokens)
        return [ordered[start : start + self.micro_batch] for start in range(0, len(ordered), self.micro_batch)]

    def batch(self, rows: Sequence[Example]) -> Batch:
        """Return the model's arguments for the rows of one micro-batch."""
        return packed(rows, self.device) if self.packed_tokens else collate(rows, self.pad_id, self.device)


class StepBatches:
    """The rows of every step: each epoch a new permutation from the seed, epochs joined without a seam.

    Every step gets exactly `rows_per_step` rows (or all, where there are fewer), so steps weigh the same. The longest
    row comes first: a run that is too large for the memory shows it in step 1.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batcher: Batcher,
        *,
        rows_per_step: int,
        seed: int,
        by_length: bool = False,
    ) -> None:
        """Fix the order.

        Args:
            examples: The training rows.
            batcher: How rows become batches.
            rows_per_step: Rows of an optimizer step.
            seed: The order follows from it.
            by_length: Whether the rows of a micro-batch have similar lengths.
        """
        self._examples = examples
        self._lengths = np.array([len(example.input_ids) for example in examples])
        self._batcher = batcher
        self._per_step = min(rows_per_step, len(examples))
        self._seed = seed
        self._by_length = by_length
        self._order = lru_cache(maxsize=2)(self._order_of)

    def rows_of(self, step: int) -> list[Example]:
        """Return the rows of optimizer step `step` (1 is the first)."""
        first = (step - 1) * self._per_step
        return [self._examples[self._at(position)] for position in range(first, first + self._per_step)]

    def of_step(self, step: int) -> list[list[Example]]:
        """Return the micro-batches of a step; how they are cut changes nothing in the summed gradient."""
        return self._batcher.groups(self.rows_of(step))

    def batch(self, rows: Sequence[Example]) -> Batch:
        """Return the model's arguments for the rows of one micro-batch."""
        return self._batcher.batch(rows)

    def typical_rows(self) -> list[Example]:
        """Return the rows of the early step whose number of tokens is nearest to the mean of early steps."""
        steps = range(1, 1 + min(_EARLY_STEPS, len(self._examples) // self._per_step))
        tokens = {step: sum(len(example.input_ids) for example in self.rows_of(step)) for step in steps}
        mean = sum(tokens.values()) / len(tokens)
        return self.rows_of(min(tokens, key=lambda step: abs(tokens[step] - mean)))

    def padding_share(self) -> float:
        """Return which share of the first epoch's tokens is padding, 0 to 1; none of packed rows is."""
        if self._batcher.packed_tokens:
            return 0.0
        lengths = self._lengths[self._order(0)]
        return padding_share(lengths, micro_batch=self._batcher.micro_batch, rows_per_step=self._per_step)

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._examples))
        return self._order(epoch)[offset]

    def _order_of(self, epoch: int) -> list[int]:
        """Return the row numbers of an epoch."""
        random = np.random.default_rng((self._seed, epoch))
        order: list[int] = random.permutation(len(self._examples)).tolist()
        longest = int(np.argmax(self._lengths[order]))
        if epoch == 0:
            order[0], order[longest] = order[longest], order[0]
        if not self._by_length:
            return order
        size = self._batcher.micro_batch
        lead = -epoch * len(order) % size
        order = group_by_length(order, self._lengths, micro_batch=size, lead=min(lead, len(order)), random=random)
        if epoch == 0:
            place = int(np.argmax(self._lengths[order])) // size * size
            order = order[place : place + size] + order[:place] + order[place + size :]
        return order


def loss_tokens(examples: Sequence[Example]) -> int:
    """Return how many tokens have a label that the shift keeps (the first position predicts, it is never predicted)."""
    return sum(int(np.count_nonzero(np.asarray(example.labels)[1:] != IGNORED)) for example in examples)


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Return `input_ids`, `attention_mask`, `labels`, each `[batch, seq]`, padded on the right to the longest row."""
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    ids, mask, labels = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size], mask[row, :size], labels[row, :size] = example.input_ids, 1, example.labels
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def packed(rows: Sequence[Example], device: torch.device) -> Batch:
    """Return the model's arguments for rows in one sequence `[1, tokens]`.

    Positions start anew with every row, and `row_lengths` (on the host) tells the attention where, see
    `packing`; flash kernels read the same from transformers' own names for it. The first token of a row is not
    predicted: what stands before it is another row's end.
    """
    lengths = [len(row.input_ids) for row in rows]
    starts = np.cumsum((0, *lengths))
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
    labels[starts[:-1]] = IGNORED
    arrays = {
        "input_ids": np.concatenate([row.input_ids for row in rows]).astype(np.int64),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "labels": labels,
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(array)[None].to(device) for name, array in arrays.items()}
    borders = torch.from_numpy(starts.astype(np.int32)).to(device)
    return {
        **tensors,
        "attention_mask": None,
        "row_lengths": torch.tensor(lengths),
        **{f"cu_seq_lens_{side}": borders for side in "qk"},
        **{f"max_length_{side}": max(lengths) for side in "qk"},
    }


def best_fit(rows: Sequence[Example], most_tokens: int) -> list[list[Example]]:
    """Return the rows in groups of at most `most_tokens` tokens, each row where it leaves the least room.

    A row longer than that is a group of its own. Given longest first, the groups are few (best-fit decreasing).
    """
    groups: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []
    for row in rows:
        size = len(row.input_ids)
        place = bisect_left(rooms, (size, 0))
        if place == len(rooms):
            groups.append([row])
            room, group = most_tokens - size, len(groups) - 1
        else:
            room, group = rooms.pop(place)
            groups[group].append(row)
            room -= size
        insort(rooms, (room, group))
    return groups


_WINDOW = 50
"""Micro-batches that are sorted together (transformers' `LengthGroupedSampler`): more pads less and mixes less."""


def group_by_length(
    order: Sequence[int], lengths: np.ndarray, *, micro_batch: int, lead: int, random: np.random.Generator
) -> list[int]:
    """Return the row numbers of an epoch in an order of which every `micro_batch` have similar lengths.

    Args:
        order: The row numbers in random order.
        lengths: Tokens of every row, by its number.
        micro_batch: Rows of a micro-batch.
        lead: How many rows come first, as they are: they fill the micro-batch that the epoch before left unfinished.
        random: Shuffles the micro-batches.

    Returns:
        The same numbers; after the lead the micro-batch that holds `order[lead]` is somewhere among the whole ones.
    """
    rows = np.asarray(order)
    groups: list[np.ndarray] = []
    for start in range(lead, len(rows), _WINDOW * micro_batch):
        window = rows[start : start + _WINDOW * micro_batch]
        window = window[np.argsort(-lengths[window], kind="stable")]
        groups += [window[first : first + micro_batch] for first in range(0, len(window), micro_batch)]
    whole = len(groups) if groups and len(groups[-1]) == micro_batch else len(groups) - 1
    mixed = [groups[place] for place in random.permutation(max(0, whole))] + groups[max(0, whole) :]
    grouped: list[int] = np.concatenate([rows[:lead], *mixed]).tolist()
    return grouped


def padding_share(lengths: np.ndarray, *, micro_batch: int, rows_per_step: int) -> float:
    """Return which share of the tokens that go through the model is padding, 0 to 1, over whole steps.

    Args:
        lengths: Tokens of the rows in the order in which they are trained on.
        micro_batch: Rows of a micro-batch; within a step the longest go together.
        rows_per_step: Rows of an optimizer step.
    """
    per_step = min(rows_per_step, len(lengths))
    steps = len(lengths) // per_step
    rows = -np.sort(-lengths[: steps * per_step].reshape(steps, per_step), axis=1)
    starts = np.arange(0, per_step, micro_batch)
    padded = (rows[:, starts] * np.diff(np.append(starts, per_step))).sum()
    return 1.0 - float(rows.sum()) / float(padded)
