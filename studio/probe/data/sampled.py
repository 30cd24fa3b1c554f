"""How many rows a JSON Lines file has and how much text is in them, from its first half megabyte; no tokenizer."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.probe.data.shipped import EMBEDDED, shipped_data

_LOOK_BYTES = 2**19
_ROLE = "role"
_TURNS = frozenset({"messages", "conversations", "prompt", "completion", "instruction", "output", "question", "answer"})
"""Columns of conversations: a row that has one is no plain text."""
_KEY_BYTES = 64
_MOST_BLOCKS = 1000
"""Blocks of a text that are looked at one by one; the others are as long."""

BYTES_PER_TOKEN = (4.8, 4.0, 2.5)
"""UTF-8 bytes of text per token, for least, usual and most tokens. On the embedded rows 4.2 were measured with
SmolLM2's tokenizer. Code, numbers and many scripts have fewer; the ends were chosen wide on purpose."""

TEMPLATE_TOKENS = (5, 15, 40)
"""Tokens that a chat template adds to a row, least, usual and most; SmolLM2's: 11 without its system turn, 32 with."""


ANSWER_COLUMNS = frozenset({"chosen", "rejected", "rejected_response", "preferred_output", "non_preferred_output"})
"""Columns of one of two answers, whatever else a row has."""


@dataclass(frozen=True, slots=True)
class RowsGuess:
    """What is known of a file from its beginning.

    Attributes:
        rows: Rows in the file: counted if all of it was read, else estimated from the length of lines.
        text_bytes: UTF-8 bytes of text in each row that was read.
        plain: Whether the rows are plain texts, which become blocks where they are longer than a row.
        asked_bytes: Those of them that are not in the columns of two answers, in rows that have these; else 0.
    """

    rows: int
    text_bytes: tuple[int, ...]
    asked_bytes: tuple[int, ...] = ()
    plain: bool = False

    def tokens_per_row(self, longest: int, *, paired: bool = False) -> tuple[float, float, float]:
        """Return the mean tokens of a row that is cut at `longest`: least, usual and most.

        Args:
            longest: Most tokens of a sequence.
            paired: Whether a row is a pair of answers, which goes through the model twice, each time with its prompt.
        """
        added = (1, 1, 1) if self.plain else TEMPLATE_TOKENS  # no template writes a text; an end token is added
        pairs = zip(BYTES_PER_TOKEN, added, strict=True)
        sizes = self.text_bytes
        if paired and self.asked_bytes:
            sizes = tuple(text + asked for text, asked in zip(sizes, self.asked_bytes, strict=True))
        times = 1 + paired
        least, usual, most = (_mean(sizes, times * longest, ratio, times * more) for ratio, more in pairs)
        return least, usual, most

    def in_blocks(self, longest: int, stride: int) -> "RowsGuess":
        """Return the same texts as blocks: so many rows, each with its share of the text.

        Args:
            longest: Most tokens of a block.
            stride: Tokens that a block repeats from the one before it.
        """
        new = max(1, longest - max(1, stride)) * BYTES_PER_TOKEN[1]
        blocks = [max(1, math.ceil(size / new)) for size in self.text_bytes]
        rows = max(1, round(self.rows * sum(blocks) / len(blocks)))
        repeated = max(1, stride) * BYTES_PER_TOKEN[1]
        sizes = (
            round(size / count + repeated * (count - 1) / count)
            for size, count in zip(self.text_bytes, blocks, strict=True)
            for _ in range(min(count, _MOST_BLOCKS))
        )
        return replace(self, rows=rows, text_bytes=tuple(sizes), asked_bytes=())


def _mean(sizes: Sequence[int], longest: int, bytes_per_token: float, more: int) -> float:
    return sum(min(longest, size / bytes_per_token + more) for size in sizes) / len(sizes)


def guess_rows(word: str) -> RowsGuess | None:
    """Return what the beginning of a data file tells; None for other formats, and where it cannot be read.

    Args:
        word: A path, or `embedded`.
    """
    try:
        path = shipped_data() if word == EMBEDDED else Path(word).expanduser()
        status = path.stat()
        return _guess(path, status.st_size, status.st_mtime_ns) if path.is_file() else None
    except (OSError, RuntimeError, ValueError, BadInput):
        return None


@lru_cache(maxsize=16)
def _guess(path: Path, size: int, _changed: int) -> RowsGuess | None:
    with path.open("rb") as file:
        start = file.read(_LOOK_BYTES)
    if size > len(start):
        if b"\n" not in start and b'"text"' in start[:_KEY_BYTES]:  # a long text, and perhaps others like it
            return RowsGuess(1, (size,), plain=True)
        start = start[: start.rfind(b"\n") + 1]
    if path.suffix in (".txt", ".md"):
        return RowsGuess(1, (size,), plain=True)
    texts, asked, plain = [], [], []
    for line in start.splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict):
            return None
        texts.append(_text_bytes(row))
        plain.append(isinstance(row.get("text"), str) and _TURNS.isdisjoint(row))
        paired = not ANSWER_COLUMNS.isdisjoint(row)
        asked.append(sum(_text_bytes(row[name], name) for name in row.keys() - ANSWER_COLUMNS) if paired else 0)
    if not texts:
        return None
    rows = len(texts) if size <= len(start) else round(size * len(texts) / len(start))
    return RowsGuess(rows, tuple(texts), tuple(asked), plain=all(plain))


def _text_bytes(value: Any, key: str = "") -> int:
    """Return the bytes of all texts inside a JSON value; who speaks is no text."""
    if isinstance(value, str):
        return 0 if key == _ROLE else len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        return sum(_text_bytes(inner, name) for name, inner in value.items())
    return sum(_text_bytes(inner) for inner in value) if isinstance(value, list) else 0
