"""The cells of an audit's tables: figures with their intervals, sizes, speeds, each marked as measured or estimated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studio.core.evidence import seen_sign
from studio.core.intervals import Interval
from studio.core.text import plain

Table = list[list[str]]
"""Rows of cells, the first row being the head."""

GIB = 2**30
_LONGEST_WORD = 120


def interval(value: Mapping[str, float | None]) -> str:
    """Return a figure with the ends of its interval."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.4f}"
    return f"{value['value']:.4f} ({value['low']:.4f}-{value['high']:.4f})"


def difference(value: Mapping[str, Any]) -> str:
    """Return a difference in loss with the ends of its interval, marked where it is within the noise."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:+.4f}"
    noise = "" if seen_sign(Interval(**value)) else ", noise"
    return f"{value['value']:+.4f} ({value['low']:+.4f} to {value['high']:+.4f}{noise})"


def share(value: Mapping[str, Any]) -> str:
    """Return a share of answers with the ends of its interval."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.0%}"
    return f"{value['value']:.0%} ({value['low']:.0%}-{value['high']:.0%})"


def share_difference(value: Mapping[str, Any]) -> str:
    """Return a difference of shares in words: that none can be seen, or how large it is, in percentage points."""
    return _difference(Interval(**value), lambda share: f"{round(100 * share):+d}", " points")


def plain_difference(value: Mapping[str, Any]) -> str:
    """Return a difference of a score in words: that none can be seen, or how large it is."""
    return _difference(Interval(**value), lambda score: f"{score:+.4f}", "")


def _difference(seen: Interval, written: Callable[[float], str], unit: str) -> str:
    if seen.low is None or seen.high is None:
        return f"{written(seen.value)}{unit}"
    ends = f"{written(seen.low)} to {written(seen.high)}"
    return f"{written(seen.value)}{unit} ({ends})" if seen.sign else f"no difference seen ({ends})"


def size(size_bytes: float | None) -> str:
    """Return bytes in MiB, or GiB from one of them on; a question mark where they are not known."""
    if size_bytes is None:
        return "?"
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes < GIB else f"{size_bytes / GIB:.2f} GiB"


def number(value: float | None, form: str) -> str:
    """Return a number in a form of `format`; a question mark where it is not known."""
    return "?" if value is None else format(value, form)


def word(text: object) -> str:
    """Return a word from outside as a cell or a line may show it."""
    return plain(str(text), one_line=True, limit=_LONGEST_WORD)


def markdown_table(table: Table) -> list[str]:
    """Return a table as lines of Markdown."""
    head, *rows = ([_cell(text) for text in row] for row in table)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def joined(words: Sequence[str]) -> str:
    """Return words as a list that is read: commas, and an "and" before the last one."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _cell(text: str) -> str:
    return plain(text, one_line=True).replace("|", "\\|")
