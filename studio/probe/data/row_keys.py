"""By what rows are known again: short hashes of their prompts and answers, of a million rows as columns of bytes.

Computing them takes about as long as reading the rows. So those of stored rows are kept in the data cache too.
"""

import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from struct import iter_unpack
from typing import Literal, NamedTuple, get_args, overload

from studio.probe.data.opened import Progress
from studio.probe.data.row_cache import code_sum
from studio.probe.data.rows import Preference, Row
from studio.probe.data.stored_rows import StoredRows, packed, unpacked, without_number
from studio.probe.data.views import Chain, Drawn
from studio.runs.data_cache import find_entry, keep_entry, remove_folder, scratch_entry, sum_of_bytes
from studio.runs.spool import FileBytes, HeldBytes

_FILE = "keys.bin"
_TOLD_ROWS = 512
_NONE = bytes(12)

Column = Literal["content", "prompt", "answer", "twin_prompt", "first", "twin_answer", "row"]
"""One hash of every row: those of `RowKeys`, those of `TwinKeys`, and of the row to the letter."""
_BYTES: dict[Column, int] = dict.fromkeys(get_args(Column), 12) | {"row": 8}


class RowKeys(NamedTuple):
    """Short hashes by which a row is found again, whatever its letter case and white space.

    A prompt is what the user and tools say, an answer what the assistant says. System prompts, which whole files share,
    are in neither. `content` is both together, of a pair of answers with the rejected one; `prompt` is empty for plain
    text.
    """

    content: bytes
    prompt: bytes
    answer: bytes


def row_keys(row: Row) -> RowKeys:
    """Return the hashes by which a row is found again."""
    return _row_keys(row, row.prompt, row.answer)


def _row_keys(row: Row, asked: str, said: str) -> RowKeys:
    prompt, answer = _digest("p", asked) if asked else b"", answer_key(said)
    other = (answer_key(row.other_answer),) if isinstance(row, Preference) else ()
    return RowKeys(blake2b(b"\0".join((prompt, answer, *other))), prompt, answer)


def answer_key(answer: str) -> bytes:
    """Return the hash of an answer, as in `RowKeys`."""
    return _digest("a", answer)


class TwinKeys(NamedTuple):
    """Short hashes that two rows share if they are twins, whatever their letter case, white space and punctuation.

    Attributes:
        prompt: Of all that the user and tools say; of a plain text, of the text.
        first: Of the user's first turn; empty for plain text.
        answer: Of all that the assistant says.
        same_prompt: Of the prompt, punctuation included.
    """

    prompt: bytes
    first: bytes
    answer: bytes
    same_prompt: bytes


def twin_keys(row: Row) -> TwinKeys:
    """Return the hashes that a row shares with its twins."""
    asked, said = row.prompt, row.answer
    return TwinKeys(*_twin_keys(asked, first_turn(row), said), _digest("p", asked) if asked else answer_key(said))


def _twin_keys(asked: str, first: str, said: str) -> tuple[bytes, bytes, bytes]:
    answer = _digest("a", _letters(said))
    if not asked:
        return answer, b"", answer
    prompt = _digest("p", _letters(asked))
    if not first:
        return prompt, b"", answer
    return prompt, prompt if first == asked else _digest("p", _letters(first)), answer


def first_turn(row: Row) -> str:
    """Return what the user says first; empty for plain text."""
    return next((turn.content for turn in row.turns if turn.role == "user"), "")


def _digest(kind: str, text: str) -> bytes:
    """Return a short hash of a text, equal for texts that differ in letter case and white space alone."""
    return blake2b(f"{kind}\0{' '.join(text.casefold().split())}".encode("utf-8", "surrogatepass"))


def _letters(text: str) -> str:
    """Return a text without white space and punctuation; one that holds nothing else stays as it is."""
    folded = text.casefold()
    if folded.isascii():
        return folded.translate(_ASCII_MARKS) or text
    folded = unicodedata.normalize("NFKC", folded)
    for mark in filter(_is_mark, set(folded)):  # a third of the time of one look at each character
        folded = folded.replace(mark, "")
    return folded or text


@cache
def _is_mark(character: str) -> bool:
    """Return whether a character is white space, punctuation, a control or a lone accent; signs such as + stay."""
    kind = unicodedata.category(character)
    return kind[0] in "PZ" or kind in ("Cc", "Cf", "Sk")


_ASCII_MARKS = {code: None for code in range(128) if _is_mark(chr(code))}


def blake2b(data: bytes, key: bytes = b"") -> bytes:
    """Return the hash of 12 bytes that all keys consist of."""
    import hashlib  # noqa: PLC0415  OpenSSL: 3 ms and 5 MiB that a plan has no use for

    return hashlib.blake2b(data, key=key, digest_size=12).digest()


