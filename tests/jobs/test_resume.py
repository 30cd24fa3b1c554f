"""Stop, resume, checkpoints: what is continued equals what was never interrupted, and only whole checkpoints count."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.train import between, checkpoint, loop
from studio.probe.data import read_data, row_keys
from studio.probe.resume import check_resume
from studio.runs.checkpoints import complete_checkpoints, damage_of, step_of
from studio.runs.control import leave_request, request, requested, withdraw_all
from studio.runs.held_out import read_record
from studio.runs.history import History
from studio.runs.job import read_job, write_job
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.summary import summary_of
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

    def acting(self: between.Between, progress: checkpoint.TrainState) -> bool:
        if progress.step == step:
            monkeypatch.setattr(between.Between, "after_step", after_step)
            act(self)
        return after_step(self, progress)

    monkeypatch.setattr(between.Between, "after_step", acting)


def test_resumed_equals_uninterrupted(train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other methods and optimizers the same is seen where they are killed: tests/faults/test_kills.py."""
    recipe = recipe.with_("method", "qlora")
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
        raise KeyboardInterrupt  # which ends it at once: nothing more is saved

    whole = train(recipe)
    at_step(monkeypatch, 5, crash)
    parts = train(recipe)
    assert run_status(parts) is Status.failed
    train(recipe, again=parts)
    seen = history_of(parts)
    assert seen.started is not None
    assert seen.started.resumed_from == 4
    assert list(seen.train.losses) == list(history_of(whole).train.losses)


