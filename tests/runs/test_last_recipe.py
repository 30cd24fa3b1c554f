"""The recipe that was turned last: kept whole, for its owner, and brought back or told why not."""

import json
import stat
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.runs.last_recipe import LastRecipe, keep_last_recipe, recall_last_recipe, sound_part, source_of

TURNED = Recipe(name="mine é [b]").with_("adapter.rank", 48).with_("adapter.targets", ("q_proj", "v_proj"))


def kept_file(home: Path) -> Path:
    return home / "last_recipe.json"


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert recall_last_recipe(home) == (None, ""), "the first visit has nothing to tell"
    keep_last_recipe(LastRecipe(Recipe(name="before")), home)
    keep_last_recipe(LastRecipe(TURNED), home)
    assert recall_last_recipe(home) == (LastRecipe(TURNED), "")
    assert stat.S_IMODE(kept_file(home).stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["last_recipe.json"], "nothing half-written stays"


def test_paths_hold_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    keep_last_recipe(LastRecipe(Recipe().with_("data.path", "rows.jsonl")), tmp_path)
    last, _ = recall_last_recipe(tmp_path)
    assert last is not None
    assert last.recipe.data.path == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"[1]", "damaged"),
        (b'{"recipe": 5}', "damaged"),
        (b'{"recipe": {"adapter": {"rank": "many"}}}', "damaged"),
        (b'{"recipe": {"unknown": 1}}', "damaged"),
        (b"\xff\xfe", "damaged"),
        (b'{"recipe": {}, "more": "' + b"x" * 300_000 + b'"}', "too long"),
    ],
)
def test_a_damaged_file_is_told_and_the_demos_recipe_comes_instead(tmp_path: Path, content: bytes, why: str) -> None:
    kept_file(tmp_path).write_bytes(content)
    last, note = recall_last_recipe(tmp_path)
    assert last is None
    assert f"{why}. This is the demo's." in note


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    kept_file(tmp_path).mkdir()
    last, note = recall_last_recipe(tmp_path)
    assert last is None
    assert "cannot be brought back" in note


@pytest.mark.parametrize(
    ("then", "words"),
    [("left alone", ""), ("changed", "has changed since your last visit"), ("gone", "is not there any more")],
)
def test_a_recipe_file_that_changed_meanwhile_is_told(tmp_path: Path, then: str, words: str) -> None:
    file = tmp_path / "my\x1b[31m.toml"
    file.write_text('name = "mine"')
    keep_last_recipe(LastRecipe(TURNED, source_of(file)), tmp_path)
    if then == "changed":
        file.write_text('name = "other"')
    elif then == "gone":
        file.unlink()
    last, note = recall_last_recipe(tmp_path)
    assert last is not None
    assert last.recipe == TURNED, "what was turned is not lost"
    assert words in note
    assert bool(note) is (then != "left alone")
    assert "\x1b" not in note
    assert ("O opens the file" in note) is (then == "changed")


@pytest.mark.parametrize("source", [{"file": 5, "digest": "x"}, {"file": "\0", "digest": ""}, {"file": "~nobody/x"}])
def test_a_strange_source_harms_nothing(tmp_path: Path, source: dict[str, object]) -> None:
    kept_file(tmp_path).write_text(json.dumps({"recipe": TURNED.to_dict(), **source}))
    last, note = recall_last_recipe(tmp_path)
    assert last is not None
    assert (last.recipe, note) == (TURNED, "")


def test_what_is_too_long_is_not_kept(tmp_path: Path) -> None:
    keep_last_recipe(LastRecipe(TURNED), tmp_path)
    with pytest.raises(BadInput, match="too long to be kept"):
        keep_last_recipe(LastRecipe(Recipe(name="x" * 300_000)), tmp_path)
    assert recall_last_recipe(tmp_path)[0] == LastRecipe(TURNED)


def test_of_a_recipe_with_problems_all_else_is_kept() -> None:
    broken = TURNED.with_("train.seed", "many").with_("train.seq_len", 256)
    sound = sound_part(broken, Recipe())
    assert sound.problems() == ()
    assert (sound.adapter.rank, sound.train.seq_len, sound.train.seed) == (48, 256, Recipe().train.seed)
    sound = sound_part(broken.with_("train.steps", 0).with_("train.epochs", 0.0), Recipe())
    assert sound.problems() == ()
    assert (sound.adapter.rank, sound.train) == (48, Recipe().train), "steps and epochs contradict each other"
    assert sound_part(TURNED, Recipe()) is TURNED
