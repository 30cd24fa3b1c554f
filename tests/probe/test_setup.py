"""The set-up's answers: kept and recalled whatever lies in the file, and what follows from them."""

import json
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED
from studio.probe import setup as module
from studio.probe.data.lengths import texts_of, token_lengths
from studio.probe.device import Sight
from studio.probe.known_models import known_models
from studio.probe.setup import (
    Answers,
    check_data,
    data_files,
    goal_for,
    keep_answers,
    recall_answers,
    recommendation_for,
    shape_for,
)
from studio.probe.shape import find_shape
from studio.runs.home import is_first_visit


def rows_file(path: Path, rows: int = 40) -> Path:
    lines = [{"prompt": f"what is {n}?", "completion": f"{n} " * (n + 1)} for n in range(rows)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_answers_are_kept_and_end_the_first_visit(tmp_path: Path) -> None:
    home, runs = tmp_path / "home", tmp_path / "home" / "runs"
    assert is_first_visit(runs, home)
    answers = Answers(base="owner/name", data="/rows.jsonl", goal="facts", card="RTX 4090", step="goal")
    keep_answers(answers, home)
    assert recall_answers(home) == answers
    assert not is_first_visit(runs, home)


def test_a_run_ends_the_first_visit_too(tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert not is_first_visit(tmp_path / "runs", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"goal": "world domination", "base": 7, "done": "yes", "data": null}',
        b'{"base": "a\\u0000b"}',
        b"[" * 5000,
    ],
)
def test_damaged_answers_are_as_at_the_first_visit(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "setup.json").write_bytes(content)
    assert recall_answers(tmp_path) == Answers()


def test_the_whole_file_is_read_and_measured(tmp_path: Path) -> None:
    checked = check_data(str(rows_file(tmp_path / "rows.jsonl")), "no/such-model")
    assert checked.sound
    assert checked.facts.rows == 40
    assert not checked.facts.counted
    characters = [sum(map(len, texts_of(row))) for row in checked.data.rows]
    assert checked.facts.tokens == int(sum(characters) / 3)
    assert checked.facts.longest_tokens == int(max(characters) / 3)


def test_tokens_are_counted_where_the_tokenizer_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "estimated_tokens", lambda rows, base: [10] * len(rows))
    checked = check_data(str(rows_file(tmp_path / "rows.jsonl")), "base")
    assert checked.facts.counted
    assert (checked.facts.tokens, checked.facts.longest_tokens) == (400, 10), "both without the chat template"
    with pytest.raises(BadInput):
        token_lengths(checked.data.rows, str(tmp_path))


def test_a_file_with_bad_rows_is_read_but_not_sound(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    assert not check_data(str(tmp_path / "bad.jsonl"), EMBEDDED).sound
    with pytest.raises(BadInput):
        check_data(str(tmp_path / "missing.jsonl"), EMBEDDED)


def test_a_folder_and_its_split_are_data(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows_file(tmp_path / f"{split}.jsonl")
    checked = check_data(f"{tmp_path}:test", EMBEDDED)
    assert checked.sound
    assert checked.facts.path == f"{tmp_path}:test"


def test_data_files_nearby_are_offered(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    near, below = rows_file(tmp_path / "b.jsonl"), rows_file(tmp_path / "data" / "a.parquet")
    packed = rows_file(tmp_path / "c.csv.gz")
    for name in ("notes.txt", "package.json", "README.md"):
        (tmp_path / name).write_text("no")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text("{}")
    assert data_files(tmp_path) == [near, packed, tmp_path / "saved", below]
    assert data_files(tmp_path / "missing") == []


def test_a_recommendation_is_for_the_card_that_is_planned_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.probe.device.look", lambda: Sight(None))
    checked = check_data(str(rows_file(tmp_path / "rows.jsonl")), EMBEDDED)
    shape = find_shape(EMBEDDED)
    here = recommendation_for(Answers(data=checked.facts.path), shape, checked.facts)
    there = recommendation_for(Answers(data=checked.facts.path, card="RTX 4090"), shape, checked.facts)
    assert here.verdict is None
    assert there.verdict == "fits"
    assert there.recipe.data.path == str(tmp_path / "rows.jsonl")
    with pytest.raises(BadInput):
        recommendation_for(Answers(card="no such card"), shape, checked.facts)


def test_a_folder_with_its_config_alone_is_enough_to_plan_for_another_card(tmp_path: Path) -> None:
    known = known_models()["meta-llama/Llama-3.1-8B"]
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(known["config"]))
    assert shape_for(str(folder), "RTX 4090").parameters == known["parameters"]
    with pytest.raises(BadInput, match="no weights"):
        shape_for(str(folder), "")
    with pytest.raises(BadInput, match="is a file"):
        shape_for(str(folder / "config.json"), "RTX 4090")
    (folder / "config.json").write_text(json.dumps(known["config"] | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(BadInput, match="already quantised"):
        shape_for(str(folder), "RTX 4090")
    for odd in ("\0", "~nobody-of-this-name/model", "x" * 5000):
        for card in ("", "RTX 4090"):
            with pytest.raises(BadInput):
                shape_for(odd, card)


def test_pairs_of_answers_are_recognised_and_dpo_is_recommended(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"ask {n}", "chosen": "yes " * 50, "rejected": "no " * 150} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    checked = check_data(str(path), "no/such-model")
    assert checked.sound
    assert checked.facts.pairs
    assert checked.facts.rows == 40
    assert checked.facts.longest_tokens == pytest.approx((5 + 450) / 3, abs=5), "the longest side, not both"
    assert checked.facts.tokens == pytest.approx(40 * (5 + 200 + 5 + 450) / 3, rel=0.05), "of both sides"
    found = recommendation_for(Answers(data=str(path)), find_shape(EMBEDDED), checked.facts)
    assert found.recipe.train.objective == "dpo"


def test_raw_text_is_offered_to_continue_pre_training_with(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": "It was a dark and stormy night. " * 5000}))
    checked = check_data(str(path), EMBEDDED)
    assert checked.facts.text and 30_000 < checked.facts.tokens < 60_000
    assert (goal_for("task", checked.facts), goal_for("domain", checked.facts)) == ("text", "domain")
    answers = Answers(data=str(path), goal="text")
    made = recommendation_for(answers, shape_for(EMBEDDED, ""), checked.facts)
    assert "becomes blocks" in " ".join(choice.why for choice in made.choices)
    chats = check_data(str(rows_file(tmp_path / "rows.jsonl")), EMBEDDED)
    assert (goal_for("task", chats.facts), goal_for("text", chats.facts)) == ("task", "task")
