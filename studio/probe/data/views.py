"""Rows of other sequences, some of them or several sequences as one, without a copy of any row."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import overload

from studio.probe.data.rows import Row
from studio.probe.data.stored_rows import StoredRows


def drawn(rows: Sequence[Row], places: Sequence[int]) -> Sequence[Row]:
    """Return the rows at some places of a sequence, in the order of the places."""
    return rows.at(places) if isinstance(rows, StoredRows) else Drawn(rows, places)


class Drawn(Sequence[Row]):
    """The rows at some places of a sequence, in the order of the places."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        """Take the rows, and which of them these are."""
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Row]:
        return (self._rows[place] for place in self._places)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Sequence[Row]:
        if isinstance(at, slice):
            return Drawn(self._rows, self._places[at])
        return self._rows[self._places[at]]


class Chain(Sequence[Row]):
    """Several sequences of rows, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        """Take the sequences."""
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row]:
        return (row for part in self._parts for row in part)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Sequence[Row]:
        if isinstance(at, slice):
            return Drawn(self, range(len(self))[at])
        place = range(len(self))[at]
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]
