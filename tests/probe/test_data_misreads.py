"""What rows say beside their texts: refused where it would be trained wrongly, accepted where it says nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.probe.data import inspect_data, read_data
from studio.probe.preflight import check_training
from tests.fakes.misreads import ANSWER, ASKED, MISREADS, PAIR

TEXT = {"text": "Once upon a time."}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", MISREADS)
def test_the_check_before_a_start_refuses(file: Path, name: str) -> None:
    row, _, field = MISREADS[name]
    with pytest.raises(BadInput) as caught:
        check_training(Recipe().with_("data.path", str(lines(file, row))))
    assert str(caught.value).startswith(f"data.path: train.jsonl, line 1, {field}: found ")


def test_rows_refused_by_name_count_by_reason_among_good_ones(file: Path) -> None:
    names = ("weight a half", "a range beyond the answer", "encrypted thinking", "a call without a name")
    rows = [MISREADS[name][0] for name in (*names, "weight a half")]
    data = inspect_data(lines(file, {"messages": [ASKED, ANSWER]}, *rows))
    assert len(data.rows) == 1
    assert data.notes() == (
        "train.jsonl: 5 rows must be corrected: 2 x fractional_weight, 1 x bad_span, 1 x reasoning, 1 x bad_call.",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED | {"weight": 1}, ANSWER | {"weight": 1.0, "train": True, "loss": True}]},
        {"messages": [ASKED | {"train": False, "weight": 0}, ANSWER | {"train": 1}]},
        {"messages": [ASKED, ANSWER | {"weight": None, "reasoning_content": " ", "tool_calls": [], "images": None}]},
        {"messages": [ASKED, ANSWER | {"function_call": {"name": None, "arguments": None}}]},
        {"messages": [ASKED, {"role": "tool", "content": "so"}, ANSWER]},
        {"messages": [ASKED, ANSWER], "chosen": None, "rejected": None},
        PAIR | {"label": "positive"},
        PAIR | {"label": 1},
        PAIR | {"label": None},
        TEXT | {"label": True},
        TEXT | {"label": "false"},
        TEXT | {"images": []},
        TEXT | {"image": None, "audio": {"path": None, "bytes": None}},
        TEXT | {"chosen": "a"},
    ],
)
def test_what_says_nothing_against_it_is_trained(file: Path, row: dict[str, Any]) -> None:
    data = read_data(lines(file, row))
    assert len(data.rows) == 1
    assert data.findings == ()


def test_a_word_for_a_picture_without_pictures_is_a_note(file: Path) -> None:
    said = {"messages": [ASKED | {"content": "What does <image> mean?"}, ANSWER]}
    data = read_data(lines(file, {"messages": [ASKED, ANSWER]}, said))
    assert len(data.rows) == 2
    assert data.finding_counts == {"media_placeholder": 1}
    (note,) = data.notes()
    assert note.startswith("train.jsonl: in 1 row '<image>' stands in the text")
    assert note.endswith("(the first: row 2).")
    svg = "Draw it as <svg><image href='a.png'/></svg> or <image> and so on."
    assert read_data(lines(file, {"text": svg})).finding_counts == {"media_placeholder": 1}


@pytest.mark.parametrize(
    "text",
    ["<image>\nWhat is it?", "What is it? <image>", " <image> ", "<|image_pad|> What is it?", "<video>\nAnd this?"],
)
def test_the_place_of_a_picture_is_refused_where_the_row_has_none(file: Path, text: str) -> None:
    rows = ({"messages": [ASKED | {"content": text}, ANSWER]}, {"prompt": text, "completion": "A cat."}, {"text": text})
    for row in rows:
        (finding,) = inspect_data(lines(file, row)).findings
        assert (finding.kind, finding.row, finding.fatal) == ("media", 1, True)


@pytest.mark.parametrize("name", [name for name, (_, kind, _) in MISREADS.items() if kind == "media"])
def test_that_pictures_are_not_read_is_said_to_be_a_limit_and_counted(file: Path, name: str) -> None:
    row = MISREADS[name][0]
    good = dict.fromkeys(("prompt", "completion", "text"), "Why?")
    first = {"messages": [ASKED, ANSWER]} if "messages" in row else good
    data = inspect_data(lines(file, *[first] * 2, row, row))
    assert data.finding_counts == {"media": 2}
    assert all("pictures, sound and films are not read here" in finding.message for finding in data.findings)
    assert all("a limit of this program" in finding.message for finding in data.findings)
    assert data.notes()[0] == "train.jsonl: 2 rows must be corrected: 2 x media."


def test_what_is_nested_without_end_is_something(file: Path) -> None:
    row = '{"text": "a", "images": ' + "[" * 400 + "]" * 400 + "}\n"
    file.write_text(row)
    assert inspect_data(file).finding_counts == {"media": 1}


def test_many_columns_and_fields_are_named_in_part(file: Path) -> None:
    turn = ASKED | {f"field {n}": n for n in range(3)} | {"nothing": None}
    row = {"messages": [turn, ANSWER]} | {f"column {n}": n for n in range(30)}
    data = read_data(lines(file, row))
    assert data.ignored_columns[-1] == "messages[].field 2"
    (note,) = data.notes()
    assert note.endswith("column 18, column 19 and 13 more.")


def test_parquet_says_the_same_without_reading_the_pictures(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def found(*rows: dict[str, Any]) -> dict[int, str]:
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return {finding.row: finding.kind for finding in inspect_data(path).findings}

    chat = {"messages": [ASKED | {"weight": None}, ANSWER | {"weight": 1.0}]}
    untrained = {"messages": [ASKED | {"weight": None}, ANSWER | {"weight": 0.0}]}
    picture = {"bytes": b"1" * 5000, "path": None}
    assert found(chat, untrained) == {2: "nothing_learnt"}
    assert found(chat, {"messages": [untrained["messages"][0], ANSWER | {"weight": 0.5}]}) == {2: "fractional_weight"}
    assert found(chat | {"images": []}, chat | {"images": [picture]}, chat | {"images": None}) == {2: "media"}
    assert found(TEXT | {"image": None}, TEXT | {"image": picture}) == {2: "media"}
    assert found(TEXT | {"audio": ""}, TEXT | {"audio": "a.wav"}) == {2: "media"}
    assert found(PAIR | {"label": None}, PAIR | {"label": False}) == {2: "desirable_label"}
    assert found(PAIR | {"label": "joy"}, PAIR | {"label": "grief"}) == {}
    assert found(PAIR | {"label": [0]}) == {}
    both = {"chosen": [ANSWER], "rejected": [ANSWER]}
    assert found(both, both) == dict.fromkeys((1, 2), "preference_pair")
    assert found(chat | dict.fromkeys(both), chat | both) == {2: "preference_pair"}
