"""Rows on disk: the same as those in memory, whatever is in them, and still there when the disk is full."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.probe.data import Conversation, Message, PlainText, Preference, Row, ToolCall, stored_rows
from studio.probe.data.stored_rows import RowWriter, StoredRows, packed, unpacked, without_number
from studio.runs import spool

TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates too: JSON can hold them
CALLS = st.lists(st.builds(ToolCall, TEXT, TEXT, TEXT), max_size=2).map(tuple)
SPANS = st.none() | st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=2).map(tuple)
TURN = st.builds(Message, TEXT, TEXT, TEXT, CALLS, TEXT, TEXT, st.booleans(), SPANS)
TURNS = st.lists(TURN, max_size=3).map(tuple)
ROW = st.one_of(
    st.builds(Conversation, TURNS, st.integers(0, 2**40), TEXT, TEXT, st.sampled_from((None, True, False))),
    st.builds(Preference, TURNS, TURNS, TURNS, st.integers(0, 2**40), TEXT, TEXT),
    st.builds(PlainText, TEXT, st.integers(0, 2**40)),
)


@given(ROW)
def test_a_row_comes_back_as_it_was(row: Row) -> None:
    data = packed(row)
    assert unpacked(data) == row
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")


@given(ROW, st.integers(0, 2**40))
def test_without_its_number_a_row_is_known_wherever_it_stands(row: Row, number: int) -> None:
    assert without_number(packed(row)) == without_number(packed(replace(row, number=number)))


def written(folder: Path, rows: list[Row]) -> tuple[RowWriter, Sequence[Row]]:
    def scratch() -> Path:
        folder.mkdir()
        return folder

    writer = RowWriter(scratch)
    for row in rows:
        writer.add(row)
    assert len(writer) == len(rows)
    return writer, writer.done(lambda made: made)


ROWS: list[Row] = [
    Conversation((Message("user", f"question {n} " * (n % 7 + 1)), Message("assistant", f"é {n}")), n)
    for n in range(999)
]


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "IN_MEMORY_CHARACTERS", 500)


def test_few_rows_stay_in_memory(tmp_path: Path) -> None:
    assert written(tmp_path / "rows", ROWS)[1] == tuple(ROWS)
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize("field", ["tools", "template_kwargs"])
def test_what_stands_beside_the_turns_takes_memory_too(tmp_path: Path, no_memory: None, field: str) -> None:
    rows: list[Row] = [replace(row, **{field: "long " * 50}) for row in ROWS[:10]]  # type: ignore[arg-type]
    assert len("".join(turn.words for row in rows for turn in row.turns)) < stored_rows.IN_MEMORY_CHARACTERS
    kept = written(tmp_path / "rows", rows)[1]
    assert isinstance(kept, StoredRows)
    assert list(kept) == rows


def test_a_store_is_the_sequence_of_its_rows(tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "_BLOCK_BYTES", 1000)
    _, rows = written(tmp_path / "rows", ROWS)
    assert isinstance(rows, StoredRows)
    assert len(rows) == len(ROWS)
    assert list(rows) == ROWS
    assert [rows[0], rows[-1], rows[500]] == [ROWS[0], ROWS[-1], ROWS[500]]
    assert list(rows[10:20]) == ROWS[10:20]
    assert list(rows.at([7, 3, 998])) == [ROWS[7], ROWS[3], ROWS[998]]
    assert list(rows[::-1]) == ROWS[::-1]
    assert list(rows.at([7, 3, 998])[1:]) == [ROWS[3], ROWS[998]]
    with pytest.raises(IndexError):
        rows[len(ROWS)]
    again = StoredRows.opened(tmp_path / "rows")
    assert list(again) == ROWS


def test_removed_rows_can_be_read_to_the_end(tmp_path: Path, no_memory: None) -> None:
    writer, rows = written(tmp_path / "rows", ROWS)
    writer.drop()
    assert not (tmp_path / "rows").exists()
    assert list(rows) == ROWS


@pytest.mark.parametrize("most_bytes", [0, 1, 1000, 30_000])
def test_a_full_disk_leaves_the_rows_in_memory(
    tmp_path: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    import errno
    import io

    class Full(io.FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            room = most_bytes - self.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:room])

    monkeypatch.setattr(spool, "_BLOCK_BYTES", 500)
    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Full(self, mode))
    _, rows = written(tmp_path / "rows", ROWS)
    assert not (tmp_path / "rows").exists()
    assert list(rows) == ROWS
    assert rows[500] == ROWS[500]


def test_a_place_that_may_not_be_written_leaves_the_rows_in_memory(no_memory: None) -> None:
    def refused() -> Path:
        raise PermissionError(13, "Permission denied")

    writer = RowWriter(refused)
    for row in ROWS:
        writer.add(row)
    assert list(writer.done(lambda made: made)) == ROWS
