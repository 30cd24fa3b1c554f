"""Which rows may be called held out: of every kind of data that an audit can name, never one that was trained on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.probe.audit import audit_of_run, check_audit, recipe_of_race, rows_to_measure
from studio.probe.data import Reading, Row, read_data, row_keys, shipped_data
from studio.probe.held_out import HeldOut, RowsToMeasure, hold_out
from studio.runs.held_out import (
    RowLosses,
    keep_losses_before,
    keep_record,
    read_record,
    shared_record,
)
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from studio.tui.screens.ask_audit import run_request, run_wishes

HELD, ALL = 12, 60


def write(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs))
    return path


PAIRS = [(f"question {n}", f"answer {n}") for n in range(ALL)]
FRESH = [(f"never asked {n}", f"never said {n}") for n in range(30)]


def of(rows: Sequence[Row]) -> set[str]:
    """Hashes made here, not by what is tested."""
    return {hashlib.sha256(f"{row.prompt}|{row.answer}".encode()).hexdigest() for row in rows}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", PAIRS)


def a_run(root: Path, data: Path | str, **settings: object) -> tuple[RunPaths, HeldOut]:
    """A training run as the job leaves it, without the training: recipe, record, an adapter's folder."""
    recipe = Recipe().with_("data.path", str(data)).with_("eval.rows", HELD).with_("eval.samples", 0)
    for path, value in settings.items():
        recipe = recipe.with_(path.replace("__", "."), value)
    paths = RunPaths(root / "a-run")
    paths.adapter.mkdir(parents=True)
    write_job(paths, recipe)
    own = recipe.data.eval_path
    parts = hold_out(recipe, read_data(Path(data)), read_data(Path(own)) if own else None)
    keep_record(paths, parts.record)
    return paths, parts


def measured(paths: RunPaths, **changes: Any) -> RowsToMeasure:
    return rows_to_measure(audit_of_run(paths, **changes))


@pytest.mark.parametrize("rows", [None, 2, 5, 12, 13, 100, 100000])
@pytest.mark.parametrize("seed", [17, 5])
def test_however_many_rows_are_asked_for_none_was_trained_on(
    tmp_path: Path, data: Path, rows: int | None, seed: int
) -> None:
    paths, parts = a_run(tmp_path, data)
    found = measured(paths, seed=seed, **({"rows": rows} if rows else {}))
    assert not of(found.rows) & of(parts.train)
    assert of(found.rows) <= of(parts.held_out)
    assert len(found.rows) == min(rows or HELD, HELD)
    assert found.held_out_rows == HELD
    some = len(found.rows) < HELD
    which = f"{len(found.rows)} of the {HELD}" if some else f"all {HELD}"
    chosen = f", chosen by seed {seed}" if some else ""
    assert found.where == f"{which} rows that the run a-run held out of data.jsonl{chosen}"


@pytest.mark.parametrize("rows", ["100", "", "5"])
def test_the_studios_wishes_mean_held_out_rows_too(tmp_path: Path, data: Path, rows: str) -> None:
    paths, parts = a_run(tmp_path, data)
    said = {wish.key: wish.value for wish in run_wishes()}
    found = rows_to_measure(run_request(paths, said | {"rows": rows}))
    assert not of(found.rows) & of(parts.train)
    assert len(found.rows) == (5 if rows == "5" else HELD) <= (found.held_out_rows or 0)
    default = rows_to_measure(run_request(paths, said))
    assert default == measured(paths), "command line and studio mean the same"


def test_the_demos_data_as_the_studio_audits_them(tmp_path: Path) -> None:
    """Fifty of 591 embedded rows are held out; the studio used to ask for a hundred by another split."""
    paths, parts = a_run(tmp_path, "embedded", eval__rows=50)
    for request in (run_request(paths, {"rows": "100"}), audit_of_run(paths, data=str(shipped_data()), rows=100)):
        found = rows_to_measure(request)
        assert len(found.rows) == found.held_out_rows == 50
        assert not of(found.rows) & of(parts.train)


