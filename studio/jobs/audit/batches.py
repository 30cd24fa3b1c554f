"""Rows side by side without a mask: a decoder's token never sees what is padded behind it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example

TOKENS_AT_ONCE = 512
"""Padded tokens of a batch: activations stay small, and a weight that is cast or dequantised is used often enough."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows, padded on the right.

    Attributes:
        rows: Their places among all rows.
        ids: `[rows, seq]`.
        real: Which tokens are no padding, `[rows, seq]`.
        wanted: Where a token with a label follows, `[rows, seq]`.
        targets: The labels that follow there, in order, `[tokens]`.
    """

    rows: tuple[int, ...]
    ids: Tensor
    real: Tensor
    wanted: Tensor
    targets: Tensor

    @property
    def tokens_of_rows(self) -> tuple[int, ...]:
        """How many wanted tokens each row has."""
        return tuple(int(count) for count in self.wanted.sum(-1))


def batches_of(examples: Sequence[Example], *, by_row: bool = False, most: int = TOKENS_AT_ONCE) -> list[Batch]:
    """Return the rows in batches, the longest first; one row each where asked for."""
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    made: list[list[int]] = []
    for place in order:
        longest = len(examples[made[-1][0]].input_ids) if made else 0
        if by_row or not made or longest * (len(made[-1]) + 1) > most:
            made.append([])
        made[-1].append(place)
    return [_batch(examples, places) for places in made]


def _batch(examples: Sequence[Example], places: Sequence[int]) -> Batch:
    width = max(len(examples[place].input_ids) for place in places)
    ids = torch.zeros(len(places), width, dtype=torch.long)
    labels = torch.full((len(places), width), IGNORED)
    real = torch.zeros(len(places), width, dtype=torch.bool)
    for row, place in enumerate(places):
        example = examples[place]
        size = len(example.input_ids)
        ids[row, :size] = torch.from_numpy(example.input_ids).long()
        labels[row, : size - 1] = torch.from_numpy(example.labels[1:]).long()
        real[row, :size] = True
    wanted = labels != IGNORED
    return Batch(tuple(places), ids, real, wanted, labels[wanted])
