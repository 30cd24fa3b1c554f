"""How long the rows of a data file are, in characters and in a model's tokens."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.opened import Progress
from studio.probe.data.rows import PlainText, Row
from studio.probe.models import find_base

_COUNTED_CHARACTERS = 20_000
_TOKENIZER = "tokenizer.json"
_MOST_TOGETHER = 1024
_MOST_CHARACTERS_TOGETHER = 2**18
"""A token takes some hundred bytes while it is counted."""


def token_lengths(rows: Sequence[Row], model: str, progress: Progress | None = None) -> list[int]:
    """Return each row's length in tokens of its texts, without what the model's chat template adds.

    Args:
        rows: Any rows.
        model: Whose tokens are counted.
        progress: Gets (rows done, rows in all); may raise to end it.

    Raises:
        BadInput: The model is unknown or has no tokenizer.json on this machine.
    """
    folder = find_base(model).path
    file = folder / _TOKENIZER if folder else None
    if file is None or not file.is_file():
        raise BadInput(
            f"the model {plain(model, one_line=True)} has no {_TOKENIZER} on this machine to count tokens with"
            f"{'' if folder else ' yet: it comes with its first use'}. Without --model, lengths are in characters."
        )
    from tokenizers import Tokenizer  # noqa: PLC0415  only counting needs it

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise BadInput(f"{plain(str(file), one_line=True)} is damaged: {plain(str(error), one_line=True)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths: list[int] = []
    for some in _together(rows):
        texts = [text for row in some for text in row]
        # Many at once, which the tokenizer takes to all cores; without the places of tokens, for which nobody asks.
        counts = iter([len(encoded.ids) for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False)])
        lengths += [sum(islice(counts, len(row))) for row in some]
        if progress:
            progress(len(lengths), len(rows))
    return lengths


def bars_of(lengths: Sequence[float], most: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the edges of at most so many bars of one width that hold all lengths, and how many lie in each."""
    low, high = math.floor(min(lengths)), math.floor(max(lengths)) + 1
    bars = max(1, min(most, len(set(map(round, lengths))), high - low))
    edges = tuple(low + round((high - low) * place / bars) for place in range(bars + 1))
    counts = [0] * bars
    for length in lengths:
        counts[bisect_right(edges, length) - 1] += 1
    return edges, tuple(counts)


def _together(rows: Sequence[Row]) -> Iterator[list[list[str]]]:
    """Yield the texts of rows, so many rows together as are counted at once."""
    some, characters = list[list[str]](), 0
    for row in rows:
        some.append(texts_of(row))
        characters += sum(map(len, some[-1]))
        if len(some) == _MOST_TOGETHER or characters > _MOST_CHARACTERS_TOGETHER:
            yield some
            some, characters = [], 0
    if some:
        yield some


def estimated_tokens(rows: Sequence[Row], model: str) -> list[int]:
    """Return about as many tokens as each row has: of long texts the beginning is counted.

    Raises:
        BadInput: As for `token_lengths`.
    """
    counts = token_lengths([_beginning(row) for row in rows], model)
    return [round(count * _longer(row)) for count, row in zip(counts, rows, strict=True)]


def _beginning(row: Row) -> Row:
    return replace(row, text=row.text[:_COUNTED_CHARACTERS]) if isinstance(row, PlainText) else row


def _longer(row: Row) -> float:
    """Return how many times as long as its beginning a row is."""
    return max(1.0, len(row.text) / _COUNTED_CHARACTERS) if isinstance(row, PlainText) else 1.0


def texts_of(row: Row) -> list[str]:
    """Return the texts of a row, and of its tools, which a chat template writes before them."""
    words = [turn.words for turn in row.turns]
    return words if isinstance(row, PlainText) or not row.tools else [*words, row.tools]


def spread_of(lengths: list[int]) -> dict[str, float] | None:
    """Return least, median, 95th percentile, most and sum; None without rows."""
    if not lengths:
        return None
    ordered = sorted(lengths)
    # Nearest rank: the smallest length that at least 95 of 100 rows do not exceed.
    p95 = ordered[-(-95 * len(ordered) // 100) - 1]
    return {
        "min": ordered[0],
        "median": median(ordered),
        "p95": p95,
        "max": ordered[-1],
        "total": sum(ordered),
    }
