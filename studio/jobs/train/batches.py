"""Which rows each optimizer step sees, and how they become tensors: a function of seed and step, nothing to save."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from studio.jobs.train.loss import IGNORED
from studio.jobs.train.rows import Example


class StepBatches:
    """The rows of every step: each epoch a new permutation from the seed, epochs joined without a seam.

    Every step gets exactly `micro_batch * accumulation` rows (or all, where there are fewer), so steps weigh the same.
    """

    def __init__(self, examples: Sequence[Example], *, micro_batch: int, accumulation: int, seed: int) -> None:
        self._examples = examples
        self._micro_batch = micro_batch
        self._per_step = min(micro_batch * accumulation, len(examples))
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def of_step(self, step: int) -> list[list[Example]]:
        """Return the micro-batches of optimizer step `step` (1 is the first).

        Within the step rows are sorted by length, longest first: the summed gradient is the same, with less padding.
        """
        first = (step - 1) * self._per_step
        rows = [self._at(position) for position in range(first, first + self._per_step)]
        rows.sort(key=lambda example: -len(example.input_ids))
        return [rows[start : start + self._micro_batch] for start in range(0, len(rows), self._micro_batch)]

    def _at(self, position: int) -> Example:
        epoch, offset = divmod(position, len(self._examples))
        return self._examples[self._order(epoch)[offset]]

    def _permutation(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng((self._seed, epoch)).permutation(len(self._examples)).tolist()
        return order


def loss_tokens(examples: Sequence[Example]) -> int:
    """Return how many tokens have a label that the shift keeps (the first position predicts, it is never predicted)."""
    return sum(int(np.count_nonzero(np.asarray(example.labels)[1:] != IGNORED)) for example in examples)


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask`, `labels`, each `[batch, seq]`, padded on the right to the longest row."""
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    ids, mask, labels = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size], mask[row, :size], labels[row, :size] = example.input_ids, 1, example.labels
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def evaluation_batches(examples: Sequence[Example], micro_batch: int) -> Iterator[list[Example]]:
    """Yield the held-out rows in micro-batches no larger than training's, longest rows first, least padding."""
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    for start in range(0, len(ordered), micro_batch):
        yield ordered[start : start + micro_batch]
