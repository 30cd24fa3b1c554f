"""Raw rows of Parquet and Arrow files, in batches, only the columns that some format knows, within limits.

A Parquet file of a few hundred bytes may hold a million rows of a megabyte each, as one text in a dictionary and a
count. So texts are read as dictionaries, which are no larger than what was compressed, and their size is computed
before rows are made of them. A compressed Arrow file says beforehand what each of its parts unpacks to
(`studio.probe.data.arrow_parts`).
"""

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.arrow_parts import ARROW_MAGIC, part_sizes
from studio.probe.data.beside import LABEL_COLUMNS
from studio.probe.data.formats import UnknownColumns, wrong_columns
from studio.probe.data.misreads import MEDIA_COLUMNS
from studio.probe.data.named import read_columns
from studio.probe.data.opened import MAX_LINE_BYTES, Progress
from studio.probe.data.opened import free_bytes as _free_bytes
from studio.probe.data.reading import AS_IT_IS, Reading

MAX_ROWS = 20_000_000
"""More than any fine-tuning set has. An empty row takes no room in the file, but time and memory when it is read."""
MAX_VALUES = 200_000_000
"""Most values of one column in one row group, which is decoded at once if it is no text: 1.6 GB of 64-bit numbers."""
_PRESENCE = MEDIA_COLUMNS
_BATCH_ROWS = 1024
_MOST_BATCH_BYTES = 256 * 2**20
_MEMORY_SHARE = 0.5
"""Most of the free memory that the texts of a file may unpack to, as for packed files."""