@dataclass(frozen=True, slots=True)
class KeyColumn(Sequence[bytes]):
    """One hash of each row, empty where a row has none; held as bytes, one after another.

    Attributes:
        content: The hashes; zeros where there is none.
        size: Bytes of each.
    """

    content: bytes
    size: int

    def __len__(self) -> int:
        return len(self.content) // self.size

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> list[bytes]: ...
    def __getitem__(self, place: int | slice) -> bytes | list[bytes]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        begin = range(len(self))[place] * self.size
        found = self.content[begin : begin + self.size]
        return b"" if found == _NONE[: self.size] else found

    def __iter__(self) -> Iterator[bytes]:
        none = _NONE[: self.size]
        return (b"" if one == none else one for (one,) in iter_unpack(f"{self.size}s", self.content))

    def short(self) -> Iterator[int]:
        """Yield the first 8 bytes of each hash as a number; 0 where there is none."""
        return (one for (one,) in iter_unpack(f">Q{self.size - 8}x", self.content))

    def numbered(self) -> "array[int]":
        """Return a number from 0 for each row, equal for equal hashes, in order of appearance; -1 where there is none.

        At most 130 MB are taken for a million rows meanwhile, and 8 afterwards.
        """
        seen: dict[bytes, int] = {}
        return array("q", (seen.setdefault(key, len(seen)) if key else -1 for key in self))


class KeyTable:
    """The hashes of many rows, a column at a time."""

    def __init__(self, count: int, source: FileBytes | HeldBytes) -> None:
        """Take the columns of `count` rows, one after another."""
        self._count, self._source = count, source

    def __len__(self) -> int:
        return self._count

    @property
    def content(self) -> bytes:
        """All columns, as they are read from a source."""
        return self._source.read(0, sum(_BYTES.values()) * self._count)

    def column(self, name: Column) -> KeyColumn:
        """Return one hash of each row."""
        begin, size = sum(size for other, size in _BYTES.items() if other < name), _BYTES[name]
        return KeyColumn(self._source.read(begin * self._count, (begin + size) * self._count), size)


class ChosenKeys:
    """The hashes of several tables, one after another, or of some of their rows."""

    def __init__(self, tables: "Sequence[Keys]", places: Sequence[int] | None = None) -> None:
        """Take the tables; `places` are the rows that are meant, None for all."""
        self._tables, self._places = tables, places

    def __len__(self) -> int:
        return sum(map(len, self._tables)) if self._places is None else len(self._places)

    def column(self, name: Column) -> KeyColumn:
        """Return one hash of each row."""
        size = _BYTES[name]
        every = b"".join(table.column(name).content for table in self._tables)
        if self._places is None:
            return KeyColumn(every, size)
        return KeyColumn(b"".join(every[place * size : (place + 1) * size] for place in self._places), size)


Keys = KeyTable | ChosenKeys


def keys_of(rows: Sequence[Row], progress: Progress | None = None) -> Keys:
    """Return the hashes of rows; those of stored rows are computed once for all rows of the store, and kept.

    Args:
        rows: Any rows.
        progress: Gets (rows done, rows in all); may raise to end it.
    """
    if isinstance(rows, Chain):
        return ChosenKeys([keys_of(part, progress) for part in rows.parts])
    if isinstance(rows, Drawn):
        return ChosenKeys([keys_of(rows.rows, progress)], rows.places)
    if not isinstance(rows, StoredRows):
        return _computed(len(rows), ((row, packed(row)) for row in rows), progress)
    if rows.store.keys is None:
        rows.store.keys = _of_store(rows.whole(), progress)
    whole: KeyTable = rows.store.keys
    every = isinstance(rows.places, range) and rows.places == range(len(whole))
    return whole if every else ChosenKeys([whole], array("q", rows.places))


def _of_store(rows: StoredRows, progress: Progress | None) -> KeyTable:
    name = rows.store.name and f"keys-{sum_of_bytes(f'{rows.store.name} {code_sum()}'.encode())}"
    with suppress(OSError):
        if name and (entry := find_entry(name)):
            return KeyTable(len(rows), FileBytes(entry.folder / _FILE))
    table = _computed(len(rows), ((unpacked(line), line) for line in rows.packed()), progress)
    scratch = None
    try:
        if name:
            scratch = scratch_entry(name, sum(_BYTES.values()) * len(rows))
            (scratch / _FILE).write_bytes(table.content)
            return KeyTable(len(rows), FileBytes(keep_entry(name, scratch, {}).folder / _FILE))
    except OSError:
        if scratch:
            remove_folder(scratch)
    return table


def _computed(count: int, rows: Iterable[tuple[Row, bytes]], progress: Progress | None) -> KeyTable:
    """Return the hashes of rows, each given with what `packed` makes of it."""
    import xxhash  # noqa: PLC0415  not needed for the first frame

    columns = {name: bytearray() for name in sorted(_BYTES)}
    for done, (row, line) in enumerate(rows, start=1):
        asked, said = row.prompt, row.answer
        keys, twins = _row_keys(row, asked, said), _twin_keys(asked, first_turn(row), said)
        columns["content"] += keys.content
        columns["prompt"] += keys.prompt or _NONE
        columns["answer"] += keys.answer
        columns["twin_prompt"] += twins[0]
        columns["first"] += twins[1] or _NONE
        columns["twin_answer"] += twins[2]
        columns["row"] += xxhash.xxh3_64(without_number(line)).digest()
        if progress and (done % _TOLD_ROWS == 0 or done == count):
            progress(done, count)
    return KeyTable(count, HeldBytes(b"".join(columns.values())))
