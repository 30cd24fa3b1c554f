"""Rows packed one behind the other in one sequence, without padding and without seeing each other."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example


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


def packed(rows: Sequence[Example], device: torch.device) -> dict[str, Any]:
    """Return the model's arguments for rows in one sequence `[1, tokens]`.

    Positions start anew with every row, and `row_lengths` (on the host) tells the attention where, see
    `row_attention`; flash kernels read the same from transformers' own names for it. The first token of a row is not
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
