"""Stop, resume, checkpoints: what is continued equals what was never interrupted, and only whole checkpoints count."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from studio.core.recipe import Recipe
from studio.jobs.train import between, checkpoint
from studio.jobs.train.checkpoint import complete_checkpoints, newest_valid
from studio.runs.control import request, requested, withdraw_all
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from tests.jobs.conftest import Train, history_of


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    """Dropout, accumulation and a rate that changes every step: everything that a resume could get wrong."""
    return (
        recipe.with_("train.steps", 8)
        .with_("train.accumulation", 2)
        .with_("train.schedule", "cosine")
        .with_("adapter.dropout", 0.2)
        .with_("eval.rows", 1)
        .with_("eval.every", 3)
        .with_("eval.samples", 1)
        .with_("eval.sample_tokens", 3)
    )


def weights(paths: RunPaths) -> dict[str, torch.Tensor]:
    return load_file(paths.adapter / "adapter_model.safetensors")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[between.Between], None]) -> None:
    """Do something between two steps of the next run, once."""
    after_step = between.Between.after_step

    def acting(self: between.Between, progress: checkpoint.Progress) -> bool:
        if progress.step == step:
            monkeypatch.setattr(between.Between, "after_step", after_step)
            act(self)
        return after_step(self, progress)

    monkeypatch.setattr(between.Between, "after_step", acting)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_resumed_equals_uninterrupted(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, method: str, optimizer: str
) -> None:
    recipe = recipe.with_("method", method).with_("train.optimizer", optimizer)
    whole = train(recipe)
    at_step(monkeypatch, 3, lambda self: request(self.worker.paths, "stop"))
    parts = train(recipe)
    assert run_status(parts) is Status.stopped
    assert list(history_of(parts).train.steps) == [1, 2, 3]
    withdraw_all(parts)
    train(recipe, again=parts)
    seen, wanted = history_of(parts), history_of(whole)
    assert seen.started is not None
    assert seen.started.resumed_from == 3
    assert list(seen.train.steps) == list(range(1, 9))
    assert list(seen.train.losses) == list(wanted.train.losses)
    assert list(seen.train.grad_norms) == list(wanted.train.grad_norms)
    assert list(seen.train.lrs) == list(wanted.train.lrs)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight), name


def test_resume_after_a_crash_repeats_only_what_the_checkpoint_lacks(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.with_("train.checkpoint_every", 2)

    def crash(self: between.Between) -> None:
        raise RuntimeError("power cut")

    whole = train(recipe)
    at_step(monkeypatch, 5, crash)
    parts = train(recipe)
    assert run_status(parts) is Status.failed
    train(recipe, again=parts)
    seen = history_of(parts)
    assert seen.started is not None
    assert seen.started.resumed_from == 4
    assert list(seen.train.losses) == list(history_of(whole).train.losses)


def test_only_the_newest_checkpoints_are_kept(train: Train, recipe: Recipe) -> None:
    paths = train(recipe.with_("train.checkpoint_every", 1).with_("train.keep_checkpoints", 3))
    assert [path.name for path in complete_checkpoints(paths.checkpoints)] == [f"step-{n:08d}" for n in (5, 6, 7)]


def damage_marker(folder: Path) -> None:
    (folder / "complete.json").unlink()


def damage_weights(folder: Path) -> None:
    with (folder / "adapter.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")


def damage_length(folder: Path) -> None:
    os.truncate(folder / "optimizer.safetensors", 100)


def damage_json(folder: Path) -> None:
    (folder / "complete.json").write_text("[]")


@pytest.mark.parametrize("damage", [damage_marker, damage_weights, damage_length, damage_json])
def test_a_damaged_checkpoint_is_passed_over(train: Train, recipe: Recipe, damage: Callable[[Path], None]) -> None:
    paths = train(recipe.with_("train.checkpoint_every", 2))
    newest = paths.checkpoints / "step-00000006"
    assert newest_valid(paths.checkpoints) == newest
    damage(newest)
    assert newest_valid(paths.checkpoints) == paths.checkpoints / "step-00000004"


def test_a_checkpoint_that_cannot_be_written_costs_itself_not_the_run(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save_file
    calls: list[object] = []

    def full_once(tensors: object, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_once)
    paths = train(recipe.with_("train.checkpoint_every", 3))
    history = history_of(paths)
    assert history.finished is not None
    assert [warning.topic for warning in history.warnings] == ["checkpoint"]
    assert [path.name for path in paths.checkpoints.iterdir()] == ["step-00000006"]


def test_an_adapter_that_finds_no_room_waits_for_it(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, naps = between.save_adapter, []

    def full_twice(*args: object) -> int:
        if len(naps) < 2:
            raise OSError(28, "No space left on device")
        return save(*args)

    monkeypatch.setattr(between, "save_adapter", full_twice)
    at_step(monkeypatch, 1, lambda self: setattr(self.worker, "sleep", naps.append))
    paths = train(recipe)
    history = history_of(paths)
    assert naps
    assert history.finished is not None
    assert [warning.topic for warning in history.warnings] == ["disk"]
    assert weights(paths)


def test_stopped_before_the_first_step(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "early")
    paths.root.mkdir()
    write_job(paths, recipe)
    request(paths, "stop")
    train(recipe, again=paths)
    assert run_status(paths) is Status.stopped
    assert not paths.adapter.exists()


def test_a_stop_is_heeded_while_the_data_are_read(
    train: Train, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.jobs.train import job

    paths = RunPaths(tmp_path / "early")
    paths.root.mkdir()
    write_job(paths, recipe)
    request(paths, "stop")
    monkeypatch.setattr(job, "trainable_model", lambda *called, **more: pytest.fail("the stop was not heeded"))
    train(recipe, again=paths)
    finished = history_of(paths).finished
    assert finished is not None
    assert finished.outcome == "stopped"
    assert run_status(paths) is Status.stopped


def test_pause_waits_and_goes_on(train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    def pause(self: between.Between) -> None:
        request(self.worker.paths, "pause")

        def nap(seconds: float) -> None:
            assert run_status(self.worker.paths) is Status.paused
            naps.append(seconds)
            if len(naps) == 3:
                withdraw_all(self.worker.paths)

        self.sleep = nap

    at_step(monkeypatch, 2, pause)
    paths = train(recipe)
    assert len(naps) == 3
    assert history_of(paths).finished is not None


def test_checkpoint_now_is_served_and_withdrawn(train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 2, lambda self: request(self.worker.paths, "checkpoint-now"))
    paths = train(recipe)
    assert not requested(paths, "checkpoint-now")
    assert ("checkpoint", 2) in [(saved.what, saved.step) for saved in history_of(paths).saved]


def test_checkpoints_hold_no_pickle(train: Train, recipe: Recipe) -> None:
    paths = train(recipe.with_("train.checkpoint_every", 4))
    (folder,) = complete_checkpoints(paths.checkpoints)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    marker = json.loads((folder / "complete.json").read_text())
    assert set(marker["files"]) == {path.name for path in folder.iterdir()} - {"complete.json"}
