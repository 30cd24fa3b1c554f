"""A data format is a few lines in three files: a toy one that is not shipped is read, refused and trained on as others.

The word among the choices of `data.format` (studio/core/recipe.py), a function and a line of `SHAPES`
(studio/probe/data/formats.py), and the plain form for models without a chat template
(studio/jobs/base/data/template.py): the fixture below is all three.
"""

import json
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from studio.core.errors import BadInput
from studio.jobs.base.data import template
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.template import ensure_template
from studio.probe.data import Conversation, Message, Reading, formats, inspect_data, read, read_data
from studio.probe.data.raw_row import RawRow, Shape
from tests.fakes.tokenizers import byte_tokenizer

ROWS = [{"toy": "Q: one\nA: uno"}, {"toy": "Q: two\nA: dos", "system": "Be brief."}]
TURNS = [
    (Message("user", "one"), Message("assistant", "uno")),
    (Message("system", "Be brief."), Message("user", "two"), Message("assistant", "dos")),
]


def toy(row: RawRow) -> list[Message]:
    """Read a question and its answer, a line each."""
    question, _, answer = row.text("toy").partition("\n")
    return row.asked(question.removeprefix("Q: "), answer.removeprefix("A: "))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "DataFormat", Literal["auto", "chat", "toy"])
    monkeypatch.setattr(formats, "SHAPES", (*formats.SHAPES, Shape("toy", toy, ("toy",), ("system",))))
    turn = (
        "{%- if message['role'] == 'assistant' %}{{ 'A: ' + text + eos_token }}{% else %}{{ text + '\n' }}{% endif %}"
    )
    monkeypatch.setitem(template._PLAIN, "toy", (turn, "{{ 'A: ' }}"))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tables(path: Path, *rows: dict[str, str]) -> Path:
    pq.write_table(pa.Table.from_pylist([{"toy": "", "system": None} | row for row in rows]), path)
    return path


@pytest.mark.parametrize("wanted", ["auto", "toy"])
@pytest.mark.parametrize(("write", "name"), [(lines, "rows.jsonl"), (tables, "rows.parquet")])
def test_its_rows_are_conversations(tmp_path: Path, wanted: str, write: object, name: str) -> None:
    data = read_data(write(tmp_path / name, *ROWS), Reading(wanted))  # type: ignore[operator]
    assert data.described() == "toy (toy), 2 rows"
    assert [row.messages for row in data.rows if isinstance(row, Conversation)] == TURNS
    assert data.ignored_columns == ()


def test_what_is_wrong_with_a_row_is_said(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", *ROWS, {"toy": 3}, {"toy": "Q: three"}, {"text": "other"})
    found = [(finding.row, finding.kind) for finding in inspect_data(path).findings]
    assert found == [(3, "not_text"), (4, "empty_answer"), (5, "mixed_formats")]


def test_another_format_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"wanted toy.*The row is chat"):
        read_data(lines(tmp_path / "rows.jsonl", {"messages": []}), Reading("toy"))
    with pytest.raises(BadInput, match="wanted one of auto, chat, toy"):
        read_data(lines(tmp_path / "rows.jsonl", *ROWS), Reading("alpaca"))


def test_a_model_without_a_template_learns_its_plain_form(tmp_path: Path) -> None:
    tokenizer, said = byte_tokenizer(None), []
    data = read_data(lines(tmp_path / "rows.jsonl", *ROWS))
    ensure_template(tokenizer, data.format, said.append)
    examples, _ = encode_rows(data.rows, tokenizer, seq_len=64, warn=said.append)
    assert "A: ANSWER" in said[0]
    texts = [tokenizer.decode(example.input_ids) for example in examples]
    assert texts == ["one\nA: uno<|im_end|>", "Be brief.\ntwo\nA: dos<|im_end|>"]
    learnt = [tokenizer.decode(one.input_ids[one.labels != IGNORED]) for one in examples]
    assert learnt == ["uno<|im_end|>", "dos<|im_end|>"]
