"""A resume is refused by the one who asks for it wherever that can be known without a wait."""

import json
import os
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.events import Identified, Started, event_to_dict
from studio.core.recipe import Recipe
from studio.launch.start import resume
from studio.probe import fingerprint as module
from studio.probe import resume as resume_module
from studio.probe.data import Conversation, Message, PlainText
from studio.probe.fingerprint import fingerprint, short_fingerprint
from studio.probe.resume import RowsFound, check_resume, refuse_other_rows
from studio.runs.checkpoints import NoWholeCheckpoint
from studio.runs.identity import read_identity, write_identity
from studio.runs.layout import RunPaths
from tests.fakes.runs import make_run
from tests.probe.test_weight_sums import weights

ROWS = [Conversation((Message("user", f"question {n}"), Message("assistant", f"answer {n}")), n) for n in range(1, 6)]


def base_in(folder: Path, fill: int = 1) -> Path:
    """A model folder that passes for whole."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    (folder / "tokenizer.json").write_text("{}")
    weights(folder / "model.safetensors", {f"layer.{place}": fill for place in range(4)})
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The training rows as a file."""
    path = tmp_path / "data.jsonl"
    rows = [{"messages": [{"role": one.role, "content": one.content} for one in row.messages]} for row in ROWS[:4]]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Recipe:
    made = Recipe(name="try").with_("model.base", str(base_in(tmp_path / "base")))
    return made.with_("data.path", str(data)).with_("eval.rows", 0).with_("eval.samples", 0)


@pytest.fixture
def paths(tmp_path: Path, recipe: Recipe) -> RunPaths:
    """A run that has told what it is made from, and then ended without a word."""
    paths = make_run(tmp_path, recipe=recipe)
    rows = RowsFound.of(ROWS[:4], [])
    found = fingerprint(tmp_path / "base")
    write_identity(paths, found, rows.hashes)
    events = [
        Started(at=1.0, job="train", recipe=recipe.to_dict(), versions={"torch": "2.13"}),
        Identified(at=2.0, base=short_fingerprint(found), rows=rows.table()),
    ]
    paths.events.write_text("".join(json.dumps(event_to_dict(event)) + "\n" for event in events))
    return paths


def test_what_is_as_it_was_goes_on(paths: RunPaths, recipe: Recipe) -> None:
    check_resume(paths, recipe)


def test_another_recipe_is_refused_before_anything_is_started(paths: RunPaths, recipe: Recipe) -> None:
    with pytest.raises(BadInput, match=r"its recipe.toml is not the one that it began with, .*: adapter.rank: 16 -> 8"):
        check_resume(paths, recipe.with_("adapter.rank", 8))


def test_another_base_is_refused_before_anything_is_started(paths: RunPaths, recipe: Recipe, tmp_path: Path) -> None:
    base_in(tmp_path / "base", fill=2)
    with pytest.raises(BadInput, match=r"4 of its 4 tensors hold other numbers \(layer.0, layer.1, layer.2 and 1 more"):
        resume(paths)
    base_in(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(BadInput, match=r"tokenizer\.json is changed"):
        check_resume(paths, recipe)


def test_other_rows_are_refused_before_anything_is_started_and_moved_ones_go_on(
    paths: RunPaths, recipe: Recipe, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = data.read_text().splitlines()
    data.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(BadInput, match="the training rows are not those that it began with: 4 rows then, 3 now: 1 no"):
        resume(paths)
    moved = data.with_name("moved.jsonl")
    moved.write_text("\n".join(lines))
    check_resume(paths, recipe.with_("data.path", str(moved)))
    monkeypatch.setattr(resume_module, "_AT_ONCE_BYTES", 10)
    check_resume(paths, recipe)
    data.unlink()
    with pytest.raises(BadInput, match=r"data\.jsonl"):
        check_resume(paths, recipe)


def test_weights_that_would_take_long_to_read_are_left_to_the_job(
    paths: RunPaths, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE_BYTES", 10)
    base_in(tmp_path / "base", fill=2)
    check_resume(paths, recipe)
    weights(tmp_path / "base" / "model.safetensors", {"layer.0": 1})
    with pytest.raises(BadInput, match="its tensors have other names, formats or shapes"):
        check_resume(paths, recipe)


def test_a_lost_or_damaged_record_names_less_and_refuses_the_same(
    paths: RunPaths, recipe: Recipe, tmp_path: Path
) -> None:
    base_in(tmp_path / "base", fill=2)
    rows = RowsFound.of(ROWS[:3], [])
    for damage in (lambda: paths.identity.write_text("{"), paths.identity.unlink):
        damage()
        with pytest.raises(BadInput, match="its tensors hold other numbers"):
            check_resume(paths, recipe)
        with pytest.raises(BadInput, match="they have another content or order"):
            refuse_other_rows(paths, read_identity(paths), rows)


def test_rows_are_known_by_content_and_order_and_nothing_else(paths: RunPaths) -> None:
    first = read_identity(paths)
    renumbered = [Conversation(row.messages, row.number + 7) for row in ROWS]
    refuse_other_rows(paths, first, RowsFound.of(renumbered[:4], []))
    with pytest.raises(BadInput, match="in another order; the first difference is at training row 1"):
        refuse_other_rows(paths, first, RowsFound.of(ROWS[3::-1], []))
    shouted = Conversation((Message("user", "QUESTION 1"), Message("assistant", "answer 1")))
    with pytest.raises(BadInput, match="1 no longer there, 1 new; the first difference is at training row 1"):
        refuse_other_rows(paths, first, RowsFound.of([shouted, *ROWS[1:4]], []))
    with pytest.raises(BadInput, match=r"held-out rows are not those that it began with \(0 then, 1 now\)"):
        refuse_other_rows(paths, first, RowsFound.of(ROWS[:4], ROWS[4:]))


def test_rows_that_read_alike_when_joined_are_different() -> None:
    rows = [
        Conversation((Message("user", "ab"), Message("assistant", "c"))),
        Conversation((Message("user", "a"), Message("assistant", "bc"))),
        Conversation((Message("user", "ab\0c"),)),
        Conversation((Message("system", "ab"), Message("assistant", "c"))),
        PlainText("ab"),
        PlainText("ab\ud800"),
    ]
    assert len(set(RowsFound.of(rows, []).hashes)) == len(rows)


def test_damaged_checkpoints_refuse_before_a_process_is_started(paths: RunPaths) -> None:
    (paths.checkpoints / "step-00000010").mkdir(parents=True)
    os.utime(paths.root, (1.0, 1.0))
    before = sorted(path.name for path in paths.root.iterdir())
    with pytest.raises(NoWholeCheckpoint, match=r"it has no complete\.json"):
        resume(paths)
    assert sorted(path.name for path in paths.root.iterdir()) == before
