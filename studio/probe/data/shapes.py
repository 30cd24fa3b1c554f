"""Which columns make which format: recognises a row by its keys and says what is allowed."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from studio.core.text import plain


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write a row: the format it belongs to, the columns it needs and those it may have."""

    format: str
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return self.needed + self.optional

    def __str__(self) -> str:
        return f"{self.format.replace('_', '/')} ({', '.join(self.needed)})"


# In the order of preference: the published Alpaca files have a `text` column beside instruction and output.
SHAPES = (
    Shape("chat", ("messages",)),
    Shape("chat", ("conversations",), ("system",)),
    Shape("alpaca", ("instruction", "output"), ("input", "system")),
    Shape("alpaca", ("instruction", "response"), ("context", "system")),
    Shape("prompt_completion", ("prompt", "completion"), ("system",)),
    Shape("prompt_completion", ("prompt", "response"), ("system",)),
    Shape("prompt_completion", ("question", "answer"), ("system",)),
    Shape("text", ("text",)),
)
KNOWN_COLUMNS = frozenset(column for shape in SHAPES for column in shape.columns)
FORMATS = ("auto", "chat", "prompt_completion", "alpaca", "text")


def recognise(columns: Iterable[str], wanted: str = "auto") -> Shape | None:
    """Return the first shape whose needed columns are all there, of the wanted format only unless that is `auto`."""
    there = set(columns)
    return next((s for s in SHAPES if there.issuperset(s.needed) and wanted in ("auto", s.format)), None)


def wrong_columns(columns: Iterable[str], wanted: str = "auto") -> str:
    """Return the message for columns that make no known row: what was found, what is allowed, which name is near."""
    found = list(columns)
    listed = ", ".join(plain(name, one_line=True, limit=40) for name in found[:12]) + (
        ", ..." if len(found) > 12 else ""
    )
    allowed = "; ".join(" + ".join(shape.needed) for shape in SHAPES if wanted in ("auto", shape.format))
    message = f"found the columns {listed}; wanted {allowed}" if found else f"found no columns; wanted {allowed}"
    if wanted != "auto" and (other := recognise(found)):
        return (
            f"{message} (data.format = {wanted!r}). The row is {other}: set data.format to 'auto' or {other.format!r}"
        )
    needed = {column for shape in SHAPES if wanted in ("auto", shape.format) for column in shape.needed}
    near = {name: close for name in found if name not in needed and (close := _nearest(name, sorted(needed)))}
    hints = [f"'{plain(name, one_line=True, limit=40)}' for {close!r}" for name, close in near.items()]
    return f"{message}. Did you mean {', '.join(hints)}?" if hints else message


def _nearest(name: str, allowed: list[str]) -> str | None:
    close = difflib.get_close_matches(name.strip().lower(), allowed, n=1, cutoff=0.75)
    return close[0] if close else None
