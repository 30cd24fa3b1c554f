"""Reads the rows that an audit measures: rows of the user's data, and a neutral text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.rows import Encoding, Example
from studio.jobs.base.data.template import Warn, ensure_template
from studio.probe.audit import rows_to_measure
from studio.probe.data import PlainText, different_answers
from studio.probe.held_out import RowsToMeasure
from studio.runs.requests import AuditRequest

NEUTRAL = Path(__file__).with_name("neutral.txt")
"""Short passages of many kinds, written for this program: prose, dialogue, reasoning, law, code."""
_LEAST_TOKENS = 2
_MOST_TEXT_BYTES = 10 * 2**20


@dataclass(frozen=True, slots=True)
class AuditRows:
    """Encoded rows.

    Attributes:
        task: Rows of the user's data; answers have labels.
        neutral: Passages of the neutral text; every token has a label.
        found: The task rows as found, before those without anything to measure are dropped, and where they come from.
    """

    task: Sequence[Example]
    neutral: Sequence[Example]
    found: RowsToMeasure

    @property
    def all(self) -> list[Example]:
        """Task rows first, then neutral ones."""
        return [*self.task, *self.neutral]

    @property
    def answers(self) -> int:
        """How many different answers the task rows have; the blocks of a text differ."""
        rows = self.found.rows
        more = len(self.task) - len(rows) if any(isinstance(row, PlainText) for row in rows) else 0
        return different_answers(rows) + max(0, more)

    def told(self) -> dict[str, Any]:
        """Return facts on the rows for the report: how many of how many held out, which ones, and notes."""
        return {
            "rows": {"task": len(self.task), "neutral": len(self.neutral)},
            "held_out_rows": self.found.held_out_rows,
            "rows_from": self.found.where,
            "rows_notes": list(self.found.notes),
            "row_hashes": self.found.hashes,
            "different_answers": self.answers,
        }


def read_audit_rows(
    request: AuditRequest,
    tokenizer: Any,
    warn: Warn,
    *,
    found: RowsToMeasure | None = None,
    recipe: Recipe | None = None,
) -> AuditRows:
    """Return the rows to measure and the neutral text, encoded.

    Args:
        request: Says which data, how many rows, and how long they may be.
        tokenizer: Of the model.
        warn: Told what the user should know.
        found: The rows; None for those that the request names.
        recipe: Says how the rows were encoded in training; None for a base, of whose rows the answers are measured.

    Raises:
        BadInput: A file cannot be used, or no row of it may be measured.
        JobFailed: No row has anything to measure.
    """
    seq_len = request.seq_len
    found = found or rows_to_measure(request)
    for note in found.notes:
        warn(note)
    ensure_template(tokenizer, found.format, warn)
    how = Encoding.of(recipe) if recipe else Encoding(seq_len)
    task, _ = encode_rows(found.rows, tokenizer, warn=warn, **asdict(replace(how, seq_len=seq_len)))
    neutral = _passages(Path(request.text) if request.text else NEUTRAL, tokenizer, seq_len)
    return AuditRows(task, neutral, found)


def _passages(path: Path, tokenizer: Any, seq_len: int) -> list[Example]:
    shown = plain(str(path), one_line=True)
    try:
        if path.stat().st_size > _MOST_TEXT_BYTES:
            raise BadInput(f"the neutral text {shown} is larger than 10 MiB; a few pages are enough.")
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"the neutral text {shown} cannot be read: {error}. Wanted a text file in UTF-8.") from None
    passages = [passage.strip() for passage in text.split("\n\n") if passage.strip()]
    encoded = tokenizer(passages).input_ids if passages else []
    made = [np.asarray(ids[:seq_len], np.int32) for ids in encoded if len(ids) >= _LEAST_TOKENS]
    if not made:
        raise BadInput(f"the neutral text {shown} holds no passage of two tokens or more.")
    return [Example(ids, ids.copy()) for ids in made]
