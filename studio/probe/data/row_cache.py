"""Keeps what was read of a large data file, so that the same file is not read again a second later by another process.

An entry of the data cache (`studio.runs.data_cache`) holds the rows as `stored_rows` writes them, and everything else
that a `DataSet` says. It is found by the content of the file, not by its times; by how the file is read; and by the
source of this package, so that another version of it reads the file again.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from studio.probe.data.findings import Findings
from studio.probe.data.meant import DataFiles
from studio.probe.data.opened import Progress
from studio.probe.data.reading import Reading
from studio.probe.data.rows import DataSet, Finding
from studio.probe.data.stored_rows import StoredRows
from studio.runs.data_cache import find_entry, keep_entry, scratch_entry, sum_of, sum_of_bytes

LEAST_BYTES = 2**20
"""Smaller files are read again: it takes less than 50 ms."""


class RowCache:
    """What is kept of one file, read in one way."""

    def __init__(self, place: DataFiles, how: Reading, progress: Progress | None) -> None:
        """Look at the files, and read them through if they are large.

        Args:
            place: The files.
            how: How they are read.
            progress: May raise to end the reading.

        Raises:
            OSError: It cannot be read.
        """
        self._place = place
        self._tell = (lambda done, total: progress(0, max(1, total))) if progress else None
        self._key = ""
        if place.size_bytes >= LEAST_BYTES:
            self._seen = self._look()
            self._key = self._made_key(how)

    def recall(self) -> tuple[DataSet, Findings] | None:
        """Return what was read of the file before; None where nothing sound is kept."""
        entry = find_entry(self._key, self._tell) if self._key else None
        if entry is None:
            return None
        try:
            rows = StoredRows.opened(entry.folder, entry.folder.name)
        except OSError:  # removed just now
            return None
        table = {name: _as_tuple(value) for name, value in entry.facts["data"].items()}
        table["findings"] = tuple(Finding(**finding) for finding in entry.facts["data"]["findings"])
        data = DataSet(path=self._place.path, rows=rows, **table)
        return data, Findings.restored(entry.facts["findings"], data.findings)

    def scratch(self) -> Path:
        """Return a new folder for the rows.

        Raises:
            OSError: The disk refuses.
        """
        return scratch_entry(self._key or "rows", self._place.size_bytes)

    def keep(self, folder: Path, data: DataSet, findings: Findings) -> Path:
        """Return where the rows lie from now on: in an entry, or where they are if the file was changed meanwhile.

        Args:
            folder: Where they were written.
            data: What was read, without the rows.
            findings: What was found on the way.

        Raises:
            OSError: The disk refuses.
        """
        if not self._key or self._look() != self._seen:
            return folder
        table = asdict(data)
        del table["path"], table["rows"]
        return keep_entry(self._key, folder, {"data": table, "findings": findings.table()}).folder

    def _look(self) -> list[Any]:
        """Return sizes and times of the files."""
        return [(str(path), seen.st_size, seen.st_mtime_ns, seen.st_ino) for path, seen in self._files()]

    def _made_key(self, how: Reading) -> str:
        names = self._place.names or [path.name for path in self._place.files]
        sums = [(name, sum_of(path, self._tell)) for name, path in zip(names, self._place.files, strict=True)]
        return f"rows-{sum_of_bytes(repr((self._place.path.name, sums, how, code_sum())).encode())}"

    def _files(self) -> Sequence[tuple[Path, Any]]:
        return [(path, path.stat()) for path in self._place.files]


@cache
def code_sum() -> str:
    """Return the checksum of this package's source."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sum_of_bytes(b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in files))


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
