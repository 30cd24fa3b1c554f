"""Data files that are right, and files with the mistakes that people make."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.probe.data import Conversation, Message, PlainText, Reading, inspect_data, read_data

CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
TURNS = (Message("user", "Why?"), Message("assistant", "Because."))


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


@pytest.mark.parametrize(
    ("row", "format_", "columns"),
    [
        (CHAT, "chat", ("messages",)),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
            "chat",
            ("conversations",),
        ),
        ({"prompt": "Why?", "completion": "Because."}, "prompt_completion", ("prompt", "completion")),
        ({"prompt": "Why?", "response": "Because."}, "prompt_completion", ("prompt", "response")),
        ({"question": "Why?", "answer": "Because."}, "prompt_completion", ("question", "answer")),
        ({"instruction": "Why?", "output": "Because."}, "alpaca", ("instruction", "output")),
        ({"instruction": "Why?", "input": "", "output": "Because."}, "alpaca", ("instruction", "output")),
        (
            {"instruction": "Why?", "context": None, "response": "Because."},
            "alpaca",
            ("instruction", "response"),
        ),
    ],
)
def test_every_format_becomes_the_same_conversation(
    file: Path, row: dict[str, Any], format_: str, columns: tuple[str, ...]
) -> None:
    data = read_data(lines(file, row, row))
    assert (data.format, data.columns) == (format_, columns)
    assert data.rows == (Conversation(TURNS, 1), Conversation(TURNS, 2))
    assert data.findings == ()
    assert data.described().endswith("2 rows")


def test_alpaca_input_follows_the_instruction_and_system_leads(file: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    (got,) = read_data(lines(file, row)).rows
    assert isinstance(got, Conversation)
    assert got.messages == (Message("system", "Be brief."), Message("user", "Add.\n\n1 2"), Message("assistant", "3"))


def test_plain_text(file: Path) -> None:
    data = read_data(lines(file, {"text": "Once upon a time."}, {"text": "  "}))
    assert data.rows == (PlainText("Once upon a time.", 1),)
    assert data.finding_counts == {"empty_text": 1}


def test_published_alpaca_with_a_text_column_is_alpaca_unless_told(file: Path) -> None:
    lines(file, {"instruction": "a", "input": "", "output": "b", "text": "a b"})
    assert read_data(file).format == "alpaca"
    assert read_data(file).ignored_columns == ("text",)
    assert read_data(file, Reading("text")).rows == (PlainText("a b", 1),)


def test_text_parts_are_joined_and_roles_have_aliases(file: Path) -> None:
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    row = {"messages": [{"role": "developer", "content": "S"}, {"role": "human", "content": parts}, TURN]}
    (got,) = read_data(lines(file, row)).rows
    assert isinstance(got, Conversation)
    assert got.messages == (Message("system", "S"), *TURNS)


TURN = {"role": "assistant", "content": "Because."}


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows}])
def test_json_documents(tmp_path: Path, wrap: Any) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(wrap([CHAT, CHAT]), indent=2), encoding="utf-8")
    assert [row.number for row in read_data(path).rows] == [1, 2]


def test_json_that_is_really_json_lines(tmp_path: Path) -> None:
    assert len(read_data(lines(tmp_path / "train.json", CHAT, CHAT)).rows) == 2


def test_one_row_in_a_json_file(tmp_path: Path) -> None:
    assert len(read_data(lines(tmp_path / "train.json", CHAT)).rows) == 1


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([CHAT | {"id": n} for n in range(2500)]), path)
    told: list[tuple[int, int]] = []
    data = read_data(path, progress=lambda done, total: told.append((done, total)))
    assert data.rows[0] == Conversation(TURNS, 1)
    assert len(data.rows) == 2500
    assert data.ignored_columns == ("id",)
    assert told == [(1024, 2500), (2048, 2500), (2500, 2500)]


def test_the_embedded_data_set() -> None:
    data = read_data(Path("embedded"))
    assert data.format == "chat"
    assert len(data.rows) > 300
    assert data.path.name == "stdlib_qa.jsonl"


def test_progress_reaches_the_end(file: Path) -> None:
    told: list[tuple[int, int]] = []
    read_data(lines(file, *[CHAT] * 20000), progress=lambda done, total: told.append((done, total)))
    assert len(told) > 1
    assert told[-1] == (file.stat().st_size, file.stat().st_size)


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read_data(path, Reading(**options))
    return str(caught.value)


def test_missing_folder_and_empty(tmp_path: Path, file: Path) -> None:
    assert "does not exist" in refusal(file)
    assert "The folder" in refusal(tmp_path / "no" / "such.jsonl")
    (tmp_path / "a.png").write_text("x")
    assert "holds no file of rows or text (found 1 x .png)" in refusal(tmp_path)
    file.write_bytes(b"")
    assert "is empty" in refusal(file)
    file.write_bytes(b"\n \r\n\n")
    assert "holds no rows" in refusal(file)


def test_unknown_format_is_refused(file: Path) -> None:
    assert "'sharegpt'" in refusal(lines(file, CHAT), format="sharegpt")


def test_wrong_columns_name_what_was_found_what_is_allowed_and_what_is_near(file: Path) -> None:
    message = refusal(lines(file, {"instructions": "a", "outputs": "b"}))
    assert "line 1" in message
    assert "found the columns instructions, outputs" in message
    assert "messages; conversations; instruction + output" in message
    assert "'instructions' for 'instruction'" in message
    assert "'outputs' for 'output'" in message


def test_a_forced_format_says_what_the_rows_are(file: Path) -> None:
    message = refusal(lines(file, {"instruction": "a", "output": "b"}), format="chat")
    assert "The row is alpaca (instruction, output): set data.format" in message


def test_mixed_formats(file: Path) -> None:
    message = refusal(lines(file, CHAT, CHAT, {"prompt": "a", "completion": "b"}))
    assert "line 3" in message
    assert "found prompt/completion (prompt, completion); the rows before are chat (messages)" in message


@pytest.mark.parametrize(
    ("messages", "kind", "expected"),
    [
        ([{"role": "asistant", "content": "x"}], "unknown_role", "Did you mean 'assistant'?"),
        ([{"role": None, "content": "x"}], "unknown_role", "found the role null"),
        ([{"role": "user", "content": 7}, TURN], "not_text", "messages[0].content: found a number; wanted text"),
        ([{"role": "user"}, TURN], "not_text", "found nothing; wanted text"),
        ([{"role": "user", "content": None}, TURN], "not_text", "found null"),
        (["hello"], "wrong_type", "messages[0]: found text; wanted role and content"),
        ("hello", "wrong_type", "messages: found text; wanted a list of messages"),
        ({}, "wrong_type", "found an empty object"),
    ],
)
def test_wrong_messages_are_refused(file: Path, messages: Any, kind: str, expected: str) -> None:
    lines(file, CHAT, {"messages": messages})
    message = refusal(file)
    assert message.startswith("train.jsonl, line 2")
    assert expected in message
    (finding,) = inspect_data(file).findings
    assert (finding.kind, finding.row, finding.fatal) == (kind, 2, True)


@pytest.mark.parametrize(
    ("messages", "kind", "kept"),
    [
        ([], "no_answer", False),
        ([{"role": "user", "content": "Why?"}], "no_answer", False),
        ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " "}], "empty_answer", False),
        ([*CHAT["messages"], {"role": "user", "content": "Thanks"}], "last_turn_not_assistant", True),
    ],
)
def test_rows_that_teach_nothing_are_said_but_do_not_stop(file: Path, messages: Any, kind: str, kept: bool) -> None:
    data = read_data(lines(file, CHAT, {"messages": messages}))
    assert data.rows == ((Conversation(TURNS, 1), Conversation(TURNS, 2)) if kept else (Conversation(TURNS, 1),))
    (finding,) = data.findings
    assert (finding.kind, finding.row, finding.fatal) == (kind, 2, False)


def test_no_usable_row_at_all_is_refused(file: Path) -> None:
    message = refusal(lines(file, {"prompt": "a", "completion": ""}, {"prompt": "b", "completion": " "}))
    assert "no row can be used" in message
    assert "2 x empty_answer" in message


def test_many_problems_show_five_and_the_total(file: Path) -> None:
    file.write_text("".join(f'{{"prompt": "{n}", "completion": {n}}}\n' for n in range(300)))
    message = refusal(file)
    assert "train.jsonl: 300 problems. The first 5:" in message
    assert [line.split(",")[0].strip() for line in message.splitlines()[1:]] == [f"line {n}" for n in range(1, 6)]
    data = inspect_data(file)
    assert data.finding_counts == {"not_text": 300}
    assert len(data.findings) == 100
