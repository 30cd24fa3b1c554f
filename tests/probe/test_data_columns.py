"""Columns under any name: mapped by the recipe, written into a prompt, or known but for upper case."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from studio.core.columns import COLUMN_NAMES
from studio.core.errors import BadInput
from studio.core.recipe import FIELDS, Recipe
from studio.core.recipe_parse import apply_settings, recipe_from_dict
from studio.probe.data import Conversation, Message, Reading, inspect_data, read_data, written_prompt
from studio.probe.data.beside import LABEL_COLUMNS
from studio.probe.data.formats import known_columns
from studio.probe.held_out import hold_out, rows_of_run
from studio.runs.held_out import keep_record, read_record
from studio.runs.layout import RunPaths
from tests.fakes.data_rows import LOOK, TALK, TOOLS, A, S, U, preference, talk

GERMAN = {"Frage": "Why?", "Antwort": "Because.", "Nr": 1}
NAMED = (("prompt", "Frage"), ("completion", "Antwort"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tables(path: Path, *rows: dict[str, Any]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(path: Path, **how: Any) -> Any:
    (row,) = read_data(path, Reading(**how)).rows
    return row


def test_every_name_that_can_be_mapped_is_read() -> None:
    assert set(COLUMN_NAMES) <= known_columns() | set(LABEL_COLUMNS)


@pytest.mark.parametrize("write", [lines, tables])
def test_columns_are_mapped_and_called_as_the_file_calls_them(file: Path, write: Any) -> None:
    data = read_data(write(file, GERMAN | {"prompt": "x"}), Reading(columns=NAMED))
    assert data.rows == (talk(*TALK),)
    assert data.described() == "prompt/completion (Frage, Antwort), 1 row"
    assert data.ignored_columns == ("prompt", "Nr")
    finding = inspect_data(write(file, GERMAN | {"Antwort": 3}), Reading(columns=NAMED)).findings[0]
    assert (finding.field, finding.message) == ("Antwort", "found a number; wanted text")


def test_names_of_columns_cannot_write_to_the_terminal(file: Path) -> None:
    data = read_data(
        lines(file, {"\x1b[31mq": "Why?", "a": "So."}), Reading(columns=(("prompt", "\x1b[31mq"), ("completion", "a")))
    )
    assert data.described() == r"prompt/completion (\x1b[31mq, a), 1 row"


@pytest.mark.parametrize("write", [lines, tables])
def test_messages_and_their_fields_are_mapped(file: Path, write: Any) -> None:
    said = [{"who": "client", "says": "Why?"}, {"who": "agent", "says": "Because."}]
    columns = (("messages", "talk"), ("role", "who"), ("content", "says"), ("user", "client"), ("assistant", "agent"))
    assert read(write(file, {"talk": said, "rules": "Be brief."}), columns=(*columns, ("system", "rules"))) == talk(
        S, U, A
    )
    bad = inspect_data(write(file, {"talk": [{"who": "boss", "says": "Hm."}]}), Reading(columns=columns)).findings[0]
    assert (bad.kind, bad.field) == ("unknown_role", "talk[0].who")


def test_preferences_labels_and_tools_are_mapped(file: Path) -> None:
    pair = {"q": "Why?", "good": "Because.", "bad": "No idea."}
    columns = (("prompt", "q"), ("chosen", "good"), ("rejected", "bad"))
    assert read(lines(file, pair), columns=columns, wants="pairs") == preference(U)
    refused = inspect_data(lines(file, pair), Reading(columns=columns)).findings[0]
    assert refused.field == "good, bad"
    liked = GERMAN | {"gut": True}
    assert read(lines(file, liked), columns=(*NAMED, ("label", "gut")), wants="labels").desirable is True
    assert read(lines(file, GERMAN | {"can": [LOOK]}), columns=(*NAMED, ("tools", "can"))).tools == TOOLS


@pytest.mark.parametrize("write", [lines, tables])
def test_a_column_that_means_something_else_is_mapped_to_nothing(file: Path, write: Any) -> None:
    row = {"prompt": "Why?", "completion": "Because.", "tools": "hammer", "label": True, "context": "1999"}
    columns = apply_settings(Recipe(), ["data.columns=tools=,label=,context="]).data.columns
    data = read_data(write(file, row), Reading(columns=columns))
    assert data.rows == (talk(*TALK),)
    assert data.ignored_columns == ("tools", "label", "context")
    kind = FIELDS["data.columns"].kind
    assert kind.read(kind.written(columns)) == columns


def test_what_is_used_beside_the_texts_is_named(file: Path) -> None:
    row = {"question": "Why?", "answer": "Because.", "System_Prompt": "Be brief.", "reasoning": "Hm.", "history": []}
    data = read_data(lines(file, row), Reading(columns=(("system", "System_Prompt"),)))
    assert data.beside == ("System_Prompt", "reasoning")
    assert data.beside_words() == "used as well: System_Prompt, reasoning"
    pair = {"question": "Why?", "prompt": "x", "chosen": "Because.", "rejected": "No idea.", "input": "y"}
    data = read_data(lines(file, pair), Reading(wants="pairs"))
    assert (data.beside, data.ignored_columns) == (("prompt",), ("question", "input"))


def test_a_mapped_column_that_is_not_there_is_named(file: Path) -> None:
    (finding,) = inspect_data(lines(file, {"Frag": "Why?", "Antwort": "So."}), Reading(columns=NAMED)).findings
    assert finding.kind == "wrong_columns"
    assert "found the columns Antwort, Frag;" in finding.message
    assert "data.columns names prompt = 'Frage', which the row does not have" in finding.message


def test_files_with_known_names_need_no_mapping(file: Path) -> None:
    """One source of a mixture may have our names, another its own."""
    assert read(lines(file, {"question": "Why?", "answer": "Because."}), columns=NAMED) == talk(*TALK)


@pytest.mark.parametrize("write", [lines, tables])
def test_upper_case_and_spaces_are_no_other_names(file: Path, write: Any) -> None:
    row = {"Question": "Why?", "Complex_CoT": "Hm.", " Response": "Because."}
    data = read_data(write(file, row))
    assert data.rows == (talk(U, Message("assistant", "Because.", reasoning="Hm.")),)
    assert data.columns == ("Question", " Response")
    assert read(
        write(file, {"Prompt": "Why?", "Chosen": "Because.", "Rejected": "No idea."}), wants="pairs"
    ) == preference(U)


@pytest.mark.parametrize("write", [lines, tables])
def test_a_prompt_is_written_from_columns(file: Path, write: Any) -> None:
    row = {"title": "Sky", "body": "Why?", "note": None, "answer": "Because.", "id": 7}
    data = read_data(write(file, row), Reading(prompt="{{ title }} ({{ id }}){{ note }}: {{ body }}"))
    assert data.rows == (talk(Message("user", "Sky (7): Why?"), A),)
    assert data.columns == ("prompt", "answer")
    whole = Reading(prompt="{{ row['body'] | upper }}")
    assert read_data(write(file, row), whole).rows == (talk(Message("user", "WHY?"), A),)
    mapped = Reading(prompt="{{ body }}", columns=(("completion", "title"),))
    assert read_data(write(file, row), mapped).rows == (talk(U, Message("assistant", "Sky")),)


def test_a_written_prompt_stands_in_place_of_what_the_row_asks_with(file: Path) -> None:
    row = {
        "instruction": "Why?",
        "input": "x",
        "output": "Because.",
        "system": "Be brief.",
        "context": "y",
        "text": "z",
    }
    assert read(lines(file, row), prompt="{{ instruction }}") == talk(S, U, A)
    pair = {"question": "Why?", "chosen": "Because.", "rejected": "No idea."}
    assert read(lines(file, pair), prompt="{{ question }}", wants="pairs") == preference(U)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{{ titel }}", "line 1, data.prompt: found that 'titel' is undefined; wanted every column that it names"),
        ("{{ title.__class__.__mro__ }}", "line 1, data.prompt: found that access to attribute '__class__'"),
        ("{{ title | nosuch }}", "data.prompt"),
        ("{{ title", "data.prompt is no jinja"),
        ("the same for all", "which names no column"),
        ("{{ title * 10000000000 }}", "data.prompt takes too much memory"),
        ("{{ title }}" + " " * 30_000, "data.prompt has 30,011 characters"),
    ],
)
def test_lines_that_write_no_prompt(file: Path, line: str, expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_data(lines(file, {"title": "Sky", "answer": "Because."}), Reading(prompt=line))
    assert expected in str(caught.value)


def test_an_endless_line_is_ended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_prompt, "_SECONDS", 0.5)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = title %}{% endfor %}{% endfor %}"
    with pytest.raises(BadInput, match=r"data\.prompt takes more than"):
        read_data(lines(file, {"title": "Sky", "answer": "Because."}), Reading(prompt=loops))


def test_a_written_prompt_without_an_answer_says_what_is_wanted(file: Path) -> None:
    (finding,) = inspect_data(lines(file, GERMAN), Reading(prompt="{{ Frage }}")).findings
    assert (
        "found the columns Antwort, Nr beside the prompt that data.prompt writes; wanted an answer" in finding.message
    )
    assert "data.columns: completion=" in finding.message


def test_a_row_without_a_column_of_the_prompt_is_one_bad_row(file: Path) -> None:
    rows = [{"title": "Sky", "answer": "Because."}, {"answer": "So."}]
    data = read_data(lines(file, *rows), Reading(prompt="{{ title }}", on_bad_row="skip"))
    assert len(data.rows) == 1 and data.left_out == {"bad_prompt": 1}
    optional = read_data(lines(file, *rows), Reading(prompt="On {{ title | default('it') }}:"))
    assert [row.prompt for row in optional.rows] == ["On Sky:", "On it:"]


def test_a_recipe_carries_both_to_the_reading(file: Path) -> None:
    recipe = recipe_from_dict({"data": {"columns": {"prompt": "Frage", "completion": "die Antwort, kurz"}}})
    assert recipe.to_dict()["data"]["columns"] == {"prompt": "Frage", "completion": "die Antwort, kurz"}
    kind = FIELDS["data.columns"].kind
    assert kind.read(kind.written(recipe.data.columns)) == recipe.data.columns
    assert Reading.of(recipe).columns == recipe.data.columns
    typed = apply_settings(Recipe(), ["data.columns=prompt=Frage, completion=Antwort", "data.format=chat"])
    assert typed.data.columns == NAMED
    prompted = apply_settings(Recipe(), ["data.prompt={{ title }}: {{ body }}"])
    assert Reading.of(prompted).prompt == "{{ title }}: {{ body }}"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.columns=promt=Frage", "the name 'promt'; wanted perhaps prompt"),
        ("data.columns=role=", "role = ''; wanted the name of a field"),
        ("data.columns=prompt=a,completion=a", "the column 'a' twice"),
        ("data.columns=Frage", "wanted a table from our names to the file's columns"),
    ],
)
def test_mappings_that_are_none(word: str, expected: str) -> None:
    with pytest.raises(BadInput, match=r"data\.columns: found") as caught:
        apply_settings(Recipe(), [word])
    assert expected in str(caught.value)


def test_a_prompt_cannot_be_mapped_and_written() -> None:
    with pytest.raises(BadInput, match=r"beside data\.prompt"):
        apply_settings(Recipe(), ["data.columns=prompt=Frage", "data.prompt={{ Frage }}"])


def test_an_audit_reads_the_file_of_a_run_as_it_was_read(file: Path, tmp_path: Path) -> None:
    rows = [{"Frage": f"{n}?", "Titel": f"T{n}", "Antwort": f"It is {n}."} for n in range(20)]
    settings = ["data.columns=completion=Antwort", "data.prompt={{ Titel }}: {{ Frage }}", "eval.rows=3"]
    recipe = apply_settings(Recipe().with_("data.path", str(lines(file, *rows))), settings)
    parts = hold_out(recipe, read_data(file, Reading.of(recipe)), None)
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    keep_record(paths, parts.record)
    found = rows_of_run(read_record(paths), "the run", file, format="auto", wanted=9, seed=1)
    assert found.rows == parts.held_out
    again = hold_out(recipe, read_data(file, Reading.of(recipe)), None, read_record(paths))
    assert again.held_out == parts.held_out
    other = lines(tmp_path / "other.jsonl", {"prompt": "New?", "completion": "Yes."})
    unseen = rows_of_run(read_record(paths), "the run", other, format="auto", wanted=9, seed=1)
    assert [row.answer for row in unseen.rows if isinstance(row, Conversation)] == ["Yes."]


def test_only_written_prompts_load_jinja(file: Path) -> None:
    import subprocess

    lines(file, GERMAN)
    code = (
        "import sys, studio.probe.data as d; from pathlib import Path;"
        f"d.read_data(Path({str(file)!r}), d.Reading(columns={NAMED!r})); print('jinja2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