@pytest.mark.parametrize("where", ["_loss_of", "after_step"])
def test_an_error_leaves_the_last_whole_step_saved(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = train(recipe)
    loss_of, micro_batches = loop._loss_of, [0]

    def failing(*args: Any) -> torch.Tensor:
        micro_batches[0] += 1
        if micro_batches[0] == 10:  # the second of step 5: half of its gradient is there
            raise RuntimeError("a fault of a library")
        return loss_of(*args)

    def fail(self: between.Between) -> None:
        raise RuntimeError("a fault of a library")

    with monkeypatch.context() as patch:
        if where == "_loss_of":
            patch.setattr(loop, "_loss_of", failing)
        else:
            at_step(patch, 4, fail)
        parts = train(recipe)
    failed = history_of(parts).failed
    assert failed is not None
    assert "a fault of a library" in failed.message
    train(recipe, again=parts)
    seen = history_of(parts)
    assert seen.started is not None
    assert seen.started.resumed_from == 4
    assert list(seen.train.losses) == list(history_of(whole).train.losses), "dropout draws as if nothing had been"


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept(train: Train, recipe: Recipe) -> None:
    recipe = recipe.with_("train.checkpoint_every", 1).with_("train.keep_checkpoints", 1).with_("eval.every", 1)
    paths = train(recipe.with_("train.learning_rate", 0.3))
    history = history_of(paths)
    losses = {event.step: event.loss for event in history.evals if 0 < event.step < 8}
    best = min(losses, key=lambda step: (losses[step], step))
    assert summary_of(paths, history, Status.finished)["checkpoints"] == [
        {"step": step, "best": step == best} for step in sorted({best, 8})
    ]
    assert best < 7, "else it shows nothing"


def test_only_the_newest_checkpoints_are_kept(train: Train, recipe: Recipe) -> None:
    recipe = recipe.with_("eval.rows", 0).with_("eval.samples", 0)
    paths = train(recipe.with_("train.checkpoint_every", 1).with_("train.keep_checkpoints", 3))
    assert [path.name for path in complete_checkpoints(paths.checkpoints)] == [f"step-{n:08d}" for n in (6, 7, 8)]


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
    assert sorted(path.name for path in paths.checkpoints.iterdir()) == ["step-00000006", "step-00000008"]


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
    folder = complete_checkpoints(paths.checkpoints)[0]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    marker = json.loads((folder / "complete.json").read_text())
    assert set(marker["files"]) == {path.name for path in folder.iterdir()} - {"complete.json"}


OTHER_ROWS = [
    json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
    for asked, told in (("seven", "siete"), ("eight", "ocho"), ("nine", "nueve"))
]


@pytest.fixture
def stopped(train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> RunPaths:
    """A run on a base of its own that was stopped after step 3 and has a checkpoint of step 2 too."""
    shutil.copytree(tiny, tmp_path / "base")
    at_step(monkeypatch, 3, lambda self: request(self.worker.paths, "stop"))
    paths = train(recipe.with_("model.base", str(tmp_path / "base")).with_("train.checkpoint_every", 2))
    assert [path.name for path in complete_checkpoints(paths.checkpoints)] == ["step-00000002", "step-00000003"]
    withdraw_all(paths)
    return paths


def again(train: Train, paths: RunPaths, **changes: object) -> History:
    """Go on with a run, its recipe.toml edited where something is to be changed."""
    job = read_job(paths, Recipe)
    assert isinstance(job, Recipe)
    for path, value in changes.items():
        job = job.with_(path.replace("__", "."), value)
    write_job(paths, job)
    train(job, again=paths)
    return history_of(paths)


def refused(history: History) -> str:
    assert history.failed is not None, "it went on"
    assert history.failed.failure == "bad_input"
    return history.failed.message


def replace_tensors(base: Path, count: int) -> list[str]:
    """Give some of a base's tensors other numbers, and the file its old time."""
    path = base / "model.safetensors"
    seen = path.stat()
    tensors = load_file(path)
    names = sorted(tensors)[:count]
    for name in names:
        tensors[name] = tensors[name] + 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    return names


def test_another_base_is_refused_and_told_tensor_by_tensor(train: Train, stopped: RunPaths, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "base", saved)
    names = replace_tensors(tmp_path / "base", 2)
    said = refused(again(train, stopped))
    assert f"2 of its {len(load_file(saved / 'model.safetensors'))} tensors hold other numbers" in said
    assert all(name in said for name in names)
    # The same base at another place goes on: nothing of the refused attempt is in the way.
    history = again(train, stopped, model__base=str(saved))
    assert history.finished is not None, history.failed
    assert history.finished.outcome == "done"
    assert history.started is not None
    assert history.started.resumed_from == 3


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda base: edit_json(base / "config.json", rope_theta=5.0), "config.json (rope_"),
        (lambda base: edit_json(base / "tokenizer_config.json", chat_template="{{ 1 }}"), "tokenizer_config.json"),
        (lambda base: (base / "chat_template.jinja").write_text("{{ messages }}"), "chat_template.jinja"),
    ],
)
def test_another_config_tokenizer_or_template_is_refused_by_name(
    train: Train, stopped: RunPaths, tmp_path: Path, edit: Callable[[Path], object], said: str
) -> None:
    edit(tmp_path / "base")
    message = refused(again(train, stopped))
    assert said in message
    assert "tensors" not in message


def test_other_rows_are_refused_and_told(train: Train, stopped: RunPaths, data: Path) -> None:
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:-1], lines[-1].replace("seis", "SEIS")]))
    said = refused(again(train, stopped))
    assert "rows are not those that it began with" in said
    data.write_text("\n".join(reversed(lines)))
    assert "in another order" in refused(again(train, stopped))
    moved = data.with_name("moved.jsonl")
    moved.write_text("\n".join(lines) + "\n")
    assert again(train, stopped, data__path=str(moved)).finished is not None


@pytest.mark.parametrize("own_file", [False, True])
def test_who_resumes_and_the_job_take_the_same_rows(
    train: Train, recipe: Recipe, data: Path, monkeypatch: pytest.MonkeyPatch, own_file: bool
) -> None:
    """Also where rows of `data.eval_path` are left out because they are trained on."""
    lines = data.read_text().splitlines()
    held_out = data.with_name("held_out.jsonl")
    held_out.write_text("\n".join([lines[0], *OTHER_ROWS]))
    at_step(monkeypatch, 3, lambda self: request(self.worker.paths, "stop"))
    paths = train(recipe.with_("data.eval_path", str(held_out)) if own_file else recipe)
    job = read_job(paths, Recipe)
    assert isinstance(job, Recipe)
    check_resume(paths, job)
    target = held_out if own_file else data
    chosen = read_record(paths).held_out if own_file else ()
    at = next((row.number - 1 for row in read_data(target).rows if row_keys(row).content.hex() in chosen), 1)
    kept = target.read_text().splitlines()
    del kept[at]
    target.write_text("\n".join(kept))
    with pytest.raises(BadInput, match="rows are not those that it began with"):
        check_resume(paths, job)


