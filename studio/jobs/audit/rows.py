"""The rows that an audit rests on: held-out rows of the user's data, and a neutral text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studio.core.errors import BadInput, JobFailed
from studio.core.text import plain
from studio.jobs.base.data.rows import Example, encode_rows
from studio.jobs.base.data.template import Warn, ensure_template
from studio.probe.data import Row, read_data, split
from studio.runs.audit_request import AuditRequest

NEUTRAL = Path(__file__).with_name("neutral.txt")
"""Short passages of many kinds, written for this program: prose, dialogue, reasoning, law, code."""
_LEAST_TOKENS = 2
_MOST_TEXT_BYTES = 10 * 2**20


@dataclass(frozen=True, slots=True)
class AuditRows:
    """Encoded rows.

    Attributes:
        task: Held-out rows of the user's data; answers have labels.
        neutral: Passages of the neutral text; every token has a label.
    """

    task: Sequence[Example]
    neutral: Sequence[Example]

    @property
    def all(self) -> list[Example]:
        """Task rows first, then neutral ones."""
        return [*self.task, *self.neutral]


def read_audit_rows(
    request: AuditRequest, tokenizer: Any, warn: Warn, *, eval_path: str = "", answers_only: bool = True
) -> AuditRows:
    """Return the rows that were held out, or would be, by the same seed, and the neutral text.

    Args:
        request: Which data, how many rows, how long.
        tokenizer: Of the model.
        warn: Told what the user should know.
        eval_path: A file of held-out rows that the recipe names; empty where they are split off.
        answers_only: Measure only the answers.

    Raises:
        BadInput: A file cannot be used, or no row would be held out.
        JobFailed: No row has anything to measure.
    """
    seq_len = int(request.seq_len)
    held = held_out_rows(request, tokenizer, warn, eval_path=eval_path)
    task, _ = encode_rows(held, tokenizer, seq_len=seq_len, answers_only=answers_only, warn=warn)
    neutral = _passages(Path(request.text) if request.text else NEUTRAL, tokenizer, seq_len)
    return AuditRows(task, neutral)


def held_out_rows(request: AuditRequest, tokenizer: Any, warn: Warn, *, eval_path: str = "") -> list[Row]:
    """Return the held-out rows as they were read; the tokenizer gets a chat template where it has none.

    Raises:
        BadInput: A file cannot be used, or no row would be held out.
    """
    wanted = int(request.rows)
    data = read_data(Path(eval_path or request.data), format=request.format)
    if eval_path:
        held = list(data.rows)[:wanted]
    else:
        parts = split(data.rows, wanted, int(request.seed))
        held = list(parts.held_out)
        for note in parts.notes:
            warn(note)
    if not held:
        raise BadInput(f"{plain(data.path.name, one_line=True)} leaves no row to hold out: give more rows.")
    ensure_template(tokenizer, data.format, warn)
    return held


def check_ids(rows: AuditRows, known: int) -> None:
    """Make sure that the tokenizer makes no token that the model has no embedding for.

    Raises:
        JobFailed: It does.
    """
    largest = max(int(example.input_ids.max()) for example in rows.all)
    if largest >= known:
        raise JobFailed(
            "tokenizer_mismatch",
            f"the tokenizer makes token {largest}, but the model has embeddings for {known} tokens only",
            "use the tokenizer that belongs to this model",
        )


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
