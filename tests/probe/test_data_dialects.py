"""Every way in which people write rows becomes the row that its authors mean, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.probe.data import Reading, inspect_data, read_data
from tests.fakes.data_rows import BAD, GOOD


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_corpus_is_large() -> None:
    assert len(GOOD) >= 60 and len(BAD) >= 60


@pytest.mark.parametrize("name", GOOD)
def test_a_row_becomes_what_its_authors_mean(tmp_path: Path, name: str) -> None:
    row, becomes, format_, wants = GOOD[name]
    data = read_data(lines(tmp_path / "rows.jsonl", row), Reading(wants=wants))  # type: ignore[arg-type]
    assert data.rows == (becomes,)
    assert data.format == format_
    assert all(not finding.fatal for finding in data.findings)


@pytest.mark.parametrize("name", [name for name in GOOD if name not in {"messages as JSON text"}])
def test_parquet_says_the_same(tmp_path: Path, name: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    row, becomes, format_, wants = GOOD[name]
    try:
        table = pa.Table.from_pylist([row])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pytest.skip("no table can hold it: one column has values of two kinds")
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    data = read_data(path, Reading(wants=wants))  # type: ignore[arg-type]
    assert (data.rows, data.format) == ((becomes,), format_)


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    row, kind, field, found, wanted, how = BAD[name]
    file = lines(tmp_path / "rows.jsonl", row)
    (finding,) = inspect_data(file, Reading(**how)).findings
    assert (finding.kind, finding.row, finding.field, finding.fatal) == (kind, 1, field, True)
    assert found in finding.message and wanted in finding.message
    with pytest.raises(BadInput) as caught:
        read_data(file, Reading(**how))
    assert str(caught.value).startswith("rows.jsonl, line 1")