@pytest.mark.slow
def test_a_recipe_that_trains_something_else_is_refused_and_others_go_on(train: Train, stopped: RunPaths) -> None:
    said = refused(again(train, stopped, train__learning_rate=0.1, adapter__alpha=3.0))
    assert "train.learning_rate: 0.005 -> 0.1" in said
    assert "adapter.alpha: 8.0 -> 3.0" in said
    again_at_first = {"train__learning_rate": 5e-3, "adapter__alpha": 8.0}
    said = refused(again(train, stopped, **again_at_first, train__micro_batch=1))
    assert "rows of a step (train.micro_batch x train.accumulation): 4 -> 2" in said
    free = {"train__micro_batch": 1, "train__accumulation": 4, "eval__every": 0, "train__checkpoint_every": 0}
    history = again(train, stopped, **free)
    assert history.finished is not None, history.failed
    (warning,) = [one.message for one in history.warnings if one.topic == "resume"]
    assert "train.micro_batch: 2 -> 1" in warning
    assert "not bit by bit" in warning


def test_other_libraries_are_named_and_do_not_keep_a_run_from_going_on(
    train: Train, stopped: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.jobs.train import job

    real = job.version
    monkeypatch.setattr(job, "version", lambda name: "99.0" if name == "peft" else real(name))
    history = again(train, stopped)
    assert history.finished is not None
    (warning,) = [one.message for one in history.warnings if one.topic == "resume"]
    assert f"peft {real('peft')} -> 99.0" in warning
    assert "torch" not in warning


def test_a_run_that_does_not_say_what_it_was_made_from_is_refused(train: Train, stopped: RunPaths) -> None:
    lines = [line for line in stopped.events.read_text().splitlines() if '"Identified"' not in line]
    stopped.events.write_text("\n".join(lines) + "\n")
    assert "does not say what it was made from" in refused(again(train, stopped))


@pytest.mark.parametrize(
    "damage",
    [
        damage_marker,
        damage_weights,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (damage_length, damage_json)),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, stopped: RunPaths, damage: Callable[[Path], None]
) -> None:
    newest = stopped.checkpoints / "step-00000003"
    assert damage_of(newest) == ""
    damage(newest)
    why = damage_of(newest)
    assert why
    history = again(train, stopped, train__checkpoint_every=1)
    assert history.finished is not None
    assert history.started is not None
    assert history.started.resumed_from == 2
    (warning,) = [one.message for one in history.warnings if one.topic == "checkpoint"]
    assert f"step 3 ({why})" in warning
    assert "going on after step 2" in warning
    # It is out of the way of the new ones, whose number is bounded, and still there.
    assert [path.name for path in complete_checkpoints(stopped.checkpoints)] == [
        f"step-0000000{step}"
        for step in (6, 7, 8)  # of step 6 the held-out loss is known
    ]
    assert (stopped.checkpoints / "damaged-step-00000003").is_dir()


def test_starting_over_with_every_checkpoint_damaged_wants_a_yes(train: Train, stopped: RunPaths) -> None:
    for folder in complete_checkpoints(stopped.checkpoints):
        damage_weights(folder)
    before = history_of(stopped)
    history = again(train, stopped)
    said = refused(history)
    assert "step 3 (adapter.safetensors is not what was saved), step 2 (" in said
    assert f"runs resume {stopped.name} --from-start" in said
    assert list(history.train.losses) == list(before.train.losses)
    assert len(list(stopped.checkpoints.glob("step-*"))) == 2
    request(stopped, "from-start")
    history = again(train, stopped)
    assert history.finished is not None
    assert history.started is not None
    assert history.started.resumed_from == 0
    assert list(history.train.steps) == list(range(1, 9))
    assert not requested(stopped, "from-start")
    assert any("starting over at step 0, as was asked for" in one.message for one in history.warnings)
    assert len(list(stopped.checkpoints.glob("damaged-step-*"))) == 2


def test_checkpoints_that_are_gone_want_a_yes_too(train: Train, stopped: RunPaths) -> None:
    shutil.rmtree(stopped.checkpoints)
    assert "saved a checkpoint after step 3, and none is left" in refused(again(train, stopped))
    assert "saved a checkpoint after step 3, and none is left" in refused(again(train, stopped))


def test_a_yes_does_not_throw_a_whole_checkpoint_away(train: Train, stopped: RunPaths) -> None:
    request(stopped, "from-start")
    assert "has a whole checkpoint after step 3" in refused(again(train, stopped))
    withdraw_all(stopped)
    assert again(train, stopped).finished is not None


def test_a_finished_run_goes_back_to_a_named_checkpoint_and_ends_as_before(train: Train, recipe: Recipe) -> None:
    paths = train(recipe.with_("train.checkpoint_every", 2).with_("train.keep_checkpoints", 4))
    before, made = history_of(paths), weights(paths)
    assert [step_of(path) for path in complete_checkpoints(paths.checkpoints)] == [2, 4, 6, 8]
    leave_request(paths, "from-checkpoint", "4")
    history = again(train, paths)
    assert history.started is not None
    assert history.started.resumed_from == 4
    assert not requested(paths, "from-checkpoint")
    assert [one.message for one in history.warnings if one.topic == "checkpoint"] == [
        "going back to step 4, as was asked for; kept beside it: checkpoints of step 6, 8"
    ]
    assert (paths.checkpoints / "later-step-00000006").is_dir()
    assert list(history.train.losses) == list(before.train.losses)
    for name, weight in made.items():
        assert torch.equal(weights(paths)[name], weight), name


def test_a_loss_that_is_no_number_names_the_checkpoint_from_before(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: between.Between) -> None:
        for parameter in self.step_model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(torch.nan)

    at_step(monkeypatch, 5, spoil)
    paths = train(recipe.with_("train.checkpoint_every", 2))
    failed = history_of(paths).failed
    assert failed is not None
    assert failed.failure == "nonfinite_loss"
    assert failed.advice.endswith(f"to go back to it: lora-studio runs resume {paths.name} --checkpoint 4")


def test_a_run_that_ended_before_its_first_checkpoint_starts_over_and_says_so(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: between.Between) -> None:
        raise KeyboardInterrupt  # which ends it at once: nothing more is saved

    at_step(monkeypatch, 2, crash)
    paths = train(recipe)
    assert run_status(paths) is Status.failed
    history = again(train, paths)
    assert history.finished is not None
    assert list(history.train.steps) == list(range(1, 9))
    assert any("no checkpoint was saved before the run ended after step 2" in one.message for one in history.warnings)


def test_reading_the_base_is_told_and_a_stop_ends_it(
    train: Train, recipe: Recipe, stopped: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.jobs.base import progress

    real = progress.fingerprint

    def asking(folder: Path, tell: Callable[[float], None]) -> dict[str, object]:
        tell(0.5)
        request(stopped, "stop")
        tell(0.6)
        return real(folder, tell)

    monkeypatch.setattr(progress, "fingerprint", asking)
    history = again(train, stopped)
    assert run_status(stopped) is Status.stopped
    assert history.finished is not None
    assert history.finished.step == 3
    assert history.phase is not None
    assert (history.phase.name, history.phase.fraction) == (progress.READING, 0.5)
    monkeypatch.setattr(progress, "fingerprint", real)
    withdraw_all(stopped)
    assert again(train, stopped).finished.outcome == "done"  # type: ignore[union-attr]
