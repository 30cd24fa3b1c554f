"""Batches: which rows each step trains on, as a pure function of seed and step, and how they become tensors.

Where rows are grouped by length, a random order is cut into windows, each window is sorted by length and cut into
micro-batches, and the micro-batches are shuffled. The rows of a micro-batch are then of similar length, while the
micro-batches of a step are not. transformers and fairseq do the same; the window is transformers'.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from studio.core.recipe import Recipe
from studio.jobs.base.data.stored_examples import StoredExamples
from studio.jobs.train.objectives import Batch, Encoded, Objective, sequences
from studio.jobs.train.objectives.pairs import Pairs
from studio.jobs.train.objectives.supervised import SUPERVISED

_EARLY_STEPS = 20


@dataclass(frozen=True, slots=True)
class Batcher:
    """How rows become batches: padded to the same length, or packed into one sequence.

    Attributes:
        micro_batch: Most rows of a padded batch.
        pad_id: The token that fills short rows.
        device: Where the batches go.
        packed_tokens: Most tokens of a packed batch; 0 for padded rows.
        objective: Makes the tensors.
    """

    micro_batch: int
    pad_id: int
    device: torch.device
    packed_tokens: int = 0
    objective: Objective = SUPERVISED

    def of_rows(self, rows: int) -> "Batcher":
        """Return the same way with batches of so many rows at most, or so much room for packed ones."""
        return replace(self, micro_batch=rows, packed_tokens=self.packed_tokens * rows // self.micro_batch)

    def groups(self, rows: Sequence[Encoded]) -> list[list[Encoded]]:
        """Return the rows in micro-batches, longest rows first.

        That pads least, and the micro-batch that needs most memory comes first.
        """
        if self.packed_tokens:
            return best_fit(sorted(rows, key=lambda example: -len(example.input_ids)), self.packed_tokens)
        ordered = sorted(rows, key=lambda example: -_padded(example))
        return [ordered[start : start + self.micro_batch] for start in range(0, len(ordered), self.micro_batch)]

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Return the rows of one micro-batch as tensors."""
        return self.objective.batch(rows, pad_id=self.pad_id, device=self.device, packed=self.packed_tokens > 0)


