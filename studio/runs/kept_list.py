"""A list of measurements that this machine keeps in its home folder: small, whole, written by one process at a time.

Reading never fails, whatever lies there: an entry that is not sound is passed over, and a damaged file holds none.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from studio.runs.atomic import read_object, write_whole
from studio.runs.home import studio_home

SCHEMA = 1
_LOCK_SECONDS = 5.0

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True)
class KeptList(Generic[_Entry]):
    """One such file.

    Attributes:
        name: The file's name, without `.json`.
        key: The key of the list in the file.
        most: How many of the newest entries are read.
        most_bytes: A larger file is not read.
        read_one: Returns the entry of a JSON value; None where the value is not sound.
        write_one: Returns an entry as a JSON value.
    """

    name: str
    key: str
    most: int
    most_bytes: int
    read_one: Callable[[Any], _Entry | None]
    write_one: Callable[[_Entry], dict[str, Any]]

    @property
    def path(self) -> Path:
        """Where it lies on this machine."""
        return studio_home() / f"{self.name}.json"

    def read(self, path: Path | None = None) -> tuple[_Entry, ...]:
        """Return every sound entry, the oldest first; none where the file is missing, unreadable or something else."""
        path = path or self.path
        document = read_object(path, self.most_bytes) if path.is_file() else {}
        items = document.get(self.key) if document.get("schema") == SCHEMA else None
        if not isinstance(items, list):
            return ()
        found = (self.read_one(item) for item in items[-self.most :])
        return tuple(item for item in found if item is not None)

    def change(self, change: Callable[[tuple[_Entry, ...]], Iterable[_Entry]], path: Path | None = None) -> None:
        """Keep what a function makes of the entries, with no other process in between.

        Raises:
            OSError: The file cannot be written.
            TimeoutError: Another process has held it for seconds.
        """
        from filelock import FileLock, Timeout  # noqa: PLC0415  0.1 s that only the end of a run or race pays

        path = path or self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{self.name}.lock")
        try:
            with FileLock(lock, timeout=_LOCK_SECONDS):
                entries = [self.write_one(item) for item in change(self.read(path))]
                document = {"schema": SCHEMA, self.key: entries}
                write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
        except Timeout as error:
            raise TimeoutError(f"{lock.name} was held by another process for {_LOCK_SECONDS:g} s") from error
