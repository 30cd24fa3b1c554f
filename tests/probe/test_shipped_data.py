"""The data set that ships with the program: how it is made, and that the file keeps its promises."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

DATA = Path(__file__).parents[2] / "recipes" / "data"


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    # Not imported: that would leave compiled files in a folder that is packed into the wheel.
    return SimpleNamespace(**runpy.run_path(str(DATA / "make_stdlib_qa.py")))


@pytest.fixture(scope="module")
def shipped() -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (DATA / "stdlib_qa.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"messages"} for row in rows)
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        (
            "Remove any common leading whitespace from every line in `text`.\n\n    This can be used",
            "Remove any common leading whitespace from every line in `text`.",
        ),
        ("Return true if, e.g. the file\n    is a FIFO. More text.", "Return true if, e.g. the file is a FIFO."),
        ("S.find(sub) -> int\n\nReturn the lowest index of the substring.", None),
        ("dict() -> new empty dictionary, which is long enough.", None),
        ("no capital at the start of this long sentence.", None),
        ("No full stop at the end of this long sentence", None),
        ("Too short.", None),
        ("Too long " * 30 + ".", None),
        ("Return the name of the current Windows user account.", None),
        ("", None),
        (None, None),
    ],
)
def test_first_sentence(script: SimpleNamespace, docstring: str | None, sentence: str | None) -> None:
    assert script.first_sentence(docstring) == sentence


def test_extraction_of_known_names_is_real_text(script: SimpleNamespace) -> None:
    # These docstrings are the same in every Python from 3.11 to 3.13.
    found = {
        name: (kind, answer)
        for module in ("textwrap", "bisect", "queue")
        for kind, name, answer in script.documented(module)
    }
    assert found["textwrap.dedent"] == ("function", "Remove any common leading whitespace from every line in `text`.")
    assert found["textwrap.wrap"] == ("function", "Wrap a single paragraph of text, returning a list of wrapped lines.")
    assert found["bisect.insort_left"][1] == "Insert item x in list a, and keep it sorted assuming a is sorted."
    assert found["queue.Queue.qsize"] == ("method", "Return the approximate size of the queue (not reliable!).")
    assert not any(part.startswith("_") for name in found for part in name.split("."))


def test_rows_drop_repeated_and_nearly_repeated_answers(script: SimpleNamespace) -> None:
    rows = script.rows(["math", "cmath"])
    answers = [row["messages"][1]["content"] for row in rows]
    assert len(answers) > 8
    pairs = [(one, other) for i, one in enumerate(answers) for other in answers[i + 1 :]]
    assert max(script.resemblance(one, other) for one, other in pairs) <= script.RESEMBLANCE_ALLOWED
    assert rows == script.rows(["math", "cmath"])


def test_the_shipped_file_keeps_its_promises(script: SimpleNamespace, shipped: list[tuple[str, str]]) -> None:
    questions, answers = [q for q, _ in shipped], [a for _, a in shipped]
    assert 300 <= len(shipped) <= 600
    assert len(set(questions)) == len(questions)
    assert len({answer.lower() for answer in answers}) == len(answers)
    assert all(script.first_sentence(answer) == answer for answer in answers)
    assert all(q.startswith(("What does ", "What is ")) and q.endswith("?") for q in questions)
    assert answers == sorted(answers, key=script._digest), "the order must be by hash, so that head and tail are mixed"


def test_no_held_out_answer_is_nearly_a_trained_one(script: SimpleNamespace, shipped: list[tuple[str, str]]) -> None:
    answers = [answer for _, answer in shipped]
    held_out, kept = answers[-40:], answers[:-40]
    assert max(script.resemblance(one, other) for one in held_out for other in kept) <= script.RESEMBLANCE_ALLOWED


def test_the_licence_is_there_and_says_how_the_file_was_made(shipped: list[tuple[str, str]]) -> None:
    notice = (DATA / "NOTICE").read_text(encoding="utf-8")
    assert "Python Software Foundation; All Rights Reserved" in notice
    assert f"{len(shipped)} question-and-answer rows" in notice
    assert "CPython 3.11.7" in notice
    licence = (DATA / "LICENSE-PYTHON.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence
    assert "agrees to be bound" in licence
