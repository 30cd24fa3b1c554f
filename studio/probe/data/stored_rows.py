"""Rows that lie on disk, one after another, and are made when they are asked for.

A million rows as objects take four times the room of their texts. Files of some megabytes stay in memory; of larger
ones the rows are written to a file while they are read (`RowWriter`), and `StoredRows` is the sequence of them.
Each row is a line of JSON.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, astuple, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Self, cast, overload

from studio.probe.data.rows import Conversation, Message, PlainText, Preference, Row, ToolCall
from studio.runs.spool import FileBytes, HeldBytes, Spool

IN_MEMORY_CHARACTERS = 8 * 2**20
"""Rows with at most so many characters, all together, stay in memory as they are."""
ROWS_FILE, STARTS_FILE = "rows.jsonl", "starts.bin"
_BLOCK_BYTES = 2**20


class Store:
    """The rows of a file, one after another.

    Attributes:
        source: Their bytes.
        starts: Where each begins, and where the last one ends.
        name: Of the entry in the data cache that holds them; empty where none does.
        keys: Their hashes, once these are computed (`row_keys.KeyTable`).
    """

    def __init__(self, source: FileBytes | HeldBytes, starts: "array[int]", name: str = "") -> None:
        self.source, self.starts, self.name = source, starts, name
        self.keys: Any = None


class StoredRows(Sequence[Row]):
    """All rows of a store, or some of them, in order.

    Attributes:
        store: What they are read from.
        places: Which rows of the store these are.
    """

    def __init__(self, store: Store, places: Sequence[int] | None = None) -> None:
        """Take the rows at some places of a store; None for all."""
        self.store = store
        self.places: Sequence[int] = range(len(store.starts) - 1) if places is None else places

    @classmethod
    def opened(cls, folder: Path, name: str = "") -> Self:
        """Return the rows that a `RowWriter` has written into a folder.

        Raises:
            OSError: The files cannot be read.
        """
        starts: array[int] = array("Q")
        starts.frombytes((folder / STARTS_FILE).read_bytes())
        return cls(Store(FileBytes(folder / ROWS_FILE), starts, name))

    def at(self, places: Iterable[int]) -> "StoredRows":
        """Return those of these rows that stand at some places, in the order of the places."""
        return StoredRows(self.store, array("Q", (self.places[place] for place in places)))

    def whole(self) -> "StoredRows":
        """Return all rows of the store."""
        return StoredRows(self.store)

    @property
    def size_bytes(self) -> int:
        """How many bytes they take on disk."""
        starts = self.store.starts
        return sum(starts[place + 1] - starts[place] for place in self.places)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | Sequence[Row]:
        if isinstance(place, slice):
            return StoredRows(self.store, self.places[place])
        stored = self.places[place]
        return unpacked(self.store.source.read(self.store.starts[stored], self.store.starts[stored + 1]))

    def __iter__(self) -> Iterator[Row]:
        return map(unpacked, self.packed())

    def packed(self) -> Iterator[bytes]:
        """Yield each row as it is stored, see `packed`; reads neighbours together."""
        starts, begin, block = self.store.starts, 0, b""
        for place in self.places:
            first, stop = starts[place], starts[place + 1]
            if first < begin or stop > begin + len(block):
                begin = first
                block = self.store.source.read(first, max(stop, min(first + _BLOCK_BYTES, starts[-1])))
            yield block[first - begin : stop - begin]


class RowWriter:
    """Collects rows while a file is read: in memory as long as they are few, then on disk, if there is room."""

    def __init__(self, scratch: Callable[[], Path]) -> None:
        """Begin with no rows.

        Args:
            scratch: Makes the folder in which rows are written; may raise OSError.
        """
        self._scratch = scratch
        self._rows: list[Row] = []
        self._characters = 0
        self._starts: array[int] = array("Q", [0])
        self._spool: Spool | None = None

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._spool else len(self._rows)

    def add(self, row: Row) -> None:
        """Take one more row."""
        if self._spool:
            self._pack(row, self._spool)
            return
        self._rows.append(row)
        self._characters += sum(len(turn.words) for turn in row.turns)
        if not isinstance(row, PlainText):
            self._characters += len(row.tools) + len(row.template_kwargs)  # documents are most of some rows
        if self._characters > IN_MEMORY_CHARACTERS:
            self._spool = Spool(self._scratch, ROWS_FILE)
            for one in self._rows:
                self._pack(one, self._spool)
            self._rows.clear()

    def done(self, publish: Callable[[Path], Path]) -> Sequence[Row]:
        """Return the rows; those on disk are read from there.

        Args:
            publish: As for `Spool.done`; not called for rows in memory.
        """
        if self._spool is None:
            return tuple(self._rows)
        source, folder = self._spool.done({STARTS_FILE: self._starts.tobytes()}, publish)
        name = folder.name if folder and not folder.name.startswith(".") else ""
        return StoredRows(Store(source, self._starts, name))

    def drop(self) -> None:
        """Remove what was written and not published."""
        if self._spool:
            self._spool.drop()

    def _pack(self, row: Row, spool: Spool) -> None:
        data = packed(row)
        self._starts.append(self._starts[-1] + len(data))
        spool.add(data)


def packed(row: Row) -> bytes:
    """Return a row as a line of JSON. Fields that have their default are left out: new ones change no old row."""
    kind = _KINDS.index(type(row))
    parts = [_written(part) for part in _MAIN[kind](row)]
    text = json.dumps([kind, row.number, *parts, _others(row)], ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass") + b"\n"


def unpacked(data: bytes) -> Row:
    """Return the row that `packed` has written."""
    kind, number, *parts, others = json.loads(data.decode("utf-8", "surrogatepass"))
    return cast(Row, _KINDS[kind](*map(_read, parts), number=number, **_restored(others)))


def without_number(line: bytes) -> bytes:
    """Return a packed row without the row's number."""
    first = line.index(b",")
    return line[:first] + line[line.index(b",", first + 1) :]


