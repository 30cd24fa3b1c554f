"""Objectives: what a training learns from its rows, one file each.

The loop, evaluation, checkpoints and measurements know an objective by what stands here and by nothing else. What an
objective may ask of the model is the summed loss of labelled tokens, of a batch or of each row in it: `TokenLoss`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from studio.core.recipe import Recipe
from studio.jobs.base.data.template import Warn
from studio.jobs.train.head import TokenLoss
from studio.probe.data import Row

Batch = dict[str, Any]
"""What a loss is computed from; `input_ids` `[rows, seq]` are in it, whatever else an objective needs beside them."""


class Encoded(Protocol):
    """A row as an objective encodes it."""

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """All tokens that go through the model for this row, `[tokens]`: its size, for batches and speed."""


class Objective(Protocol):
    """How rows are learnt from. Its examples are of a type of its own, which nobody else looks into."""

    @property
    def packs(self) -> bool:
        """Whether examples may stand one behind the other in one sequence; they are then `data.rows.Example`s."""

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        recipe: Recipe,
        *,
        warn: Warn,
        progress: Callable[[float], None] | None = None,
    ) -> Sequence[Encoded]:
        """Return the rows as examples of at most `train.seq_len` tokens.

        Args:
            rows: As they were read.
            tokenizer: Of the base model; it has a chat template where the rows are conversations.
            recipe: How they are to be encoded.
            warn: Told, once each, the things that the user should know.
            progress: Told the fraction done, 0 to 1.

        Raises:
            JobFailed: No row is left with anything to learn.
        """

    def longest(self, seq_len: int, vocabulary: int) -> Encoded:
        """Return an example of full length, of ids below `vocabulary`: no other needs more memory."""

    def batch(self, examples: Sequence[Any], *, pad_id: int, device: torch.device, packed: bool = False) -> Batch:
        """Return the examples of one micro-batch as tensors on the device, padded or, where it packs, packed."""

    def loss(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the summed loss of a batch, fp32 scalar; the loop divides it by the step's denominator."""

    def denominator(self, examples: Sequence[Any]) -> int:
        """Return what examples count for in a mean: their labelled tokens, or their number. 0 where none teaches."""

    def metric(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return what is measured of each held-out row in a batch, fp32 `[rows]`, the less the better.

        The figure of a run is the sum over all rows divided by their denominator.
        """
