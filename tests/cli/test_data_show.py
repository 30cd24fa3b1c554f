"""`data show`: rows token by token on a plain terminal and as JSON, whatever they hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from studio.commands.data_show import marked_text
from studio.runs.show import ShownExample
from tests.cli.conftest import Cli
from tests.fakes.tiny_model import make_tiny_model

HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b1;1H\u202eltr [bold]not bold[/] a\u200bb\ufeff\r"


@pytest.fixture
def model(home: Path, tmp_path: Path) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"what {n}"}, {"role": "assistant", "content": f"it {n}"}]}
        for n in range(4)
    ]
    rows.append({"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]})
    rows.append({"messages": [{"role": "user", "content": "nobody"}]})
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(make_tiny_model(tmp_path / "tiny"))


def test_a_row_as_json_and_in_words(cli: Cli, model: str) -> None:
    outcome = cli("data", "show", "rows.jsonl", "--model", model, "--json")
    assert outcome.code == 0
    document = outcome.document
    assert [row["row"] for row in document["rows"]] == [1, 2, 3, 4, 5]
    row = document["rows"][1]
    assert row["text"] == "<|im_start|>user\nwhat 1<|im_end|>\n<|im_start|>assistant\nit 1<|im_end|>\n"
    assert [row["text"][begin:end] for begin, end in row["trained"]] == ["it 1<|im_end|>"]
    assert "".join(row["tokens"]) == row["text"]
    ((begin, end),) = row["trained_tokens"]
    assert "".join(row["tokens"][begin:end]) == "it 1<|im_end|>"
    assert document["left_out"] == {"no_answer": 1}
    assert document["lengths"]["min"] == len(row["ids"])
    assert document["trained_share"] == document["loss_tokens"] / document["tokens"]
    assert sum(document["histogram"]["counts"]) == 5


@pytest.mark.slow
def test_rows_in_words_and_rows_that_are_not_there(cli: Cli, model: str) -> None:
    told = cli("data", "show", "rows.jsonl", "--model", model, "--row", "2").out
    assert "<|im_start|>assistant⏎\n▸it 1<|im_end|>◂⏎\n" in told
    assert "row 2: 31 tokens, 5 learnt" in told
    assert "row 6: found user; no assistant turn" in told
    for row, said in (("7", "There is no row 7: the file has rows 1 to 6."), ("6", "Row 6 is left out: found user;")):
        outcome = cli("data", "show", "rows.jsonl", "--model", model, "--row", row)
        assert (outcome.code, outcome.out) == (2, "")
        assert said in outcome.err


def test_pairs_are_shown_as_what_they_are_unless_something_else_is_asked_for(cli: Cli, model: str) -> None:
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "what", "chosen": "this", "rejected": "that"}) + "\n")
    outcome = cli("data", "show", "pairs.jsonl", "--model", model, "--set", "train.seq_len=64", "--json")
    assert outcome.code == 0
    learnt = [row["text"][begin:end] for row in outcome.document["rows"] for begin, end in row["trained"]]
    assert learnt == ["this<|im_end|>", "that<|im_end|>"]
    refused = cli("data", "show", "pairs.jsonl", "--model", model, "--set", "train.objective=sft")
    assert (refused.code, "found a preferred and a rejected answer" in refused.out) == (1, True)


def test_what_must_be_corrected_is_told_behind_any_number_of_notes(cli: Cli, model: str) -> None:
    user = {"role": "user", "content": "what"}
    rows = [
        {"messages": [user, *answer]}
        for answer in (
            [],
            [{"role": "assistant", "content": ""}],
            [{"role": "assistant", "content": "no", "weight": 0}],
            [{"role": "assistant", "content": "yes"}],
        )
    ] * 100
    rows.append({"messages": [{"role": "nobody", "content": "what"}, {"role": "assistant", "content": "yes"}]})
    Path("notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = cli("data", "show", "notes.jsonl", "--model", model, "--rows", "1")
    assert outcome.code == 1
    told = [line for line in outcome.out.splitlines() if line.startswith("error: ")]
    assert [line[:15] for line in told] == ["error: row 401 "]


def test_without_a_model_it_says_so(cli: Cli, model: str) -> None:
    outcome = cli("data", "show", "rows.jsonl")
    assert (outcome.code, "Name it with --model" in outcome.err) == (2, True)
    outcome = cli("data", "show", "rows.jsonl", "--model", "./nowhere")
    assert (outcome.code, "no model folder" in outcome.err) == (2, True)


def test_hostile_rows_do_nothing(cli: Cli, model: str) -> None:
    told = cli("data", "show", "rows.jsonl", "--model", model, "--row", "5").out
    assert not any(ord(character) < 32 and character != "\n" for character in told)
    assert not set("\x7f\x9b\u202e\u200b\ufeff") & set(told)
    shown = r"\x1b[31mred\x1b]0;title\x07\x9b1;1H\u202eltr [bold]not bold[/] a\u200bb\ufeff\r"
    assert f"▸{shown}<|im_end|>◂" in told


def test_what_is_learnt_is_marked_with_and_without_colour() -> None:
    example = ShownExample("", (1, 2, 3, 4), ("a", "b\n", "c", "d"), ((1, 4),), (0,), 4, 3)
    assert marked_text(example, colours=False) == "a▸b⏎\nc\n--- the row is cut here ---\nd◂"
    coloured = marked_text(example, colours=True)
    assert "\x1b[36ma\x1b[0m▸\x1b[1;32mb⏎\n\x1b[0m" in coloured
    assert coloured.endswith("\x1b[2;31md\x1b[0m◂")


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii_gets_ascii(home: Path, model: str) -> None:
    words = [sys.executable, "-m", "studio", "data", "show", "rows.jsonl", "--model", model, "--row", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, env=environment, check=True)
    assert b">>it 0<|im_end|><<\\n" in done.stdout
