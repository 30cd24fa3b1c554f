"""Pairs of answers as token ids: how a row with a chosen and a rejected answer becomes two sequences of one example.

Both sides begin with the same tokens, those of the prompt, and only what follows them has labels. What is longer than
`train.seq_len` is cut on the right, as TRL does it: the prompt is kept, and the answers lose their ends. A pair of
which a side has no labelled token left is left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from studio.core.left_out import LEFT_OUT
from studio.jobs.base.data.blocks import Ids
from studio.jobs.base.data.encode_pool import CHUNK_ROWS
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.rows import Encoder, Encoding, Example
from studio.jobs.base.data.template import Warn
from studio.probe.data import Preference, Row


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


def encode_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    how: Encoding,
    *,
    warn: Warn,
    left_out: Counter[str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[Pair]:
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
    encoder, report = Encoder(tokenizer, replace(how, answers_only=True)), RowReport()
    pairs, counts = list[Pair](), Counter[str]()
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = [row for row in rows[start : start + CHUNK_ROWS] if isinstance(row, Preference)]
        made, became = encoder.sides(chunk)
        report.add(became)
        for sides in made:
            pair, why = _paired(*sides)
            counts[why] += pair is None
            pairs += [pair] if pair else []
        if progress:
            progress(min(start + CHUNK_ROWS, len(rows)) / len(rows))
    report.say(how.seq_len, tokenizer.eos_token or "", warn)
    counts = +counts
    if counts:
        reasons = ", ".join(f"{count} {LEFT_OUT[reason]}" for reason, count in counts.items())
        warn(f"{counts.total()} of {len(rows)} pairs are left out: {reasons}.")
    if left_out is not None:
        left_out.update(counts)
    if rows and not pairs:
        raise report.nothing_left(how.seq_len)
    return pairs


def _paired(chosen: Sequence[Example], rejected: Sequence[Example]) -> tuple[Pair | None, str]:
    """Return the pair of the examples of both sides, or None and the reason why there is none."""
    if not chosen or not rejected:
        return None, "side_left_out"
    if len(chosen) > 1 or len(rejected) > 1:
        return None, "side_split"
    sides = (chosen[0], rejected[0])
    one, other = (side.input_ids[: int(np.argmax(side.labels != IGNORED))] for side in sides)
    if not np.array_equal(one, other):
        return None, "prompts_differ"
    return Pair.of(*sides), ""