@pytest.mark.parametrize("how", ["same", "copy", "shuffled", "other case"])
def test_the_same_rows_in_whatever_file(tmp_path: Path, data: Path, how: str) -> None:
    paths, parts = a_run(tmp_path, data)
    pairs = {"shuffled": PAIRS[::-1], "other case": [(q.upper(), f"  {a.upper()}") for q, a in PAIRS]}.get(how, PAIRS)
    named = data if how == "same" else write(tmp_path / "copy.jsonl", pairs)
    found = measured(paths, data=str(named), format="auto", rows=100)
    assert len(found.rows) == found.held_out_rows == HELD
    folded = {(row.prompt.lower(), row.answer.lower().strip()) for row in found.rows}
    assert folded == {(row.prompt, row.answer) for row in parts.held_out}
    if how in ("copy", "shuffled"):
        assert found.notes[0].startswith(f"{ALL - HELD} of the {ALL} rows of copy.jsonl are left out")


def test_the_runs_own_file_named_again_is_read_as_it_was_for_the_training(tmp_path: Path) -> None:
    """A file that is text and pairs at once: by default it would be read as pairs."""
    both = tmp_path / "both.jsonl"
    rows = [{"text": f"story {n}", "prompt": f"question {n}", "completion": f"answer {n}"} for n in range(ALL)]
    both.write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe().with_("data.path", str(both)).with_("data.format", "text").with_("eval.rows", HELD)
    paths = RunPaths(tmp_path / "a-run")
    paths.adapter.mkdir(parents=True)
    write_job(paths, recipe)
    parts = hold_out(recipe, read_data(both, Reading("text")), None)
    keep_record(paths, parts.record)
    assert of(measured(paths, data=str(both), format="auto").rows) == of(parts.held_out)


def test_other_data_loses_what_was_trained_on_and_says_how_much(tmp_path: Path, data: Path) -> None:
    paths, parts = a_run(tmp_path, data)
    trained = [(row.prompt, row.answer) for row in parts.train[:8]]
    corrected = [(row.prompt, f"{row.answer}, corrected") for row in parts.train[8:11]]
    borrowed = [("a new question", parts.train[20].answer)]
    other = write(tmp_path / "other.jsonl", [*trained, *corrected, *borrowed, *FRESH])
    found = measured(paths, data=str(other), format="auto")
    assert {(row.prompt, row.answer) for row in found.rows} == {*borrowed, *FRESH}
    assert found.held_out_rows == len(found.rows) == 31
    assert found.notes[0] == "11 of the 42 rows of other.jsonl are left out: they, or their prompts, are trained on"
    assert found.notes[1] == "1 of 31 held-out rows have a prompt or an answer that is also trained on"
    assert len(measured(paths, data=str(other), format="auto", rows=7).rows) == 7


def test_data_that_was_trained_on_as_a_whole_is_refused(tmp_path: Path, data: Path) -> None:
    paths, parts = a_run(tmp_path, data)
    other = write(tmp_path / "other.jsonl", [(row.prompt, row.answer) for row in parts.train])
    request = audit_of_run(paths, data=str(other), format="auto")
    with pytest.raises(BadInput, match=r"all 48 rows of other\.jsonl were trained on by the run a-run"):
        rows_to_measure(request)


def test_one_prompt_with_many_answers_is_told_apart_by_the_answers(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [("write a poem", f"poem {n}") for n in range(20)])
    paths, _ = a_run(tmp_path, data, eval__rows=0)
    other = write(tmp_path / "other.jsonl", [("write a poem", f"poem {n}") for n in range(15, 25)])
    found = measured(paths, data=str(other), format="auto")
    assert [row.answer for row in found.rows] == [f"poem {n}" for n in range(20, 25)]
    assert "5 of the 10 rows of other.jsonl are left out: they are trained on" in found.notes[0]


def test_a_run_that_held_out_nothing_has_no_rows_to_measure(tmp_path: Path, data: Path) -> None:
    paths, _ = a_run(tmp_path, data, eval__rows=0)
    with pytest.raises(BadInput, match=r"held out no row: all 60 rows of data\.jsonl were trained on"):
        measured(paths)
    other = write(tmp_path / "other.jsonl", [*PAIRS, *FRESH])
    assert {row.prompt for row in measured(paths, data=str(other), format="auto").rows} == {q for q, _ in FRESH}


