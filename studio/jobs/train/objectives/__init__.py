"""The interface of an objective: what a training learns from its rows. Each objective has a file of its own here.

The loop, evaluation, checkpoints and measurements use an objective only through this interface. An objective in turn
asks the model for one thing only: the loss of labelled tokens, of each, of a row or of a batch (`TokenLoss`).
"""

from collections import Counter
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
"""What a loss is computed from: `input_ids` `[batch, seq]`, and whatever else an objective needs."""

FIGURES = "figures"
"""Under this name an objective of pairs leaves in a batch what else its loss tells, detached `[pairs, figures]`: in the
order of `studio.core.events.PAIR_FIGURES`."""


class Encoded(Protocol):
    """A row as an objective encodes it."""

    @property
    def input_ids(self) -> NDArray[np.int32]:
        """All tokens that go through the model for this row, `[seq]`; batching and speed figures count them."""


class Objective(Protocol):
    """How rows are learnt from. An objective may have its own type of examples, which only it looks into."""

    @property
    def packs(self) -> bool:
        """Whether several sequences may share one; they are then `data.rows.Example`s (see `sequences`)."""

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        recipe: Recipe,
        *,
        warn: Warn,
        left_out: Counter[str] | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Sequence[Encoded]:
        """Return the rows as examples of at most `train.seq_len` tokens.

        Args:
            rows: As they were read.
            tokenizer: Of the base model; it has a chat template where the rows are conversations.
            recipe: How they are to be encoded.
            warn: Told what the user should know, each thing once.
            left_out: Gets the rows of which no example is made, by reason (`studio.core.left_out`).
            progress: Told the fraction done, 0 to 1.

        Raises:
            JobFailed: No row is left with anything to learn.
        """

    def longest(self, seq_len: int, vocabulary: int) -> Encoded:
        """Return an example of `seq_len` tokens with ids below `vocabulary`; no other example may need more memory."""

    def batch(self, examples: Sequence[Any], *, pad_id: int, device: torch.device, packed: bool = False) -> Batch:
        """Return the examples of one micro-batch as tensors on the device, padded or packed."""

    def loss(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the summed loss of a batch, fp32 scalar; the loop divides it by the step's denominator."""

    def denominator(self, examples: Sequence[Any]) -> int:
        """Return what the examples' summed loss is divided by, such as their labelled tokens; 0 if there are none."""

    def metric(self, tokens: TokenLoss, batch: Batch) -> Tensor:
        """Return the measure of each held-out row in a batch, fp32 `[rows]`; less is better.

        A run's figure is the sum over all rows, divided by their denominator.
        """


def sequences(example: Any) -> Sequence[Any]:
    """Return the sequences that go through the model for an example: itself, or both sides of a pair."""
    sides: Sequence[Any] = getattr(example, "sides", ()) or (example,)
    return sides
