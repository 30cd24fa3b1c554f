"""Rows of other sequences, some of them or several sequences as one, without a copy of any row."""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import overload

from studio.probe.data.rows import Row
from studio.probe.data.stored_rows import StoredRows, packed


def drawn(rows: Sequence[Row], places: Sequence[int]) -> Sequence[Row]:
    """Return the rows at some places of a sequence, in the order of the places."""
    return rows.at(places) if isinstance(rows, StoredRows) else Drawn(rows, places)


def chosen(rows: Sequence[Row], places: Iterable[int]) -> Sequence[Row]:
    """Return the same; rows in memory as a tuple."""
    if isinstance(rows, tuple | list):
        return tuple(rows[place] for place in places)
    if isinstance(rows, Drawn):
        return drawn(rows.rows, array("q", (rows.places[place] for place in places)))
    return drawn(rows, array("q", places))


def lines_of(rows: Sequence[Row]) -> Iterator[bytes]:
    """Yield each row as `packed` makes it; stored ones are not made for that."""
    if isinstance(rows, StoredRows):
        yield from rows.packed()
    elif isinstance(rows, Chain):
        for part in rows.parts:
            yield from lines_of(part)
    else:
        yield from map(packed, rows)


class Drawn(Sequence[Row]):
    """The rows at some places of a sequence, in the order of the places.

    Attributes:
        rows: The sequence.
        places: Where in it the rows stand; one may stand here several times.
    """

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        """Take the rows, and which of them these are."""
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Row]:
        return (self.rows[place] for place in self.places)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Sequence[Row]:
        if isinstance(at, slice):
            return Drawn(self.rows, self.places[at])
        return self.rows[self.places[at]]


class Chain(Sequence[Row]):
    """Several sequences of rows, one behind the other.

    Attributes:
        parts: The sequences; none is empty.
    """

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        """Take the sequences."""
        self.parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row]:
        return (row for part in self.parts for row in part)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Sequence[Row]:
        if isinstance(at, slice):
            return Drawn(self, range(len(self))[at])
        place = range(len(self))[at]
        part = bisect_right(self._ends, place)
        return self.parts[part][place - (self._ends[part - 1] if part else 0)]
