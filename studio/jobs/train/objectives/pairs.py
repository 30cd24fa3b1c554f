"""Pairs of answers as token ids: how a row with a chosen and a rejected answer becomes two sequences of one example.

Both sides begin with the same tokens, those of the prompt, and only what follows them has labels. What is longer than
`train.seq_len` is cut on the right, as TRL does it: the prompt is kept, and the answers lose their ends. A pair of
which a side has no labelled token left is left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from studio.jobs.base.data.blocks import Ids
from studio.jobs.base.data.encode import encode_sides
from studio.jobs.base.data.rows import Encoding, Example
from studio.jobs.base.data.stored_examples import StoredExamples
from studio.jobs.base.data.template import Warn
from studio.probe.data import Row


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A row's two sequences.

    Attributes:
        input_ids: Token ids of the chosen sequence, then of the rejected one, `[chosen + rejected]`.
        labels: Their labels; places without one hold `IGNORED`.
        border: Tokens of the chosen sequence.
        reference: Log-probabilities of both answers under the reference, in nats; zeros where they are not known.
    """

    input_ids: Ids
    labels: Ids
    border: int
    reference: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, chosen: Example, rejected: Example) -> Self:
        """Return the pair of two sequences."""
        ids, labels = (
            np.concatenate([getattr(side, name) for side in (chosen, rejected)]) for name in ("input_ids", "labels")
        )
        return cls(ids, labels, len(chosen.input_ids))

    @property
    def sides(self) -> tuple[Example, Example]:
        """The chosen and the rejected sequence."""
        first, second = slice(None, self.border), slice(self.border, None)
        return (
            Example(self.input_ids[first], self.labels[first]),
            Example(self.input_ids[second], self.labels[second]),
        )


class Pairs(Sequence[Pair]):
    """Pairs of which the sequences may lie on disk; each is made when it is asked for.

    Attributes:
        sides: Chosen and rejected sequences in turns.
        references: The answers' log-probabilities under the reference `[pairs, 2]`, in nats; None where unknown.
    """

    def __init__(self, sides: Sequence[Example], references: NDArray[np.float32] | None = None) -> None:
        """Take the sequences."""
        self.sides, self.references = sides, references
        if isinstance(sides, StoredExamples):
            lengths = sides.lengths.astype(np.int64)
        else:
            lengths = np.array([len(side.input_ids) for side in sides], np.int64)
        self.lengths = lengths.reshape(-1, 2)
        """Tokens of each sequence, `[pairs, 2]`."""

    def __len__(self) -> int:
        return len(self.sides) // 2

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> list[Pair]: ...
    def __getitem__(self, place: int | slice) -> Pair | list[Pair]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        pair = Pair.of(self.sides[2 * place], self.sides[2 * place + 1])
        if self.references is None:
            return pair
        chosen, rejected = self.references[place].tolist()
        return replace(pair, reference=(chosen, rejected))


def encode_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    how: Encoding,
    *,
    warn: Warn,
    left_out: Counter[str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Pairs:
    """Return rows with a chosen and a rejected answer as pairs.

    Args:
        rows: They are `Preference`s.
        tokenizer: As for `encode_rows`.
        how: How both sides are encoded; `answers_only` is always on.
        warn: Told what the user should know, each thing once.
        left_out: Gets the rows of which no pair is made, by reason (`studio.core.left_out`).
        progress: Told the fraction done, 0 to 1.

    Raises:
        JobFailed: No pair is left with anything to learn.
    """
    how = replace(how, answers_only=True)
    sides, counts = encode_sides(rows, tokenizer, how, warn=warn, progress=progress)
    if left_out is not None:
        left_out.update(counts)
    return Pairs(sides)
