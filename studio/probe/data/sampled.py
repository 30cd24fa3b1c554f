"""How many rows some data have and how much text is in them, from the first half megabyte; no tokenizer, no network."""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.probe.data.findings import Findings
from studio.probe.data.meant import DataFiles
from studio.probe.data.opened import BOM, Opened, kind_of, opened
from studio.probe.data.places import find_files
from studio.probe.data.read import BY_BYTES, COLUMNAR
from studio.probe.data.reading import AS_IT_IS, Reading
from studio.probe.data.shipped import EMBEDDED

_LOOK_BYTES = 2**19
_LOOKED_AT = 1000
"""Files whose size and time are compared to see whether a guess is still good; rows and texts that stand for all."""
_TEXT_PACKED = 3
"""How much larger a packed text is than its file: gzip takes English to about a third."""
_ROLE = "role"
_TURNS = frozenset({"messages", "conversations", "prompt", "completion", "instruction", "output", "question", "answer"})
"""Columns of conversations: a row that has one is no plain text."""
_KEY_BYTES = 64
_NO_CUT = 2**31
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
        parts: Of a mixture each source, with the rows and about the tokens that are drawn from it.
    """

    rows: int
    text_bytes: tuple[int, ...]
    asked_bytes: tuple[int, ...] = ()
    plain: bool = False
    parts: tuple[tuple[str, int, float], ...] = ()

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

    @property
    def longest_row(self) -> tuple[float, float, float]:
        """Tokens of the longest row that was read, uncut: least, usual and most."""
        return replace(self, text_bytes=(max(self.text_bytes),), asked_bytes=()).tokens_per_row(_NO_CUT)

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


def guess_rows(word: str, how: Reading = AS_IT_IS) -> RowsGuess | None:
    """Return what the beginning of some data tells; None where they are not here, or cannot be read.

    Args:
        word: A file, a folder, a data set of the hub that lies in the cache, or `embedded`.
        how: Which part of it is read.
    """
    try:
        place = find_files(Path(word) if word == EMBEDDED else Path(word).expanduser(), how, ask=False)
        seen = [path.stat() for path in place.files[:_LOOKED_AT]]
        changed = tuple((file.st_size, file.st_mtime_ns) for file in seen)
        return _guess(place, how, changed) if word else None
    except (OSError, RuntimeError, ValueError, BadInput):
        return None


@lru_cache(maxsize=16)
def _guess(place: DataFiles, how: Reading, _changed: tuple[tuple[int, int], ...]) -> RowsGuess | None:
    first = next((path for path in place.files if path.stat().st_size), place.files[0])
    with opened(first) as file:
        kind = kind_of(file)
        if kind == "text":
            times = _TEXT_PACKED if file.packed else 1
            sizes = [times * path.stat().st_size for path in place.files]
            return RowsGuess(len(sizes), tuple(sizes[:_LOOKED_AT]), plain=True)
        if kind in BY_BYTES:
            start = file.stream.read(_LOOK_BYTES)
            ahead = file.stream.read(1)
            if ahead and b"\n" not in start and b'"text"' in start[:_KEY_BYTES]:  # a long text, perhaps others like it
                return RowsGuess(1, (place.size_bytes,), plain=True)
            consumed = file.total
            if ahead:
                # What was unpacked lies ahead of what was read by the stream's buffer.
                unpacked = len(start) + 1 + len(file.stream.peek())
                consumed = max(1, file.done * len(start) // unpacked) if file.packed else len(start)
            begun = Opened(file.name, io.BufferedReader(io.BytesIO(start)), len(start), file.head, False, io.BytesIO())
            rows = _beginning(BY_BYTES[kind](begun, Findings(skips=True), None), whole=not ahead)
            lines = b"\n" in start and start.removeprefix(BOM).lstrip()[:1] != b"["
            if kind == "json" and ahead and not file.packed and lines:
                consumed -= len(start) - start.rfind(b"\n") - 1
            counted = not ahead and len(place.files) == 1
            return _guess_of(len(rows) if counted else round(place.size_bytes * len(rows) / consumed), rows)
    rows = _beginning(islice(COLUMNAR[kind](first, None, how), _LOOKED_AT), whole=True)
    if kind == "parquet":
        import pyarrow.parquet as pq  # noqa: PLC0415  0.2 s that only readers of its files pay

        return _guess_of(round(pq.read_metadata(first).num_rows * place.size_bytes / first.stat().st_size), rows)
    # An Arrow file does not say how many rows it has; its texts are not packed, as a rule.
    texts = sum(map(_text_bytes, rows))
    return _guess_of(max(len(rows), round(place.size_bytes * len(rows) / max(1, texts))), rows)


def _guess_of(count: int, rows: list[dict[str, Any]]) -> RowsGuess | None:
    """Return what some rows tell of all of them."""
    if not rows or not all(isinstance(row, dict) for row in rows):
        return None
    asked = [
        0
        if ANSWER_COLUMNS.isdisjoint(row)
        else sum(_text_bytes(row[name], name) for name in row.keys() - ANSWER_COLUMNS)
        for row in rows
    ]
    plain = all(isinstance(row.get("text"), str) and _TURNS.isdisjoint(row) for row in rows)
    return RowsGuess(count, tuple(map(_text_bytes, rows)), tuple(asked), plain=plain)


def _beginning(rows: Iterator[tuple[int, Any]], *, whole: bool) -> list[Any]:
    """Return the rows of the beginning of a file, which may end within a row.

    Raises:
        BadInput: It cannot be read.
    """
    found: list[Any] = []
    try:
        found.extend(row for _, row in rows)
    except BadInput:
        if whole or not found:
            raise
    return found


def _text_bytes(value: Any, key: str = "") -> int:
    """Return the bytes of all texts inside a JSON value; who speaks is no text."""
    if isinstance(value, str):
        return 0 if key == _ROLE else len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        return sum(_text_bytes(inner, name) for name, inner in value.items())
    return sum(_text_bytes(inner) for inner in value) if isinstance(value, list) else 0