def _written(part: str | tuple[Message, ...]) -> Any:
    if isinstance(part, str):
        return part
    return [[turn.role, turn.content, *((others,) if (others := _others(turn)) else ())] for turn in part]


def _read(part: Any) -> str | tuple[Message, ...]:
    if isinstance(part, str):
        return part
    return tuple(
        Message(turn[0], turn[1]) if len(turn) == 2 else Message(turn[0], turn[1], **_restored(turn[2]))
        for turn in part
    )


def _others(thing: Row | Message) -> dict[str, Any]:
    """Return the fields that do not have their default, ready for JSON."""
    get, names, defaults = _OPTIONAL[type(thing)]
    found = get(thing)
    if found == defaults:
        return {}
    given = {name: value for name, value, usual in zip(names, found, defaults, strict=True) if value != usual}
    if "calls" in given:
        given["calls"] = [astuple(call) for call in given["calls"]]
    return given


def _restored(others: dict[str, Any]) -> dict[str, Any]:
    made = {name: _as_tuple(value) for name, value in others.items()}
    if "calls" in made:
        made["calls"] = tuple(ToolCall(*call) for call in made["calls"])
    return made


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _optional(kind: type[Any]) -> tuple[Callable[[Any], tuple[Any, ...]], tuple[str, ...], tuple[Any, ...]]:
    """Return what gets all fields with a default, their names, and the defaults; a row's number is none of them."""
    found = [field for field in fields(kind) if field.default is not MISSING and field.name != "number"]
    names = tuple(field.name for field in found)
    if len(names) < 2:
        return (lambda thing: tuple(getattr(thing, name) for name in names)), names, tuple(f.default for f in found)
    return attrgetter(*names), names, tuple(field.default for field in found)


_KINDS: tuple[type[Any], ...] = (Conversation, PlainText, Preference)
_MAIN: tuple[Callable[[Any], tuple[Any, ...]], ...] = (
    lambda row: (row.messages,),
    lambda row: (row.text,),
    attrgetter("asked", "chosen", "rejected"),
)
_OPTIONAL = {kind: _optional(kind) for kind in (*_KINDS, Message)}