def test_an_edited_file_gives_only_what_is_left_of_the_held_out_rows(tmp_path: Path, data: Path) -> None:
    paths, parts = a_run(tmp_path, data)
    gone = {row.prompt for row in parts.held_out[:4]}
    write(data, [*((q, a) for q, a in PAIRS if q not in gone), *FRESH])
    found = measured(paths, rows=100)
    assert of(found.rows) == of(parts.held_out[4:])
    assert (found.held_out_rows, len(found.rows)) == (HELD, 8)
    assert "8 of the 12 rows that it held out are still there" in found.notes[0]
    write(data, FRESH)
    with pytest.raises(BadInput, match=r"none of the 12 rows that it held out is in it any more"):
        measured(paths)
    data.unlink()
    with pytest.raises(BadInput, match="name where it lies now with --data"):
        measured(paths)


def test_a_copy_of_a_held_out_row_is_not_another_one(tmp_path: Path, data: Path) -> None:
    paths, parts = a_run(tmp_path, data)
    write(data, [*PAIRS, *((row.prompt, row.answer) for row in parts.held_out)])
    assert len(measured(paths, rows=100).rows) == HELD


def test_rows_of_an_own_file_are_held_out_where_they_are_not_trained_on(tmp_path: Path, data: Path) -> None:
    own = write(tmp_path / "own.jsonl", [*PAIRS[:10], *FRESH])
    paths, parts = a_run(tmp_path, data, data__eval_path=str(own), eval__rows=20)
    assert len(parts.train) == ALL and len(parts.held_out) == 20
    assert parts.notes[0] == "10 of the 40 rows of own.jsonl are left out: they, or their prompts, are trained on"
    for changes in ({}, {"rows": 100}, {"data": str(own), "rows": 100}):
        found = measured(paths, **changes)
        assert of(found.rows) == of(parts.held_out) and found.held_out_rows == 20
    with pytest.raises(BadInput, match=r"all 60 rows of data\.jsonl were trained on"):
        measured(paths, data=str(data))
    write(own, PAIRS[:10])
    recipe = Recipe().with_("data.path", str(data)).with_("data.eval_path", str(own))
    with pytest.raises(BadInput, match=r"data\.eval_path: all 10 rows of own\.jsonl are trained on"):
        hold_out(recipe, read_data(data), read_data(own))


def test_of_an_own_file_the_seed_draws_rows_and_none_asked_for_means_all(tmp_path: Path, data: Path) -> None:
    """The first rows used to be taken: of a file in alphabetical order, those with A."""
    own = read_data(write(tmp_path / "own.jsonl", FRESH))
    recipe = Recipe().with_("data.path", str(data)).with_("data.eval_path", str(own.path)).with_("eval.samples", 0)

    def held(rows: int, seed: int) -> tuple[Row, ...]:
        return hold_out(recipe.with_("eval.rows", rows).with_("train.seed", seed), read_data(data), own).held_out

    drawn = [held(10, seed) for seed in (17, 17, 5)]
    assert [len(rows) for rows in drawn] == [10, 10, 10]
    assert drawn[0] == drawn[1] != drawn[2]
    assert own.rows[:10] not in drawn
    assert [row.number for row in drawn[0]] == sorted(row.number for row in drawn[0])
    for rows in (0, 1000):
        assert held(rows, 17) == own.rows, "the whole file, not a fifth"


def test_twins_of_trained_rows_are_not_held_out_of_another_file(tmp_path: Path, data: Path) -> None:
    twins = [(f"  {q.upper()} ?!", f"another {a}") for q, a in PAIRS[:10]]
    own = write(tmp_path / "own.jsonl", [*twins, *FRESH])
    paths, parts = a_run(tmp_path, data, data__eval_path=str(own), eval__rows=0)
    assert {(row.prompt, row.answer) for row in parts.held_out} == set(FRESH)
    assert parts.notes[0] == "10 of the 40 rows of own.jsonl are left out: they, or their prompts, are trained on"
    other = write(tmp_path / "other.jsonl", [*twins, *FRESH])
    assert {row.prompt for row in measured(paths, data=str(other)).rows} == {q for q, _ in FRESH}
    talks = [[("user", PAIRS[0][0]), ("assistant", "a"), ("user", f"and {n}?"), ("assistant", "b")] for n in range(3)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    rows.append({"messages": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "c"}]})
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(map(json.dumps, rows)))
    assert [row.prompt for row in measured(paths, data=str(chats)).rows] == ["new"]


