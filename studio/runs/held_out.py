"""Which rows a training run held out and which it trained on, by content: `held_out.json` in its folder.

The training job writes it once it has split its data, before it loads a model; a resumed run keeps it. Whatever is
called "held out" of the run later is looked up here. The split is not made again: the data file may have been edited,
and another number of rows would give another split. The file holds hashes, no text.
"""

import json
import sys
from array import array
from base64 import b64decode, b64encode
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.layout import RunPaths

SCHEMA = 1
HASH_BYTES = 8
"""Length of a trained row's hash. Among 10 million of them one look in 10^12 takes another row for a trained one."""
_LARGEST_BYTES = 512 * 2**20


class Hashes(Set[bytes]):
    """A set of hashes of `HASH_BYTES` each, without an object for each: a million of them take 8 MB.

    Attributes:
        numbers: The hashes as numbers, in order.
    """

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        """Take hashes as numbers, in any order."""
        ordered = array("Q", sorted(array("Q", numbers)))
        self.numbers = array("Q", map(itemgetter(0), groupby(ordered)))

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> "Hashes":  # type: ignore[override]  # what is in it are hashes
        return cls(int.from_bytes(one, "big") for one in it)

    @classmethod
    def of(cls, content: bytes) -> "Hashes":
        """Return the set of hashes that stand one after another."""
        return cls(_swapped(array("Q", content)))

    @property
    def content(self) -> bytes:
        """The hashes, one after another, in order."""
        return _swapped(self.numbers[:]).tobytes()

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[bytes]:
        return (number.to_bytes(HASH_BYTES, "big") for number in self.numbers)

    def __contains__(self, one: object) -> bool:
        return isinstance(one, bytes) and self.holds(int.from_bytes(one, "big"))

    def __or__(self, other: Set[Any]) -> "Hashes":
        return Hashes(chain(self.numbers, other.numbers)) if isinstance(other, Hashes) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def holds(self, number: int) -> bool:
        """Return whether a hash is among them, given as a number."""
        place = bisect_left(self.numbers, number)
        return place < len(self.numbers) and self.numbers[place] == number


def _swapped(numbers: "array[int]") -> "array[int]":
    """Return numbers of this machine as those whose first byte is the highest, or the other way round."""
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """Rows that were trained on, as hashes of `HASH_BYTES` each.

    Attributes:
        rows: How many rows there are, copies included.
        contents: Hashes of whole rows.
        prompts: Hashes of their prompts, and those that twins share: of prompts, first turns and plain texts without
            punctuation. Runs of earlier versions have none of the latter.
        answers: Hashes of their answers.
    """

    rows: int = 0
    contents: Hashes = field(default_factory=Hashes)
    prompts: Hashes = field(default_factory=Hashes)
    answers: Hashes = field(default_factory=Hashes)

    def __or__(self, other: "TrainedRows") -> "TrainedRows":
        """Return the rows of both."""
        return TrainedRows(
            max(self.rows, other.rows),
            self.contents | other.contents,
            self.prompts | other.prompts,
            self.answers | other.answers,
        )


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Losses of held-out rows, one row after another.

    Attributes:
        sums: The summed loss of each row, in nats.
        tokens: The labelled tokens of each row.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DrawnFrom:
    """A source of the mixture that a run was trained on.

    Attributes:
        path: Absolute path of the file, or `embedded`.
        format: The format as which it was read.
        drawn: How many rows were drawn from it.
        held_out: How many of them were held out.
        columns: What it was told of the file's names of columns, as `Source.columns`.
        prompt: The line that writes its prompts, as `Source.prompt`.
    """

    path: str
    format: str
    drawn: int
    held_out: int
    columns: tuple[tuple[str, str], ...] = ()
    prompt: str = ""


MIXTURE = "mixture:"
"""In place of a path: the sources of the run's mixture."""


@dataclass(frozen=True, slots=True)
class HeldOutRecord:
    """What a run held out.

    Attributes:
        data: Absolute path of the file that was trained on, `embedded`, or `MIXTURE`.
        held_from: Path of the file that holds the held-out rows: the same, or a file of their own.
        format: The format as which both were read.
        held_out: Hash of each held-out row, in the file's order; a row that was held out twice stands here twice.
        trained: The rows that were trained on.
        before: Losses of the held-out rows before the first step; None until they are measured.
        sources: The files of a mixture.
        last_part: How many characters of the one document's end were held out; 0 where whole rows were.
        reading: How both were read besides: names of columns, the line that writes prompts (`Reading.table`).
    """

    data: str
    held_from: str
    format: str
    held_out: tuple[str, ...]
    trained: TrainedRows = field(default_factory=TrainedRows)
    before: RowLosses | None = None
    sources: tuple[DrawnFrom, ...] = ()
    last_part: int = 0
    reading: Mapping[str, Any] = field(default_factory=dict)


