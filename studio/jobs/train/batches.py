"""Batches: the order of rows as a pure function of seed and step, and rows made into tensors beside each other.

Where rows are grouped by length they are sorted by it within windows of a random order, cut into micro-batches, and
these are shuffled: what a micro-batch holds is similar, what a step holds next to nothing is (transformers' and
fairseq's way, and its window).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from studio.jobs.train.objectives import Batch, Encoded, Objective
from studio.jobs.train.objectives.supervised import SUPERVISED

_EARLY_STEPS = 20


@dataclass(frozen=True, slots=True)
class Batcher:
    """How rows become batches: padded beside each other, or packed one behind the other.

    Attributes:
        micro_batch: Most rows of a padded batch.
        pad_id: Token that fills short rows.
        device: Where the batches go.
        packed_tokens: Most tokens of a packed batch; 0 pads.
        objective: Makes the tensors.
    """

    micro_batch: int
    pad_id: int
    device: torch.device
    packed_tokens: int = 0
    objective: Objective = SUPERVISED

    @property
    def groups_rows(self) -> bool:
        """Whether rows share micro-batches in which the short ones are filled up."""
        return self.micro_batch > 1 and not self.packed_tokens

    def groups(self, rows: Sequence[Encoded]) -> list[list[Encoded]]:
        """Return the rows in micro-batches, longest first: least padding, and the one that needs most memory first."""
        ordered = sorted(rows, key=lambda example: -len(example.input_ids))
        if self.packed_tokens:
            return best_fit(ordered, self.packed_tokens)
        return [ordered[start : start + self.micro_batch] for start in range(0, len(ordered), self.micro_batch)]

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Return the rows of one micro-batch as tensors."""
        return self.objective.batch(rows, pad_id=self.pad_id, device=self.device, packed=self.packed_tokens > 0)


class StepBatches:
    """The rows of every step: each epoch a new permutation from the seed, epochs joined without a seam.

    Every step gets exactly `rows_per_step` rows (or all, where there are fewer), so steps weigh the same. The longest
    row comes first: a run that is too large for the memory shows it in step 1.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
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

    def rows_of(self, step: int) -> list[Encoded]:
        """Return the rows of optimizer step `step` (1 is the first)."""
        first = (step - 1) * self._per_step
        return [self._examples[self._at(position)] for position in range(first, first + self._per_step)]

    def of_step(self, step: int) -> list[list[Encoded]]:
        """Return the micro-batches of a step; how they are cut changes nothing in the summed gradient."""
        return self._batcher.groups(self.rows_of(step))

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Return the rows of one micro-batch as tensors."""
        return self._batcher.batch(rows)

    def denominator(self, rows: Sequence[Encoded]) -> int:
        """Return what rows count for in the mean loss of a step, as the objective says."""
        return self._batcher.objective.denominator(rows)

    def typical_rows(self) -> list[Encoded]:
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


def best_fit(rows: Sequence[Encoded], most_tokens: int) -> list[list[Encoded]]:
    """Return the rows in groups of at most `most_tokens` tokens, each row where it leaves the least room.

    A row longer than that is a group of its own. Given longest first, the groups are few (best-fit decreasing).
    """
    groups: list[list[Encoded]] = []
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
