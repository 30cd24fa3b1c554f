"""Supervised fine-tuning: the model learns to predict every labelled token from the tokens before it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studio.core.recipe import Recipe
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Encoding, Example
from studio.jobs.base.data.template import Warn
from studio.jobs.base.device import sent
from studio.jobs.train.head import TokenLoss
from studio.jobs.train.objectives import Batch
from studio.probe.data import Row


class Supervised:
    """The mean loss over all labelled tokens of a step, however its rows are cut into micro-batches."""

    packs = True

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        recipe: Recipe,
        *,
        warn: Warn,
        left_out: Counter[str] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Sequence[Example]:
        """Return the rows as token ids and labels: of the answers, or with `data.answers_only` off of every token."""
        examples, report = encode_rows(rows, tokenizer, warn=warn, progress=progress, **asdict(Encoding.of(recipe)))
        if left_out is not None:
            left_out.update(refused_by_template=report.refused, nothing_to_learn=report.dropped)
        return examples

    def longest(self, seq_len: int, vocabulary: int) -> Example:
        """Return a row of `seq_len` tokens that all have a label."""
        ids = (np.arange(seq_len) % max(1, vocabulary)).astype(np.int32)
        return Example(ids, ids.copy())

    def batch(self, examples: Sequence[Example], *, pad_id: int, device: torch.device, packed: bool = False) -> Batch:
        """Return the model's arguments for the rows of one micro-batch."""
        return pack(examples, device) if packed else collate(examples, pad_id, device)

    def loss(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the summed loss of the labelled tokens, fp32 scalar."""
        return tokens.loss_sum(**batch)

    def denominator(self, examples: Sequence[Example]) -> int:
        """Return how many labelled tokens are predicted: all but the first of a row, which nothing precedes."""
        return sum(int(np.count_nonzero(np.asarray(example.labels)[1:] != IGNORED)) for example in examples)

    def metric(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the summed loss of each row, fp32 `[rows]`."""
        return tokens.row_losses(**batch)


SUPERVISED = Supervised()
"""The one instance: it has no settings."""


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Return `input_ids`, `attention_mask`, `labels`, each `[batch, seq]`, padded on the right to the longest row.

    Labels stay on the host, which finds the places of the labelled tokens. Rows of one length need no mask; it is None.
    """
    length = max(len(example.input_ids) for example in examples)
    shape = (len(examples), length)
    # int64 for all three: torch's cross-entropy takes labels in no smaller type.
    ids, mask, labels = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size], mask[row, :size], labels[row, :size] = example.input_ids, 1, example.labels
    return {
        "input_ids": sent(torch.from_numpy(ids), device),
        "attention_mask": None if mask.all() else sent(torch.from_numpy(mask), device),
        "labels": torch.from_numpy(labels),
    }


def pack(rows: Sequence[Example], device: torch.device) -> Batch:
    """Return the model's arguments for rows in one sequence `[1, tokens]`.

    Positions start at 0 in every row. `row_lengths` `[rows]`, on the host, tells the attention of `packing` where rows
    end; `cu_seq_lens_*` and `max_length_*` tell flash kernels the same under transformers' names. The first token of a
    row gets no label, because the token before it belongs to another row. Labels stay on the host, as in `collate`.
    """
    lengths = [len(row.input_ids) for row in rows]
    starts = np.cumsum((0, *lengths))
    labels = np.concatenate([row.labels for row in rows]).astype(np.int64)
    labels[starts[:-1]] = IGNORED
    arrays = {
        "input_ids": np.concatenate([row.input_ids for row in rows]).astype(np.int64),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
    }
    tensors: dict[str, Any] = {name: sent(torch.from_numpy(array)[None], device) for name, array in arrays.items()}
    borders = sent(torch.from_numpy(starts.astype(np.int32)), device)
    return {
        **tensors,
        "labels": torch.from_numpy(labels)[None],
        "attention_mask": None,
        "row_lengths": torch.tensor(lengths),
        **{f"cu_seq_lens_{side}": borders for side in "qk"},
        **{f"max_length_{side}": max(lengths) for side in "qk"},
    }
