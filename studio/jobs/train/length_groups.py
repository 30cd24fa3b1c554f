"""Rows of similar length side by side: an order of an epoch in which padded micro-batches hold little padding.

Rows are sorted by length within windows of a random order, cut into micro-batches, and these are shuffled: what a
micro-batch holds is similar, what a step holds next to nothing is (transformers' and fairseq's way, and its window).
"""

from collections.abc import Sequence

import numpy as np

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
