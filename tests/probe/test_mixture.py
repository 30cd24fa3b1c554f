"""Mixtures: what is drawn of each source, how it is split, and how its held-out rows are found again."""

import json
from collections import Counter
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.sources import Source
from studio.probe.data.lengths import token_lengths
from studio.probe.data.mixture import data_of, part_of
from studio.probe.held_out import hold_out, rows_of_run
from studio.probe.preflight import check_training
from studio.runs.held_out import MIXTURE, keep_record, read_record
from studio.runs.layout import RunPaths
from tests.fakes.tiny_model import make_tiny_model


def file_of(folder: Path, name: str, rows: int, words: int = 1) -> str:
    path = folder / f"{name}.jsonl"
    said = " ".join(["word"] * words)
    lines = [{"prompt": f"{name} asks {row}", "completion": f"{name} says {row} {said}"} for row in range(rows)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def made(*sources: Source, **more: object) -> Recipe:
    recipe = Recipe().with_("data.sources", sources).with_("eval.rows", 10)
    for path, value in more.items():
        recipe = recipe.with_(path.replace("__", "."), value)
    assert not recipe.problems()
    return recipe


def test_weights_are_shares_of_rows_and_the_seed_draws(tmp_path: Path) -> None:
    one, other = file_of(tmp_path, "one", 30), file_of(tmp_path, "two", 100)
    recipe = made(Source(one, 1.0), Source(other, 1.0))
    data = data_of(recipe)
    assert [part.drawn for part in data.parts] == [30, 30] and len(data.rows) == 60
    assert list(data.rows) == list(data_of(recipe).rows)
    assert list(data.rows) != list(data_of(recipe.with_("train.seed", 5)).rows)
    assert list(data.rows)[:30] == list(data.parts[0].data.rows)
    drawn = list(data.rows)[30:]
    assert drawn == sorted(drawn, key=lambda row: row.number) and len(set(drawn)) == 30
    assert [data.rows[place] for place in (0, 29, 30, -1)] == [list(data.rows)[place] for place in (0, 29, 30, -1)]
    assert list(data.rows[28:32]) == list(data.rows)[28:32]
    assert [part_of(data, place) for place in (0, 29, 30, 59)] == [0, 0, 1, 1]
    assert "two.jsonl 30 of 100 rows (50% of the rows" in data.described()


def test_weights_by_tokens_weigh_the_length_of_rows(tmp_path: Path) -> None:
    short, long = file_of(tmp_path, "one", 200, words=1), file_of(tmp_path, "two", 200, words=92)
    base = str(make_tiny_model(tmp_path / "tiny"))
    data = data_of(made(Source(short, 1.0), Source(long, 1.0), data__weigh_by="tokens", model__base=base))
    few, many = data.parts[1], data.parts[0]
    assert many.drawn == 200 and few.drawn < 40
    counts = token_lengths(data.rows, base)
    assert 0.9 < sum(counts[200:]) / sum(counts[:200]) < 1.1


def test_more_rows_than_there_are_repeat_them(tmp_path: Path) -> None:
    data = data_of(made(Source(file_of(tmp_path, "one", 4), rows=10), Source(file_of(tmp_path, "two", 9))))
    counts = Counter(row.number for row in data.rows[:10])
    assert sorted(counts.values()) == [2, 2, 3, 3]
    assert "each about 2.5 times" in data.described()


def test_a_source_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data.sources, source 2: The data file .*none.jsonl does not exist"):
        data_of(made(Source(file_of(tmp_path, "one", 4)), Source(str(tmp_path / "none.jsonl"))))


def test_sources_have_columns_and_prompts_of_their_own(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    rows = [{"Frage": f"was {n}", "Antwort": f"das {n}", "Fach": "Mathe"} for n in range(20)]
    other.write_text("\n".join(map(json.dumps, rows)))
    asked = Source(str(other), columns=(("completion", "Antwort"),), prompt="{{ Fach }}: {{ Frage }}?")
    recipe = made(Source(file_of(tmp_path, "one", 30)), asked)
    data = data_of(recipe)
    assert len(data.rows) == 50 and data.rows[30].prompt == "Mathe: was 0?"
    record = hold_out(recipe, data, None).record
    again = rows_of_run(record, "the run", Path(MIXTURE), format="auto", wanted=100, seed=1)
    assert sorted(again.hashes) == sorted(record.held_out) and record.sources[1].held_out


def test_twins_in_two_sources_are_on_one_side(tmp_path: Path) -> None:
    one = file_of(tmp_path, "one", 40)
    (tmp_path / "copy.jsonl").write_text(Path(one).read_text().upper().replace("PROMPT", "prompt").replace(
        "COMPLETION", "completion"
    ))  # fmt: skip
    recipe = made(Source(one), Source(str(tmp_path / "copy.jsonl")))
    parts = hold_out(recipe, data_of(recipe), None)
    assert len(parts.held_out) == 10
    trained = {row.prompt.casefold() for row in parts.train}
    assert not trained & {row.prompt.casefold() for row in parts.held_out}


def test_the_record_counts_by_source_and_audits_find_the_rows_again(tmp_path: Path) -> None:
    one, other = file_of(tmp_path, "one", 30), file_of(tmp_path, "two", 100)
    recipe = made(Source(one, 1.0), Source(other, 2.0), Source("embedded", rows=20))
    parts = hold_out(recipe, data_of(recipe), None)
    assert any(note.startswith("held out of one.jsonl ") for note in parts.notes)
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    keep_record(paths, parts.record)
    record = read_record(paths)
    assert record == parts.record and record.held_from == record.data == MIXTURE
    assert [(Path(one.path).name, one.drawn) for one in record.sources] == [
        ("one.jsonl", 30), ("two.jsonl", 60), ("embedded", 20)
    ]  # fmt: skip
    assert sum(one.held_out for one in record.sources) == len(parts.held_out) == 10
    again = rows_of_run(record, "the run", tmp_path / MIXTURE, format="auto", wanted=100, seed=1)
    assert sorted(again.hashes) == sorted(record.held_out) and again.held_out_rows == 10
    # One of its files, named itself: what was not drawn, and what was held out, may be measured.
    alone = rows_of_run(record, "the run", Path(other), format="auto", wanted=1000, seed=1)
    held = record.sources[1].held_out
    assert alone.held_out_rows == 40 + held
    Path(other).unlink()
    with pytest.raises(BadInput, match=r"two.jsonl does not exist.*the run held out rows of it"):
        rows_of_run(record, "the run", Path(MIXTURE), format="auto", wanted=100, seed=1)


def test_rows_that_are_repeated_are_found_as_often_as_they_were_held_out(tmp_path: Path) -> None:
    recipe = made(Source(file_of(tmp_path, "one", 20), rows=50), Source(file_of(tmp_path, "two", 20)))
    record = hold_out(recipe, data_of(recipe), None).record
    again = rows_of_run(record, "the run", Path(MIXTURE), format="auto", wanted=100, seed=1)
    assert sorted(again.hashes) == sorted(record.held_out)


def test_the_check_before_a_start_tells_the_shares(tmp_path: Path) -> None:
    recipe = made(Source(file_of(tmp_path, "one", 30)), Source("embedded", rows=20)).with_("device.device", "cpu")
    notes = check_training(recipe).notes
    (told,) = (note for note in notes if note.startswith("a mixture of 2 files, 50 rows: "))
    assert "one.jsonl 30 of 30 rows (60% of the rows" in told and "stdlib_qa.jsonl 20 of " in told
