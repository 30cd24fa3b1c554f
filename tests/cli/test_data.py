"""`data check` and `train` on rows that say more than their texts: both refuse, and both tell what is not used."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from studio.commands.terminal import WaitLine
from studio.probe.setup import check_data
from studio.tui.setup_texts import data_text
from tests.cli.conftest import Cli
from tests.fakes.misreads import ANSWER, ASKED, MISREADS, PAIR


def write(*rows: dict[str, Any]) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "rows.jsonl"


def recipe_of(**data: Any) -> str:
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in data.items())
    Path("mine.toml").write_text(
        f"name = 'mine'\n[data]\npath = 'rows.jsonl'\n{settings}[eval]\nrows = 0\nsamples = 0\n"
    )
    return "mine.toml"


OF_AN_OBJECTIVE = ("preference_pair", "desirable_label")
"""What another objective learns: a check without a recipe finds nothing wrong with it."""


@pytest.mark.parametrize("name", [name for name, (_, kind, _) in MISREADS.items() if kind not in OF_AN_OBJECTIVE])
def test_what_would_be_trained_wrongly_is_refused_by_name(cli: Cli, name: str) -> None:
    row, kind, field = MISREADS[name]
    outcome = cli("data", "check", write(row), "--json")
    assert outcome.code == 1
    assert outcome.document["ok"] is False
    (finding,) = outcome.document["findings"]
    assert (finding["kind"], finding["field"], finding["fatal"]) == (kind, field, True)
    assert finding["row"] == 1
    assert finding["message"].startswith("found ")
    assert outcome.document["counts"] == {kind: 1}
    assert f"1 x {kind}" in cli("data", "check", "rows.jsonl").out


@pytest.mark.parametrize("name", [name for name, (_, kind, _) in MISREADS.items() if kind in OF_AN_OBJECTIVE])
def test_what_another_objective_learns_is_told_by_the_check_and_refused_by_training(cli: Cli, name: str) -> None:
    row, kind, field = MISREADS[name]
    checked = cli("data", "check", write(row))
    assert checked.code == 0
    assert ("preferences" if kind == "preference_pair" else "labels") in checked.out
    trained = cli("train", recipe_of())
    assert trained.code == 2
    assert f"line 1, {field}: found " in trained.err


def test_training_refuses_as_the_check_does_and_counts_by_reason(cli: Cli, home: Path) -> None:
    bad = [{"messages": [ASKED, ANSWER | {"weight": 0.5}]}] * 6 + [{"messages": [ASKED, ANSWER | {"thinking": 7}]}]
    write(*[{"messages": [ASKED, ANSWER]}] * 20, *bad)
    outcome = cli("train", recipe_of())
    assert outcome.code == 2
    assert "7 problems (6 x fractional_weight, 1 x not_text). The first 5:" in outcome.err
    assert "line 21, messages[1].weight: found 0.5;" in outcome.err
    assert not list((home / "runs").glob("*"))


def test_training_says_what_is_left_out_and_not_used_as_the_check_does(cli: Cli) -> None:
    rows: list[dict[str, Any]] = [{"messages": [ASKED | {"mood": "calm"}, ANSWER], "id": n} for n in range(20)]
    write(*rows, {"messages": [ASKED]}, {"messages": [ASKED, ANSWER | {"content": ""}]})
    checked = cli("data", "check", "rows.jsonl")
    trained = cli("train", recipe_of())
    assert (checked.code, trained.code) == (0, 0)
    for said in (
        "rows.jsonl: 2 rows are left out, 20 rows kept: 1 without an answer (the first: row 21), 1 with an empty "
        "answer (the first: row 22).",
        "rows.jsonl: columns not used: id, messages[].mood.",
    ):
        assert f"{said}\n" in checked.out
        assert f"note: {said}\n" in trained.err
    document = cli("data", "check", "rows.jsonl", "--json").document
    assert document["ignored_columns"] == ["id", "messages[].mood"]
    assert document["left_out"] == {"no_answer": 1, "empty_answer": 1}


def test_columns_that_answers_rest_on_are_named_by_check_set_up_and_training_alike(cli: Cli) -> None:
    many = {f"column_{n}": n for n in range(25)}
    row: dict[str, Any] = {"messages": [ASKED, ANSWER], **many, "context": "It is.", "contexts": ["So."]}
    write(*[row] * 20)
    told = (
        "rows.jsonl: in 20 rows a column such as context, which is not used, may hold what the answer rests on; it is "
        "learnt without (the first: row 1)."
    )
    assert "row 7 context: found context, contexts, not used;" in cli("data", "check", "rows.jsonl").out
    assert f"{told}\n" in cli("data", "check", "rows.jsonl").out
    assert f"note: {told}\n" in cli("train", recipe_of()).err
    assert f"note  {told}\n" in data_text(check_data("rows.jsonl", "no/such-model")).plain
    write(*[{"messages": [ASKED, ANSWER], "id": 1, "history": [], "tools": None}] * 20)
    assert cli("data", "check", "rows.jsonl", "--json").document["counts"] == {}


def test_a_prompt_marked_as_untrained_is_refused_only_where_prompts_are_trained(cli: Cli) -> None:
    write(*[{"messages": [ASKED | {"train": False, "weight": 0}, ANSWER | {"train": True, "weight": 1.0}]}] * 20)
    assert cli("data", "check", "rows.jsonl", "--json").document["counts"] == {}
    assert cli("train", recipe_of()).code == 0
    refused = cli("train", recipe_of(answers_only=False))
    assert refused.code == 2
    assert "messages[0].weight: found 0; with data.answers_only = false" in refused.err


def test_an_audit_refuses_such_rows_before_it_starts(cli: Cli, home: Path) -> None:
    write(*[PAIR | {"label": False}] * 20)
    outcome = cli("audit", "base", "--model", "embedded", "--data", "rows.jsonl")
    assert outcome.code == 2
    assert "found false beside an answer" in outcome.err
    assert not list((home / "runs").glob("*"))


def test_a_folder_is_checked_by_split(cli: Cli) -> None:
    Path("chats").mkdir()
    for split, bad in (("train", ""), ("test", "no row\n")):
        write(PAIR, PAIR)
        Path("chats", f"{split}.jsonl").write_text(Path("rows.jsonl").read_text() + bad)
    told = cli("data", "check", "chats", "--json").document
    assert (told["rows"], told["files"], told["ok"]) == (2, 1, True)
    everything = cli("data", "check", "chats", "--split", "all", "--json")
    assert everything.code == 1
    (finding,) = everything.document["findings"]
    assert (finding["file"], finding["row"], finding["kind"]) == ("test.jsonl", 3, "bad_json")
    skipped = cli("data", "check", "chats:test", "--on-bad-row", "skip")
    assert skipped.code == 0
    assert "1 row is left out, 2 rows kept: 1 that are not JSON (the first: test.jsonl, row 3)" in skipped.out
    assert "note: test.jsonl, row 3: not JSON" in skipped.out
    refused = cli("data", "check", "chats", "--split", "dev")
    assert refused.code == 2
    assert "has no split dev; it has train, test" in refused.err


class Screen(io.StringIO):
    """A stream that may be a terminal."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(("terminal", "shown"), [
    (True, "\rreading the data: 50 %\x1b[K\rreading the data: 80 %\x1b[K\r\x1b[K"),
    (False, "reading the data: 50 %\n"),
])  # fmt: skip
def test_long_reading_says_how_far_it_is(terminal: bool, shown: str) -> None:
    now = [0.0]
    stream = Screen(terminal=terminal)
    with WaitLine("reading the data", stream, lambda: now[0]) as told:
        for seconds, done in ((0.9, 40), (1.0, 50), (1.1, 60), (1.3, 80)):
            now[0] = seconds
            told(done, 100)
    assert stream.getvalue() == shown


