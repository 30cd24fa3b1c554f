"""The set-up without a screen: what is found, what is recommended, what is written."""

import json
from pathlib import Path

import pytest

from studio.core.recipe import EMBEDDED
from studio.probe.setup import Answers, keep_answers
from studio.runs.recipe_file import load_recipe
from tests.cli.conftest import Cli


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"what is {n}", "completion": str(n)}) for n in range(60)))
    return file


def test_json_holds_machine_reasons_and_a_recipe_that_can_be_trained(cli: Cli, rows: Path, tmp_path: Path) -> None:
    outcome = cli("setup", "--goal", "style", "--data", str(rows), "--out", str(tmp_path / "mine.toml"), "--json")
    assert outcome.code == 0
    document = outcome.document
    assert document["machine"]["ram_bytes"] > 0
    assert document["answers"] == {"model": EMBEDDED, "data": str(rows), "goal": "style", "card": None}
    assert all(choice["why"] and choice["source"] for choice in document["choices"])
    saved = load_recipe(tmp_path / "mine.toml")
    assert saved.to_dict() == document["recipe"]
    assert saved.data.path == str(rows)
    assert "system prompt" in document["instead"]


def test_data_whose_name_is_no_utf8_cannot_be_written_into_a_recipe(cli: Cli, rows: Path, tmp_path: Path) -> None:
    odd = rows.rename(rows.with_name("caf\udce9.jsonl"))
    outcome = cli("setup", "--data", str(odd), "--out", str(tmp_path / "mine.toml"))
    assert (outcome.code, outcome.out) == (2, "")
    assert "data.path: found" in outcome.err
    assert "unexpected" not in outcome.err
    assert not (tmp_path / "mine.toml").exists()


def test_another_card_than_the_catalogues_is_for_verbs_that_take_a_size(cli: Cli, rows: Path) -> None:
    outcome = cli("setup", "--data", str(rows), "--gpu", "voodoo2")
    assert outcome.code == 2
    assert "Any other: plan and fit take --vram-gib" in outcome.err


def test_words_say_what_fits_the_card_that_is_planned_for(cli: Cli, rows: Path) -> None:
    outcome = cli("setup", "--data", str(rows), "--goal", "facts", "--gpu", "4090")
    assert outcome.code == 0
    assert "Retrieval fits facts better" in outcome.out
    assert "fits: " in outcome.out
    assert "RTX 4090" in outcome.out


def test_a_model_too_large_for_the_card_is_the_answer_no(cli: Cli, rows: Path, tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    model = tmp_path / "large"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"model.norm.weight": np.zeros(8192, np.float32)}, model / "model.safetensors")
    outcome = cli("setup", "--model", str(model), "--data", str(rows), "--gpu", "4090", "--json")
    assert outcome.code == 1
    assert outcome.document["verdict"] == "does not fit"


def test_the_answers_of_the_screen_are_where_it_begins(cli: Cli, rows: Path, home: Path) -> None:
    keep_answers(Answers(data=str(rows), goal="domain", card="A100 80GB"))
    document = cli("setup", "--json").document
    assert document["answers"] == {"model": EMBEDDED, "data": str(rows), "goal": "domain", "card": "A100 80GB"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--data", "missing.jsonl"), "does not exist"),
        (("--gpu", "no such card"), "no card called"),
        (("--model", "/missing/model"), "no model folder"),
    ],
)
def test_what_cannot_be_used_is_refused(cli: Cli, words: tuple[str, ...], told: str) -> None:
    outcome = cli("setup", *words, "--json")
    assert outcome.code == 2
    assert outcome.out == ""
    assert told in outcome.err


def test_bad_rows_and_a_recipe_that_is_there_already_are_refused(cli: Cli, rows: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    assert cli("setup", "--data", str(bad)).code == 2
    taken = tmp_path / "taken.toml"
    taken.write_text("mine")
    outcome = cli("setup", "--data", str(rows), "--out", str(taken))
    assert (outcome.code, taken.read_text()) == (2, "mine")


def test_another_cards_recipe_follows_offline_from_a_model_that_the_program_knows(cli: Cli, rows: Path) -> None:
    asked = ("setup", "--data", str(rows), "--goal", "task", "--model", "meta-llama/Llama-3.1-8B")
    outcome = cli(*asked, "--gpu", "4090", "--json")
    assert outcome.code == 0
    assert outcome.document["fits"]
    assert outcome.document["notes"][0].startswith("the config is this program's own copy, not asked of the hub now")
    assert "note: the config is this program's own copy" in cli(*asked, "--gpu", "4090").out
    here = cli(*asked)
    assert (here.code, here.out) == (2, "")
    assert "cannot be found" in here.err


def test_columns_of_any_name_are_told_by_a_flag(cli: Cli) -> None:
    Path("rows.jsonl").write_text('{"Frage": "Why?", "Antwort": "Because."}\n' * 30)
    refused = cli("setup", "--data", "rows.jsonl", "--gpu", "RTX 4090", "--json")
    assert (refused.code, "are not known: Frage, Antwort. Name them with --columns" in refused.err) == (2, True)
    words = ("--data", "rows.jsonl", "--columns", "prompt=Frage,completion=Antwort", "--gpu", "RTX 4090", "--json")
    assert cli("setup", *words).document["recipe"]["data"]["columns"] == {"prompt": "Frage", "completion": "Antwort"}
    wrong = cli("setup", "--data", "rows.jsonl", "--columns", "promt=Frage")
    assert (wrong.code, "perhaps prompt" in wrong.err) == (2, True)


def test_the_check_takes_columns_and_a_line_for_the_prompt(cli: Cli) -> None:
    Path("rows.jsonl").write_text('{"Frage": "Why?", "Antwort": "Because."}\n' * 30)
    assert cli("data", "check", "rows.jsonl").code == 1
    named = cli("data", "check", "rows.jsonl", "--columns", "prompt=Frage,completion=Antwort", "--json")
    assert (named.code, named.document["columns"]) == (0, ["Frage", "Antwort"])
    words = ("--prompt", "Say: {{ Frage }}", "--columns", "completion=Antwort")
    assert "prompt/completion (prompt, Antwort), 30 rows" in cli("data", "check", "rows.jsonl", *words).out
