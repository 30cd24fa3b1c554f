"""Which checkpoints are whole, what is wrong with the others, and where that lets a run go on."""

import json
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.events import Saved, Started, StepDone
from studio.runs.checkpoints import (
    MARKER,
    Damaged,
    NoWholeCheckpoint,
    Resumption,
    checkpoint_folders,
    complete_checkpoints,
    damage_of,
    file_stamp,
    healthy_before,
    keep_back,
    outdated,
    resumption,
    set_aside,
    step_of,
)
from studio.runs.history import History
from studio.runs.layout import RunPaths


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def checkpoint(paths: RunPaths, step: int) -> Path:
    """A checkpoint as training leaves it, of two small files."""
    folder = paths.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for name in ("adapter.safetensors", "state.json"):
        (folder / name).write_text(f"{name} {step}")
    files = {name: file_stamp(folder / name) for name in ("adapter.safetensors", "state.json")}
    (folder / MARKER).write_text(json.dumps({"step": step, "files": files}))
    return folder


def told(*saved: int, steps: int = 0) -> History:
    history = History()
    history.fold([Started(at=1.0, job="train")])
    history.fold([Saved(at=2.0, what="checkpoint", path=f"checkpoints/{step}", step=step) for step in saved])
    for step in range(1, steps + 1):
        history.fold([StepDone(at=2.0, step=step, loss=1.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0)])
    return history


def test_folders_are_those_named_as_steps(paths: RunPaths) -> None:
    made = [checkpoint(paths, step) for step in (20, 3, 100)]
    for name in ("step-", "step-new", ".writing-step-00000004", "damaged-step-00000005"):
        (paths.checkpoints / name).mkdir()
    (paths.checkpoints / "step-00000007").write_text("a file")
    assert checkpoint_folders(paths.checkpoints) == [made[1], made[0], made[2]]
    assert [step_of(folder) for folder in complete_checkpoints(paths.checkpoints)] == [3, 20, 100]
    assert checkpoint_folders(paths.root / "none") == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("adapter.safetensors", b"adapter.safetensors X", "adapter.safetensors is not what was saved"),
        ("adapter.safetensors", b"short", "adapter.safetensors has 5 bytes instead of 21"),
        ("state.json", None, "state.json is missing"),
        (MARKER, None, f"it has no {MARKER}"),
        (MARKER, b"[]", f"its {MARKER} is damaged"),
        (MARKER, b"\xff", f"its {MARKER} is damaged"),
        (MARKER, b'{"files": {}}', f"its {MARKER} is damaged"),
        (MARKER, b'{"files": {"../../passwd": {}}}', f"its {MARKER} is damaged"),
        (MARKER, b'{"files": {"state.json": 3}}', "state.json is not what was saved"),
    ],
)
def test_damage_is_told_in_words(paths: RunPaths, name: str, content: bytes | None, why: str) -> None:
    folder = checkpoint(paths, 5)
    assert damage_of(folder) == ""
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert damage_of(folder) == why


def test_only_some_files_can_be_verified(paths: RunPaths) -> None:
    folder = checkpoint(paths, 5)
    (folder / "state.json").write_text("other")
    assert damage_of(folder)
    assert damage_of(folder, ("adapter.safetensors", "initial.safetensors")) == ""
    assert damage_of(folder, ("initial.safetensors",))


def test_the_newest_whole_one_is_gone_on_from_and_newer_ones_are_named(paths: RunPaths) -> None:
    made = [checkpoint(paths, step) for step in (10, 20, 30)]
    (made[2] / MARKER).unlink()
    (made[1] / "state.json").unlink()
    found = resumption(paths, told(10, 20, 30, steps=33), from_start=False)
    assert (found.checkpoint, found.step, found.starts_over) == (made[0], 10, False)
    assert found.note == (
        f"damaged and passed over: checkpoint step 30 (it has no {MARKER}), step 20 (state.json is missing); going on "
        "after step 10"
    )