def parquet_rows(path: Path, progress: Progress | None, how: Reading = AS_IT_IS) -> Iterator[tuple[int, Any]]:
    """Yield (row from 1, columns as a dict); `progress` gets (rows read, rows in all) and may raise to end it.

    Columns that no format knows are there as keys with the value None, so that they can be named; those that change
    what a row means without being text (`_PRESENCE`) have True or None, for something or nothing.

    Raises:
        BadInput: pyarrow is not installed, the file is no whole Parquet file, it has no known column, or it holds too
            much: a row above 64 MiB, as in JSON Lines, or rows above half of the free memory.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415  0.2 s that only readers of Parquet pay
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise BadInput(f"{path.name} is Parquet, which needs pyarrow: pip install pyarrow") from None
    name = plain(path.name, one_line=True)
    try:
        with pq.ParquetFile(path) as file:
            chosen = _Columns.of(file.schema_arrow, name, how)
            leaves = {column: _smallest_leaf(file, column) for column in chosen.seen}
            limits = _Limits(name, _free_bytes())
            limits.check_sizes(file, chosen.known, leaves)
            texts = [leaf.path for leaf in _leaves(file) if leaf.physical_type == "BYTE_ARRAY"]
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            total, done = file.metadata.num_rows, 0
            for group in range(file.metadata.num_row_groups):
                # A whole group at once: if batches were read one by one, each would hold the dictionary of all before.
                read = file.read_row_group(group, columns=[*chosen.known, *leaves.values()])
                for made in _rows(read.to_batches(max_chunksize=_BATCH_ROWS), chosen, limits, done):
                    for done, row in made:
                        yield done, row
                    if progress:
                        progress(done, total)
    except pa.ArrowNotImplementedError as error:
        said = plain(str(error), one_line=True, limit=200)
        raise BadInput(
            f"{name} cannot be read by pyarrow: {said}. Write it again with smaller row groups (row_group_size=10000)."
        ) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{name} is not a whole Parquet file: {plain(str(error), one_line=True, limit=200)}") from None


def arrow_rows(path: Path, progress: Progress | None, how: Reading = AS_IT_IS) -> Iterator[tuple[int, Any]]:
    """Yield the rows of an Arrow file (also called Feather) or stream, as `parquet_rows` does.

    `datasets` saves streams. `progress` gets (bytes read, bytes in all).

    Raises:
        BadInput: pyarrow is not installed, the file is no whole Arrow file, it has no known column, or it holds too
            much, see `parquet_rows`.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415  as above
    except ImportError:
        raise BadInput(f"{path.name} is an Arrow file, which needs pyarrow: pip install pyarrow") from None
    name = plain(path.name, one_line=True)
    try:
        with pa.memory_map(str(path)) as source:
            total = source.size()
            limits = _Limits(name, _free_bytes())
            limits.check_parts(part_sizes(source))
            source.seek(0)
            reader = pa.ipc.open_file(source) if source.read(6) == ARROW_MAGIC else _open_stream(source)
            chosen = _Columns.of(reader.schema, name, how)
            done = 0
            for batch in _batches_of(reader):
                limits.check_count(done + batch.num_rows)
                batch.validate(full=True)  # what a hostile file says of its texts may point anywhere
                cut = [batch.slice(at, _BATCH_ROWS) for at in range(0, batch.num_rows, _BATCH_ROWS)]
                for made in _rows(cut, chosen, limits, done):
                    for done, row in made:
                        yield done, row
                    if progress:
                        progress(min(source.tell(), total), total)
            if progress:
                progress(total, total)
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        raise BadInput(f"{name} is not a whole Arrow file: {plain(str(error), one_line=True, limit=200)}") from None


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of a file: those read whole, those of which only is looked whether they hold something, all."""

    known: tuple[str, ...]
    seen: tuple[str, ...]
    unread: Mapping[str, None]
    schema: Any

    @classmethod
    def of(cls, schema: Any, name: str, how: Reading) -> Self:
        """Choose among a file's columns.

        Raises:
            BadInput: None of them is known.
        """
        import pyarrow as pa  # noqa: PLC0415  as above

        columns = list(schema.names)
        flat = {field.name for field in schema if not pa.types.is_nested(field.type)}
        known = read_columns(columns, how, flat)
        if not set(known).difference(LABEL_COLUMNS):
            raise UnknownColumns(f"{name}: {wrong_columns(columns)}")
        if len(set(columns)) < len(columns):
            twice = next(column for place, column in enumerate(columns) if column in columns[:place])
            raise BadInput(f"{name}: the column '{plain(twice, one_line=True, limit=40)}' stands twice.")
        wanted = pa.schema([schema.field(column) for column in known])
        return cls(known, tuple(c for c in columns if c in _PRESENCE), dict.fromkeys(columns), wanted)


class _Limits:
    """What a file may hold, and what was read of it so far."""

    def __init__(self, name: str, free_bytes: float) -> None:
        self._name = name
        self._most_bytes = free_bytes * _MEMORY_SHARE
        self._read_bytes = 0

    def check_sizes(self, file: Any, known: Sequence[str], leaves: Mapping[str, str]) -> None:
        """Compare the sizes in the file's metadata with the limits.

        Args:
            file: The Parquet file.
            known: Columns that are read whole.
            leaves: Columns of which one leaf is read, and its path.

        Raises:
            BadInput: It is too much.
        """
        self.check_count(file.metadata.num_rows)
        for group in range(file.metadata.num_row_groups):
            row_group = file.metadata.row_group(group)
            for place in range(row_group.num_columns):
                column = row_group.column(place)
                leaf = column.path_in_schema
                if leaf.partition(".")[0] not in known and leaf not in leaves.values():
                    continue
                if column.num_values > MAX_VALUES or column.total_uncompressed_size > self._most_bytes:
                    self._refuse(max(8 * column.num_values, column.total_uncompressed_size), "one of its columns")

    def check_parts(self, sizes: Iterator[int]) -> None:
        """Compare what the parts of an Arrow file say that they unpack to with the limits.

        Raises:
            BadInput: One of them is too large.
        """
        for size_bytes in sizes:
            if size_bytes > self._most_bytes:
                self._refuse(size_bytes, "one of its batches")

    def check_count(self, rows: int) -> None:
        """Compare a number of rows with the limit.

        Raises:
            BadInput: There are too many.
        """
        if rows > MAX_ROWS:
            raise BadInput(
                f"{self._name} says that it holds {rows:,} rows; at most {MAX_ROWS:,} are read. Take a part of them."
            )

    def take(self, size_bytes: int, number: int) -> None:
        """Add the size of a group's rows before they are made; the last of them has this number.

        Raises:
            BadInput: All rows so far are too large.
        """
        self._read_bytes += size_bytes
        if self._read_bytes > self._most_bytes:
            self._refuse(self._read_bytes, f"its rows up to {number:,}")

    def check_row(self, size_bytes: int, number: int) -> None:
        """Compare one row with the longest line of JSON.

        Raises:
            BadInput: It is longer.
        """
        if size_bytes > MAX_LINE_BYTES:
            raise BadInput(
                f"{self._name}, row {number:,} holds {size_bytes / 1e6:,.0f} MB when it is unpacked; at most "
                f"{MAX_LINE_BYTES / 2**20:.0f} MiB are a row."
            )

    def _refuse(self, size_bytes: int, what: str) -> None:
        raise BadInput(
            f"{self._name} unpacks to more than fits: {what} alone hold {size_bytes / 1e9:,.1f} GB, and at most "
            f"{self._most_bytes / 1e9:,.1f} GB, half of the free memory, are read. Take a part of the rows."
        )


def _rows(
    batches: Sequence[Any], chosen: _Columns, limits: "_Limits", done: int
) -> Iterator[Iterator[tuple[int, dict[str, Any]]]]:
    """Yield the rows of each batch in turn, numbered on from `done`; their size is looked at before they are made."""
    sizes = [_unpacked_bytes(batch.select(chosen.known)) for batch in batches]
    limits.take(sum(sizes), done + sum(map(len, batches)))
    for batch, size_bytes in zip(batches, sizes, strict=True):
        # Ordinary rows are made together, which is fast; long ones one by one, after a look at each one's size.
        together = size_bytes <= _MOST_BATCH_BYTES
        for some in [batch] if together else (batch.slice(place, 1) for place in range(len(batch))):
            if not together:
                limits.check_row(_unpacked_bytes(some.select(chosen.known)), done + 1)
            yield _made(some, chosen, done)
            done += len(some)


def _made(batch: Any, chosen: _Columns, done: int) -> Iterator[tuple[int, dict[str, Any]]]:
    there = {column: _says_something(batch.column(column)) for column in chosen.seen}
    named = chosen.known
    rows = batch.select(named).cast(chosen.schema).to_pylist() if named else [{}] * len(batch)
    for place, row in enumerate(rows):
        says = {column: known[place] or None for column, known in there.items()}
        yield done + place + 1, chosen.unread | row | says


def _open_stream(source: Any) -> Any:
    import pyarrow as pa  # noqa: PLC0415  as above

    source.seek(0)
    return pa.ipc.open_stream(source)


def _batches_of(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(place) for place in range(reader.num_record_batches))
    return iter(reader)


def _smallest_leaf(file: Any, column: str) -> str:
    """Return the path of the part of a column that is read fastest: of a picture its name rather than its bytes."""
    sizes: Counter[str] = Counter()
    for group in range(file.metadata.num_row_groups):
        row_group = file.metadata.row_group(group)
        for place in range(row_group.num_columns):
            leaf = row_group.column(place)
            if leaf.path_in_schema.partition(".")[0] == column:
                sizes[leaf.path_in_schema] += leaf.total_uncompressed_size
    return min(sizes, key=sizes.__getitem__) if sizes else column


def _says_something(array: Any) -> list[bool]:
    """Return for each row whether it has a value that is no empty text and no empty list."""
    import pyarrow as pa  # noqa: PLC0415  as above
    import pyarrow.compute as pc  # noqa: PLC0415

    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        lengths = pc.binary_length(array)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.list_value_length(array)
    else:
        return list(array.is_valid().to_pylist())
    return [bool(length) for length in lengths.to_pylist()]


def _unpacked_bytes(batch: Any) -> int:
    """Return what the texts of a batch, and the rest of it, are when each row has its own."""
    return sum(_column_bytes(column) for column in batch.columns)


def _column_bytes(array: Any) -> int:
    import pyarrow as pa  # noqa: PLC0415  as above
    import pyarrow.compute as pc  # noqa: PLC0415

    kind = array.type
    if pa.types.is_dictionary(kind) and not pa.types.is_primitive(kind.value_type):
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return int(pc.sum(lengths).as_py() or 0) + 8 * len(array)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        # A view is a length and a place, 16 bytes in all; many may lie in one place.
        views = memoryview(array.buffers()[1])[16 * array.offset : 16 * (array.offset + len(array))]
        return sum(max(0, length) for length in views.cast("i")[::4]) + 8 * len(array)
    if pa.types.is_struct(kind):
        return sum(_column_bytes(field) for field in array.flatten())
    if pa.types.is_map(kind):
        return _column_bytes(array.keys) + _column_bytes(array.items) + 8 * len(array)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _column_bytes(array.flatten()) + 8 * len(array)
    return int(array.nbytes)


def _leaves(file: Any) -> Iterator[Any]:
    return (file.schema.column(place) for place in range(len(file.schema)))
