"""What a training run was made from, by content: in short in its log, tensor by tensor and row by row in a file.

The log's checksums tell whether base or rows are others now. `identity.json`, which the first start writes, tells which
tensor or row it is. A file that does not match the log's checksums counts as missing. This module knows neither models
nor data: both come as plain tables.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, overload

from studio.core.events import Identified, RunEvent, Started
from studio.runs.atomic import read_object, write_whole
from studio.runs.layout import RunPaths
from studio.runs.log import EventTail

_SCHEMA = 1
_MOST_BYTES = 256 * 2**20
_HASH_CHARACTERS = 16
_MOST_ROWS = 1_000_000

_Kind = TypeVar("_Kind", bound=RunEvent)


@dataclass(frozen=True, slots=True)
class RowHashes(Sequence[str]):
    """A hash of each row, in order, without an object for each.

    Attributes:
        text: The hashes of 16 characters, one after another.
    """

    text: str

    def __len__(self) -> int:
        return len(self.text) // _HASH_CHARACTERS

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "RowHashes": ...
    def __getitem__(self, place: int | slice) -> "str | RowHashes":
        if isinstance(place, slice):
            return RowHashes("".join(self[one] for one in range(*place.indices(len(self)))))
        begin = range(len(self))[place] * _HASH_CHARACTERS
        return self.text[begin : begin + _HASH_CHARACTERS]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run was made from at its first start; None or empty where its log does not say.

    Attributes:
        recipe: The recipe's tables.
        versions: The versions of the libraries.
        base: The fingerprint of its base; without single tensors where `identity.json` is lost.
        rows: Counts and checksums of the rows, as in `Identified`.
        train_hashes: The hash of every training row, in order; None where they are not known.
        whole: Whether `identity.json` is there and matches the log.
    """

    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    base: Mapping[str, Any] | None
    rows: Mapping[str, Any] | None
    train_hashes: RowHashes | None
    whole: bool = False


def read_identity(paths: RunPaths) -> Identity:
    """Return what a run's log and `identity.json` say of its first start."""
    started, identified = _first(paths, Started), _first(paths, Identified)
    recipe, versions = (started.recipe, started.versions) if started else ({}, {})
    if identified is None:
        return Identity(recipe, versions, None, None, None)
    kept = _read(paths)
    base, hashes = kept.get("base"), kept.get("train_rows")
    long = isinstance(base, dict) and all(base.get(key) == value for key, value in identified.base.items())
    cut = _cut(hashes, identified.rows.get("train"))
    return Identity(
        recipe=recipe,
        versions=versions,
        base=base if isinstance(base, dict) and long else identified.base,
        rows=identified.rows,
        train_hashes=cut,
        whole=long and (hashes is None or cut is not None),
    )


def first_date(paths: RunPaths) -> datetime | None:
    """Return the local time of a training run's first start, which its chat template is told; None where unknown."""
    started = _first(paths, Started)
    try:
        return datetime.fromisoformat(started.date) if started else None
    except ValueError:
        return None


def write_identity(paths: RunPaths, base: Mapping[str, Any], train_hashes: RowHashes) -> None:
    """Write `identity.json`. More than a million rows are not kept one by one.

    Args:
        paths: The run.
        base: The whole fingerprint of its base.
        train_hashes: The hash of every training row.

    Raises:
        OSError: The disk refuses.
    """
    rows = train_hashes.text if len(train_hashes) <= _MOST_ROWS else None
    write_whole(paths.identity, json.dumps({"schema": _SCHEMA, "base": base, "train_rows": rows}))


def _first(paths: RunPaths, kind: type[_Kind]) -> _Kind | None:
    """Return the first event of a kind, reading the log no further than there."""
    tail = EventTail(paths.events)
    before = -1
    while tail.behind_bytes != before:
        before = tail.behind_bytes
        found = next((event for event in tail.poll() if isinstance(event, kind)), None)
        if found is not None:
            return found
    return None


def _read(paths: RunPaths) -> dict[str, Any]:
    table = read_object(paths.identity, _MOST_BYTES)
    return table if table.get("schema") == _SCHEMA else {}


def _cut(hashes: object, count: object) -> "RowHashes | None":
    if not isinstance(hashes, str) or not isinstance(count, int) or len(hashes) != count * _HASH_CHARACTERS:
        return None
    return RowHashes(hashes)