def test_without_a_whole_one_a_yes_is_wanted_and_nothing_changes(paths: RunPaths) -> None:
    (checkpoint(paths, 10) / MARKER).unlink()
    with pytest.raises(NoWholeCheckpoint, match=r"step 10 \(it has no .*--from-start") as caught:
        resumption(paths, told(10, steps=12), from_start=False)
    assert "--from-start" not in caught.value.found
    found = resumption(paths, told(10, steps=12), from_start=True)
    assert (found.checkpoint, found.step, found.starts_over) == (None, 0, True)
    assert "starting over at step 0, as was asked for" in found.note


def test_checkpoints_that_the_log_tells_of_and_nobody_finds_want_a_yes(paths: RunPaths) -> None:
    with pytest.raises(NoWholeCheckpoint, match="saved a checkpoint after step 20, and none is left"):
        resumption(paths, told(10, 20, steps=25), from_start=False)
    assert resumption(paths, told(10, 20, steps=25), from_start=True).note.startswith("no checkpoint is left")


def test_a_run_that_never_had_one_starts_over_by_itself_and_says_so(paths: RunPaths) -> None:
    assert "no checkpoint was saved before the run ended after step 7" in (
        resumption(paths, told(steps=7), from_start=False).note
    )
    assert resumption(paths, told(steps=7), from_start=True).step == 0
    assert resumption(paths, History(), from_start=False) == Resumption(None, (), 0, ())
    assert resumption(paths, History(), from_start=False).note == ""


def test_a_whole_checkpoint_is_not_thrown_away_by_a_yes(paths: RunPaths) -> None:
    checkpoint(paths, 10)
    with pytest.raises(BadInput, match="has a whole checkpoint after step 10: resume it without --from-start"):
        resumption(paths, told(10, steps=12), from_start=True)


def test_what_is_set_aside_is_kept_and_counts_no_more(paths: RunPaths) -> None:
    for _ in range(2):
        set_aside(Resumption(None, (Damaged(checkpoint(paths, 10), "broken"),), 10, (10,)))
    assert checkpoint_folders(paths.checkpoints) == []
    assert sorted(folder.name for folder in paths.checkpoints.iterdir()) == [
        "damaged-step-00000010",
        "damaged-step-00000010-2",
    ]


def test_a_checkpoint_that_is_named_is_gone_back_to_and_later_ones_are_kept(paths: RunPaths) -> None:
    made = [checkpoint(paths, step) for step in (10, 20, 30)]
    (made[2] / MARKER).unlink()
    found = resumption(paths, told(10, 20, 30, steps=33), from_start=False, step=10)
    assert (found.checkpoint, found.step, found.later, found.damaged) == (made[0], 10, (made[1], made[2]), ())
    assert found.note == "going back to step 10, as was asked for; kept beside it: checkpoints of step 20, 30"
    set_aside(found)
    assert checkpoint_folders(paths.checkpoints) == [made[0]]
    assert {folder.name[-3:] for folder in paths.checkpoints.glob("later-step-*")} == {"020", "030"}


def test_a_checkpoint_that_is_named_must_be_there_and_whole(paths: RunPaths) -> None:
    (checkpoint(paths, 10) / "state.json").unlink()
    checkpoint(paths, 20)
    with pytest.raises(BadInput, match=r"after the checkpoint of step 15: there is none\. Others: 10, 20"):
        resumption(paths, told(10, 20), from_start=False, step=15)
    with pytest.raises(BadInput, match=r"of step 10: state\.json is missing\. Others: 20"):
        resumption(paths, told(10, 20), from_start=False, step=10)


def test_the_healthy_checkpoint_is_older_than_the_weights_that_went_wrong(paths: RunPaths) -> None:
    made = [checkpoint(paths, step) for step in (10, 20)]
    (checkpoint(paths, 15) / MARKER).unlink()
    assert healthy_before(paths, 22) == made[1]
    assert healthy_before(paths, 21) == made[0]
    assert healthy_before(paths, 11) is None


def test_one_checkpoint_is_kept_back_at_a_time(paths: RunPaths) -> None:
    made = [checkpoint(paths, step) for step in (10, 20, 30, 40)]
    keep_back(made[0])
    assert outdated(paths.checkpoints, 1) == made[1:3]
    keep_back(made[1])
    assert outdated(paths.checkpoints, 1) == [made[0], made[2]]
    assert damage_of(made[1]) == ""