def test_short_reading_says_nothing() -> None:
    stream = Screen(terminal=True)
    with WaitLine("reading the data", stream, lambda: 0.0) as told:
        told(1, 2)
    assert stream.getvalue() == ""


def test_a_recipe_is_checked_with_all_its_sources(cli: Cli) -> None:
    write(*({"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(30)))
    Path("book.txt").write_text("word " * 3000)
    Path("mix.toml").write_text(
        "[[data.sources]]\npath = 'rows.jsonl'\nrows = 60\n[[data.sources]]\npath = 'book.txt'\n"
    )
    outcome = cli("data", "check", "mix.toml", "--json")
    assert outcome.code == 0
    assert outcome.document["rows"] == 61
    found = [(Path(one["file"]).name, one["format"], one["rows"], one["drawn"]) for one in outcome.document["sources"]]
    assert found == [("rows.jsonl", "prompt_completion", 30, 60), ("book.txt", "text", 1, 1)]
    told = cli("data", "check", "mix.toml").out
    assert "a mixture of 2 files, 61 rows: rows.jsonl 60 of 30 rows, each about 2.0 times (98% of the rows" in told
    write({"prompt": "ask"})
    outcome = cli("data", "check", "mix.toml", "--json")
    assert (outcome.code, outcome.document["ok"]) == (1, False)
    Path("book.txt").unlink()
    outcome = cli("data", "check", "mix.toml")
    assert outcome.code == 2 and "data.sources, source 2: The data file" in outcome.err