@pytest.mark.parametrize("own_file", [False, True])
def test_a_run_that_another_version_began_keeps_the_rows_that_it_held_out(
    tmp_path: Path, data: Path, own_file: bool
) -> None:
    own = read_data(write(tmp_path / "own.jsonl", FRESH)) if own_file else None
    recipe = Recipe().with_("data.path", str(data)).with_("eval.rows", 5).with_("eval.samples", 0)
    recipe = recipe.with_("data.eval_path", str(own.path)) if own else recipe
    found = read_data(data)
    now = hold_out(recipe, found, own)
    first = (own or found).rows[:5]
    assert now.held_out != first
    kept = replace(now.record, held_out=tuple(row_keys(row).content.hex() for row in first))
    again = hold_out(recipe, found, own, kept)
    assert again.held_out == first
    assert again.train == (found.rows if own else found.rows[5:])
    assert again.record.held_out == kept.held_out
    assert again.notes == ("the rows held out are those of the run's first start",)
    assert hold_out(recipe, found, own, now.record) == now
    unknown = replace(kept, held_out=("00" * 12,) * 5)
    assert hold_out(recipe, found, own, unknown) == now, "other data: whoever resumes is refused for it"


@pytest.mark.parametrize(("rows", "there"), [(100, 60), (60, 60), (25, 25)])
def test_of_a_base_every_row_can_be_measured(data: Path, rows: int, there: int) -> None:
    request = AuditRequest("base", data=str(data), rows=rows)
    found = rows_to_measure(request)
    assert (len(found.rows), found.held_out_rows) == (there, None)
    wanted = "all 60 rows of data.jsonl" if there == ALL else "25 of the 60 rows of data.jsonl, chosen by seed 17"
    assert found.where == wanted
    assert [row.number for row in found.rows] == sorted(row.number for row in found.rows)
    other = rows_to_measure(replace(request, seed=3))
    assert (other.rows == found.rows) == (there == ALL)


def test_rows_of_a_race_were_trained_on_by_no_lane(tmp_path: Path, data: Path) -> None:
    """As if a lane had been trained on data that were edited meanwhile."""
    _, first = a_run(tmp_path / "first", data)
    _, second = a_run(tmp_path / "second", data, train__seed=4)
    both = shared_record([first.record, second.record])
    assert set(both.held_out) == set(first.record.held_out) & set(second.record.held_out)
    assert both.trained.contents == first.record.trained.contents | second.record.trained.contents
    assert not {bytes.fromhex(content)[:8] for content in both.held_out} & both.trained.contents
    assert shared_record([first.record, first.record]).held_out == first.record.held_out


def test_a_race_needs_rows_that_no_lane_is_trained_on(data: Path) -> None:
    recipe = Recipe().with_("data.path", str(data)).with_("eval.rows", 0).with_("eval.samples", 0)
    request = AuditRequest("race", model="embedded", recipe=recipe)
    with pytest.raises(BadInput, match="this recipe holds out none"):
        check_audit(request)
    own = recipe.with_("data.eval_path", str(data))
    assert recipe_of_race(replace(request, recipe=own)).data.eval_path == str(data)


def test_a_record_is_read_as_it_was_written_and_refused_where_it_is_none(tmp_path: Path, data: Path) -> None:
    paths, parts = a_run(tmp_path, data)
    assert read_record(paths) == parts.record
    assert PAIRS[0][0] not in paths.held_out.read_text(), "it holds no text of the data"
    losses = RowLosses((1.5, 2.0), (3, 4))
    keep_losses_before(paths, losses)
    assert read_record(paths) == replace(parts.record, before=losses)
    for damaged in ("", "[]", '{"schema": 2}', paths.held_out.read_text()[:-40], '{"schema": 1, "held_out": ["zz"]}'):
        paths.held_out.write_text(damaged)
        with pytest.raises(BadInput, match="None of its rows can be called held out"):
            audit_of_run(paths)
    paths.held_out.unlink()
    with pytest.raises(BadInput, match="the run a-run has no record of its held-out rows"):
        audit_of_run(paths)
