"""Batches: the order of rows as a pure function of seed and step, and rows made into tensors beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from studio.jobs.base.labels import IGNORED
from studio.jobs.base.rows import Example
from studio.jobs.train.packing import best_fit, packed

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
    row changes places with the first of the first epoch: a run that is too large for the memory shows it in step 1.
    """

    def __init__(self, examples: Sequence[Example], batcher: Batcher, *, rows_per_step: int, seed: int) -> None:
        self._examples = examples
        self._batcher = batcher
        self._per_step = min(rows_per_step, len(examples))
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def rows_of(self, step: int) -> list[Example]:
        """Return the rows of optimizer step `step` (1 is the first)."""
        first = (step - 1) * self._per_step
        return [self._at(position) for position in range(first, first + self._per_step)]

    def of_step(self, step: int) -> list[list[Example]]:
        """Return the micro-batches of a step; how they are cut changes nothing in the summed gradient."""
        return self._batcher.groups(self.rows_of(step))

    def batch(self, rows: Sequence[Example]) -> Batch:
        """Return the model's arguments for the rows of one micro-batch."""
        return self._batcher.batch(rows)

    def _at(self, position: int) -> Example:
        epoch, offset = divmod(position, len(self._examples))
        return self._examples[self._order(epoch)[offset]]

    def _permutation(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng((self._seed, epoch)).permutation(len(self._examples)).tolist()
        if epoch == 0:
            longest = max(range(len(order)), key=lambda place: len(self._examples[order[place]].input_ids))
            order[0], order[longest] = order[longest], order[0]
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
