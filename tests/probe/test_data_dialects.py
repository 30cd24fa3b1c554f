"""Every way in which people write rows becomes the row that its authors mean, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.probe.data import Reading, inspect_data, read_data, row_keys, twin_keys
from studio.probe.data.lengths import texts_of
from tests.fakes.data_rows import ASKED, BAD, GOOD, TOOLS, chat


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


def test_the_keys_that_a_table_gives_to_every_call_are_no_arguments(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = [{"tool_calls": [{"function": {"name": "look", "arguments": {name: "x"}}}]} for name in ("at", "for")]
    rows = [{"messages": [ASKED, {"role": "assistant", "content": ""} | turn]} for turn in turns]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [row.turns[-1].calls[0].arguments for row in read_data(path).rows] == ['{"at": "x"}', '{"for": "x"}']
    rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"at": None}
    kept = read_data(lines(tmp_path / "rows.jsonl", rows[0])).rows[0]
    assert kept.turns[-1].calls[0].arguments == '{"at": null}'


def test_pairs_that_differ_in_the_rejected_answer_alone_are_two_rows(tmp_path: Path) -> None:
    pairs = [{"prompt": "Why?", "chosen": "Because.", "rejected": said} for said in ("No.", "Yes.")]
    first, second = read_data(lines(tmp_path / "rows.jsonl", *pairs), Reading(wants="pairs")).rows
    assert row_keys(first).content != row_keys(second).content
    assert row_keys(first).prompt == row_keys(second).prompt and twin_keys(first) == twin_keys(second)


def test_a_call_is_part_of_what_rows_are_known_by(tmp_path: Path) -> None:
    calls = [{"name": "look", "arguments": {"at": place}} for place in ("sky", "sea")]
    rows = [chat(ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}) for call in calls]
    first, second = read_data(lines(tmp_path / "rows.jsonl", *rows)).rows
    assert row_keys(first).answer != row_keys(second).answer


def test_tools_calls_and_reasoning_count_for_the_length_of_a_row(tmp_path: Path) -> None:
    plain, thought, calling = (
        sum(map(len, texts_of(read_data(lines(tmp_path / "rows.jsonl", GOOD[name].row)).rows[0])))
        for name in ("OpenAI", "reasoning", "LLaMA-Factory's function_call")
    )
    assert plain == len("Be brief." + "Why?" + "Because.")
    assert thought == len("Why?" + "Hm." + chr(10) + "Because.")
    assert calling == len("Why?" + 'look {"at": "sky"}' + "blue" + "Because." + TOOLS)