class StepBatches:
    """The rows of every step. Each epoch is a new permutation from the seed; a step may reach into the next epoch.

    Every step gets exactly `rows_per_step` rows (or all, where there are fewer), so that all steps weigh the same. The
    longest row comes first: a run that is too large for the memory fails in step 1.

    Attributes:
        by_length: Of how many rows the groups of similar length are, in which the rows are ordered; 0 for none.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        batcher: Batcher,
        *,
        rows_per_step: int,
        seed: int,
        by_length: int = 0,
    ) -> None:
        """Prepare the order of the rows.

        Args:
            examples: The training rows.
            batcher: How rows become batches.
            rows_per_step: Rows of an optimizer step.
            seed: Determines the order.
            by_length: Of how many rows the groups of similar length are, in which the rows are ordered; 0 for none.
        """
        self._examples = examples
        if isinstance(examples, StoredExamples):
            self._lengths = self._tokens = examples.lengths.astype(np.int64)
        elif isinstance(examples, Pairs):
            self._lengths, self._tokens = 2 * examples.lengths.max(1), examples.lengths.sum(1)
        else:
            self._lengths = np.array([_padded(example) for example in examples])
            self._tokens = np.array([len(example.input_ids) for example in examples])
        self._batcher = batcher
        self._per_step = min(rows_per_step, len(examples))
        self._seed = seed
        self.by_length = by_length
        # Two epochs, because a step may lie in both. Cached per object, so that it ends with the object.
        self._order = lru_cache(maxsize=2)(self._order_of)

    def cut_by(self, batcher: Batcher) -> None:
        """Cut the steps into other micro-batches from now on; the rows of each step stay the same."""
        self._batcher = batcher

    @property
    def batcher(self) -> Batcher:
        """How rows become batches now."""
        return self._batcher

    def largest_tokens(self) -> int:
        """Return the tokens of the first step's largest micro-batch, padding included: the longest row is in it."""
        return max(int(self.batch(group)["input_ids"].numel()) for group in self.of_step(1))

    def rows_of(self, step: int) -> list[Encoded]:
        """Return the rows of optimizer step `step` (1 is the first)."""
        first = (step - 1) * self._per_step
        return [self._examples[self._at(position)] for position in range(first, first + self._per_step)]

    def of_step(self, step: int) -> list[list[Encoded]]:
        """Return the micro-batches of a step; the summed gradient does not depend on how they are cut."""
        return self._batcher.groups(self.rows_of(step))

    def batch(self, rows: Sequence[Encoded]) -> Batch:
        """Return the rows of one micro-batch as tensors."""
        return self._batcher.batch(rows)

    def denominator(self, rows: Sequence[Encoded]) -> int:
        """Return what the rows' summed loss is divided by, as the objective says."""
        return self._batcher.objective.denominator(rows)

    def typical_rows(self) -> list[Encoded]:
        """Return the rows of that early step whose number of tokens is nearest to the early steps' mean."""
        steps = range(1, 1 + min(_EARLY_STEPS, len(self._examples) // self._per_step))
        tokens = {step: sum(len(example.input_ids) for example in self.rows_of(step)) for step in steps}
        mean = sum(tokens.values()) / len(tokens)
        return self.rows_of(min(tokens, key=lambda step: abs(tokens[step] - mean)))

    def seen_by(self, step: int) -> list[int]:
        """Return the places of all rows that the steps up to this one train on, in the order of the rows."""
        positions = step * self._per_step
        if positions >= len(self._examples):
            return list(range(len(self._examples)))
        return sorted(self._at(position) for position in range(positions))

    def padding_share(self) -> float:
        """Return which share of the first epoch's tokens is padding, 0 to 1; packed rows have none."""
        if self._batcher.packed_tokens:
            return 0.0
        lengths = self._lengths[self._order(0)]
        between = padding_share(lengths, micro_batch=self._batcher.micro_batch, rows_per_step=self._per_step)
        # The shorter side of a pair is padded to the longer one.
        within = float(self._tokens.sum()) / float(self._lengths.sum())
        return between if within == 1.0 else 1 - (1 - between) * within

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
        if not self.by_length:
            return order
        size = self.by_length
        # Rows of this epoch that complete the micro-batch which the epochs before it have left unfinished.
        lead = -epoch * len(order) % size
        order = group_by_length(order, self._lengths, micro_batch=size, lead=min(lead, len(order)), random=random)
        if epoch == 0:
            # Shuffling has moved the micro-batch with the longest row; it becomes the first one again.
            place = int(np.argmax(self._lengths[order])) // size * size
            order = order[place : place + size] + order[:place] + order[place + size :]
        return order


def step_batches(recipe: Recipe, rows: Sequence[Encoded], batcher: Batcher, by_length: int) -> StepBatches:
    """Return the rows of every step as a recipe asks for them; `by_length` as for `StepBatches`."""
    per_step, seed = recipe.rows_per_step, recipe.train.seed
    return StepBatches(rows, batcher, rows_per_step=per_step, seed=seed, by_length=by_length)


def rows_of_like_length(recipe: Recipe, first: Mapping[str, Any]) -> int:
    """Return of how many rows the groups of similar length are in which the rows are ordered; 0 for none.

    That follows from the recipe alone, never from a measurement (so not with packing `auto`): otherwise two runs of one
    recipe could see different rows at a step, and a race between two methods would compare orders. It is the
    micro-batch that the run began with: a resume with another one sees the same rows at each step.

    Args:
        recipe: As it was asked for.
        first: The tables of the recipe at the run's first start; empty at that start.
    """
    if not recipe.train.group_by_length or recipe.train.packing != "off":
        return 0
    began = first.get("train")
    rows = began.get("micro_batch") if isinstance(began, dict) else None
    rows = rows if isinstance(rows, int) else recipe.train.micro_batch
    return rows if rows > 1 else 0


def _padded(example: Encoded) -> int:
    """Return the tokens of an example whose sequences, of which pairs have two, are padded to the longest."""
    sides = sequences(example)
    return len(sides) * max(len(side.input_ids) for side in sides)


def best_fit(rows: Sequence[Encoded], most_tokens: int) -> list[list[Encoded]]:
    """Return the rows in groups of at most `most_tokens` tokens; each row goes where it leaves the least room.

    A row longer than that is a group of its own. If the longest rows come first, the groups are few (best-fit
    decreasing).
    """
    groups: list[list[Encoded]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, index of the group), sorted: the first that holds a row fits best
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
"""Micro-batches that are sorted together (as in transformers' `LengthGroupedSampler`). A larger window needs less
padding, but mixes rows less."""


def group_by_length(
    order: Sequence[int], lengths: np.ndarray, *, micro_batch: int, lead: int, random: np.random.Generator
) -> list[int]:
    """Return the row numbers of an epoch, ordered so that each group of `micro_batch` rows has similar lengths.

    Args:
        order: The row numbers in random order.
        lengths: Tokens of every row, by its number.
        micro_batch: Rows of a micro-batch.
        lead: How many rows keep their place at the beginning: they fill the micro-batch that the epoch before left
            unfinished.
        random: Shuffles the micro-batches.

    Returns:
        The same numbers in another order.
    """
    rows = np.asarray(order)
    groups: list[np.ndarray] = []
    for start in range(lead, len(rows), _WINDOW * micro_batch):
        window = rows[start : start + _WINDOW * micro_batch]
        window = window[np.argsort(-lengths[window], kind="stable")]
        groups += [window[first : first + micro_batch] for first in range(0, len(window), micro_batch)]
    # A micro-batch that is not full stays last: the next epoch's lead fills it.
    whole = len(groups) if groups and len(groups[-1]) == micro_batch else len(groups) - 1
    mixed = [groups[place] for place in random.permutation(max(0, whole))] + groups[max(0, whole) :]
    grouped: list[int] = np.concatenate([rows[:lead], *mixed]).tolist()
    return grouped


def padding_share(lengths: np.ndarray, *, micro_batch: int, rows_per_step: int) -> float:
    """Return which share of the tokens that go through the model is padding, 0 to 1, over whole steps.

    Args:
        lengths: Tokens of the rows `[rows]`, in the order in which they are trained on.
        micro_batch: Rows of a micro-batch; within a step the longest rows share one.
        rows_per_step: Rows of an optimizer step.
    """
    per_step = min(rows_per_step, len(lengths))
    steps = len(lengths) // per_step
    # [steps, rows of a step], longest first in each step, as `Batcher.groups` has them.
    rows = -np.sort(-lengths[: steps * per_step].reshape(steps, per_step), axis=1)
    starts = np.arange(0, per_step, micro_batch)
    # Every row of a micro-batch becomes as long as its first one.
    padded = (rows[:, starts] * np.diff(np.append(starts, per_step))).sum()
    return 1.0 - float(rows.sum()) / float(padded)
