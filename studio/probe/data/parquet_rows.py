"""Raw rows of Parquet files, in batches, only the columns that some format knows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.json_rows import Progress
from studio.probe.data.shapes import KNOWN_COLUMNS, wrong_columns

MAGIC = b"PAR1"
_BATCH_ROWS = 1024


def parquet_rows(path: Path, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    """Yield (row from 1, columns as a dict); `progress` gets (rows read, rows in all).

    Columns that no format knows are there as keys with the value None, so that they can be named.

    Raises:
        BadInput: pyarrow is not installed, the file is no whole Parquet file, or it has no column that we know.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415  0.2 s that only readers of Parquet pay
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise BadInput(f"{path.name} is Parquet, which needs pyarrow: pip install pyarrow") from None
    name = plain(path.name, one_line=True)
    try:
        with pq.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            known = [column for column in columns if column in KNOWN_COLUMNS]
            if not known:
                raise BadInput(f"{name}: {wrong_columns(columns)}")
            others = dict.fromkeys(column for column in columns if column not in KNOWN_COLUMNS)
            yield from _batches(file, known, others, progress)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{name} is not a whole Parquet file: {plain(str(error), one_line=True, limit=200)}") from None


def _batches(
    file: Any, known: list[str], others: dict[str, None], progress: Progress | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    total, done = file.metadata.num_rows, 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=known):
        for row in batch.to_pylist():
            done += 1
            yield done, others | row
        if progress:
            progress(done, total)