def keep_record(paths: RunPaths, record: HeldOutRecord) -> None:
    """Write the record of a run; the training job is its only writer.

    Raises:
        OSError: The disk refuses.
    """
    trained, before = record.trained, record.before
    table = {
        "schema": SCHEMA,
        "data": record.data,
        "held_from": record.held_from,
        "format": record.format,
        "held_out": list(record.held_out),
        "last_part": record.last_part,
        "sources": [asdict(source) for source in record.sources],
        "reading": dict(record.reading),
        "trained": {
            "rows": trained.rows,
            **{name: _packed(getattr(trained, name)) for name in ("contents", "prompts", "answers")},
        },
        "before": {"sums": list(before.sums), "tokens": list(before.tokens)} if before else None,
    }
    write_whole(paths.held_out, json.dumps(table, allow_nan=False) + "\n")


def keep_losses_before(paths: RunPaths, losses: RowLosses) -> None:
    """Add the losses before the first step to the record.

    Raises:
        BadInput: There is no record.
        OSError: The disk refuses.
    """
    keep_record(paths, replace(read_record(paths), before=losses))


def read_record(paths: RunPaths) -> HeldOutRecord:
    """Return what a training run held out.

    Raises:
        BadInput: There is no record, or it is damaged: nothing of this run may be called held out.
    """
    name = plain(paths.name, one_line=True)
    try:
        return _record(json.loads(_content(paths.held_out)))
    except FileNotFoundError:
        raise BadInput(
            f"the run {name} has no record of its held-out rows ({paths.held_out.name} is missing): it never read its "
            "data, or an older version trained it. Which rows it was trained on is not known, so none can be called "
            "held out. Train it again with this version."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"the record of held-out rows of the run {name} ({paths.held_out.name}) cannot be read: "
            f"{plain(str(error), one_line=True, limit=200)}. None of its rows can be called held out; train it again."
        ) from error


def shared_record(records: Sequence[HeldOutRecord]) -> HeldOutRecord:
    """Return one record for several runs: the rows that all of them held out, and those that any was trained on."""
    shared = Counter(records[0].held_out)
    trained = records[0].trained
    for record in records[1:]:
        shared &= Counter(record.held_out)
        trained |= record.trained
    held = []
    for content in records[0].held_out:
        # A row that one run held out may have been trained on by another.
        if shared[content] and bytes.fromhex(content)[:HASH_BYTES] not in trained.contents:
            shared[content] -= 1
            held.append(content)
    return replace(records[0], held_out=tuple(held), trained=trained, before=None)


def _record(table: Mapping[str, Any]) -> HeldOutRecord:
    if table["schema"] != SCHEMA:
        raise ValueError(f"found schema {table['schema']!r}; wanted {SCHEMA}")
    trained, before = table["trained"], table["before"]
    sets = {name: _unpacked(trained[name]) for name in ("contents", "prompts", "answers")}
    return HeldOutRecord(
        data=str(table["data"]),
        held_from=str(table["held_from"]),
        format=str(table["format"]),
        held_out=tuple(bytes.fromhex(content).hex() for content in table["held_out"]),
        trained=TrainedRows(int(trained["rows"]), **sets),
        before=RowLosses(tuple(map(float, before["sums"])), tuple(map(int, before["tokens"]))) if before else None,
        last_part=int(table.get("last_part", 0)),
        sources=tuple(
            DrawnFrom(
                *(str(one["path"]), str(one["format"]), int(one["drawn"]), int(one["held_out"])),
                columns=tuple((str(ours), str(column)) for ours, column in one["columns"]),
                prompt=str(one["prompt"]),
            )
            for one in table.get("sources", ())
        ),
        reading=dict(table.get("reading", {})),
    )


def _content(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_BYTES:
        raise ValueError("it is larger than 512 MiB")
    return path.read_bytes()


def _packed(hashes: Hashes) -> str:
    return b64encode(hashes.content).decode("ascii")


def _unpacked(text: str) -> Hashes:
    data = b64decode(text, validate=True)
    if len(data) % HASH_BYTES:
        raise ValueError(f"found {len(data)} bytes of hashes; wanted a multiple of {HASH_BYTES}")
    return Hashes.of(data)
