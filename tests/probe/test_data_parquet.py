"""Parquet files that hold far more than their size says, and ordinary ones that must be read as ever."""

import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from studio.core.errors import BadInput
from studio.probe.data import parquet_rows, read_data

_MB = 10**6


def _repeated(text: str, rows: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))


def _flat(path: Path) -> None:
    pq.write_table(pa.table({"text": _repeated("x" * 4 * _MB, 500_000)}), path, compression="zstd")


def _nested(path: Path) -> None:
    """Chats of one answer that is said a thousand times."""
    texts = _repeated("y" * _MB, 2_000_000)
    turns = pa.StructArray.from_arrays([_repeated("assistant", 2_000_000), texts], ["role", "content"])
    offsets = pa.array(range(0, 2_000_001, 1000), pa.int32())
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays(offsets, turns)}), path, compression="zstd")


def _nothing(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(30_000_000, pa.string())}), path, compression="zstd")


_READ = """
import resource, sys
from pathlib import Path
from studio.core.errors import BadInput
from studio.probe.data import parquet_rows, read_data
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2)
parquet_rows._free_bytes = lambda: 2e9
try:
    read_data(Path(sys.argv[1]))
except BadInput as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit of the address space here")
@pytest.mark.parametrize(
    ("make", "said"),
    [(_flat, "unpacks to more than fits"), (_nested, "unpacks to more than fits"), (_nothing, "30,000,000 rows")],
)
def test_a_file_that_unpacks_to_terabytes_is_refused_in_little_memory(
    tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    bomb = tmp_path / "bomb.parquet"
    make(bomb)
    assert bomb.stat().st_size < 100_000
    command = [sys.executable, "-c", _READ, str(bomb)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert said in done.stdout, done.stderr
    assert "bomb.parquet" in done.stdout


def test_rows_are_counted_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "_free_bytes", lambda: 20e6)
    pq.write_table(pa.table({"text": _repeated("x" * 10_000, 5000)}), tmp_path / "many.parquet")
    with pytest.raises(BadInput, match=r"its rows up to 5,000 alone hold 0\.1 GB"):
        read_data(tmp_path / "many.parquet")


def test_one_row_may_be_as_long_as_a_line_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "_MOST_BATCH_BYTES", 1000)
    monkeypatch.setattr(parquet_rows, "MAX_LINE_BYTES", 2000)
    pq.write_table(pa.table({"text": ["a" * 1500, "b" * 400, "c" * 1990]}), tmp_path / "long.parquet")
    assert [row.text[0] for row in read_data(tmp_path / "long.parquet").rows] == ["a", "b", "c"]  # type: ignore[union-attr]
    pq.write_table(pa.table({"text": ["a" * 1500, "b" * 2001]}), tmp_path / "long.parquet")
    with pytest.raises(BadInput, match="row 2 holds"):
        read_data(tmp_path / "long.parquet")


def test_reading_can_be_ended_between_long_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done == 3:
            raise Enough

    monkeypatch.setattr(parquet_rows, "_MOST_BATCH_BYTES", 10)
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(50)]}), tmp_path / "rows.parquet")
    with pytest.raises(Enough):
        read_data(tmp_path / "rows.parquet", progress=progress)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("batch_bytes", [2**28, 1])
def test_ordinary_files_are_read_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dictionary: bool, batch_bytes: int
) -> None:
    monkeypatch.setattr(parquet_rows, "_MOST_BATCH_BYTES", batch_bytes)
    rows = [
        [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": None if number == 3 else "ä日"}]
        for number in range(10)
    ]
    table = pa.table({"messages": rows, "id": list(range(10)), "odd": [b"\xff"] * 10})
    pq.write_table(table, tmp_path / "chats.parquet", use_dictionary=dictionary, row_group_size=4)
    found = list(parquet_rows.parquet_rows(tmp_path / "chats.parquet", None))
    assert found == [(number + 1, {"id": None, "odd": None, "messages": row}) for number, row in enumerate(rows)]


def test_categories_and_large_strings_are_texts(tmp_path: Path) -> None:
    table = pa.table({"prompt": pa.array(["a", "b", "a"]).dictionary_encode(),
                      "completion": pa.array(["x", "y", "z"], pa.large_string())})  # fmt: skip
    pq.write_table(table, tmp_path / "kinds.parquet")
    found = [row for _, row in parquet_rows.parquet_rows(tmp_path / "kinds.parquet", None)]
    assert found == [{"prompt": p, "completion": c} for p, c in zip("aba", "xyz", strict=True)]


def test_categories_of_numbers_in_an_arrow_file_are_read(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"], "completion": ["x", "y"], "label": pa.array([0, 1]).dictionary_encode()})
    feather.write_feather(table, tmp_path / "kinds.arrow")
    found = [row for _, row in parquet_rows.arrow_rows(tmp_path / "kinds.arrow", None)]
    assert found == table.to_pylist()


def test_one_text_that_many_rows_view_counts_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "_free_bytes", lambda: 20e6)
    view = struct.pack("<i4sii", 30_000, b"xxxx", 0, 0)
    buffers = [None, pa.py_buffer(view * 1000), pa.py_buffer(b"x" * 30_000)]
    table = pa.table({"text": pa.Array.from_buffers(pa.string_view(), 1000, buffers)})
    with pa.OSFile(str(tmp_path / "views.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    with pytest.raises(BadInput, match=r"its rows up to 1,000 alone hold 0\.0 GB"):
        list(parquet_rows.arrow_rows(tmp_path / "views.arrow", None))
    monkeypatch.setattr(parquet_rows, "_free_bytes", lambda: 200e6)
    assert len(list(parquet_rows.arrow_rows(tmp_path / "views.arrow", None))) == 1000
