"""Workers that are killed within a save: of a checkpoint, an adapter, a line, a merge, an export, the queue's order."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.launch.queued import relaunch_waiting
from studio.runs.checkpoints import checkpoint_folders, complete_checkpoints, damage_of, outdated
from studio.runs.layout import RunPaths
from studio.runs.queue import Queue
from studio.runs.requests import ExportRequest
from studio.runs.status import Status, run_status
from tests.fakes.runs import wait_for
from tests.faults.conftest import Kit, Outcome, files_of, shown
from tests.faults.table import Fault

pytestmark = pytest.mark.slow
Begin = Callable[..., Fault]

SAVES = {
    "a checkpoint's folder": r"file:1:^/checkpoints/\.writing-step-00000004",
    "a checkpoint's marker": r"file:2:^/checkpoints/\.writing-step-0+\d/complete\.json",
    "a checkpoint's name": "file:1:^/checkpoints/step-00000004$",
    "the removal of an old checkpoint": "file:2:^/checkpoints/step-00000002$",
    "the end of that removal": "file:3:^/checkpoints/step-00000002$",
    "an adapter's config": r"file:1:^/\.writing-adapter/adapter_config",
    "an adapter's tokenizer": r"file:1:^/\.writing-adapter/tokenizer_config",
    "an adapter's name": "file:1:^/adapter$",
    "what is remembered of the held-out rows": "file:1:held_out.json",
    "the run's identity": "file:1:identity.json",
    "who the worker is": "file:1:process.json",
    "the log's first line": "file:1:events.jsonl",
    "the log between two steps": "step:5",
}


@pytest.mark.parametrize("save", SAVES)
def test_killed_within_a_save_a_training_equals_one_that_was_not(kit: Kit, fault: Begin, save: str) -> None:
    row = fault(f"kill -9 while saving {save}", f"stopped at {SAVES[save]}, then killed")
    whole = kit.whole("LoRA fp32")
    paths = kit.new()
    killed(kit, paths, row, hold=SAVES[save])
    assert not any(damage_of(folder) for folder in complete_checkpoints(paths.checkpoints))
    assert kit.finish(paths) == whole
    assert not list(paths.root.glob("**/.*writing*"))
    whole_ones = complete_checkpoints(paths.checkpoints)
    left = [folder for folder in checkpoint_folders(paths.checkpoints) if folder not in whole_ones]
    assert left == outdated(paths.checkpoints, 2), "what no later save would remove"
    row.ended, row.others = "resumed, equal to the uninterrupted run", kit.kept()


def killed(kit: Kit, paths: RunPaths, row: Fault, module: str = "studio.jobs.train", **settings: str | Path) -> None:
    """Kill a run's worker at its moment, and see that it is shown."""
    process = kit.held(kit.start(paths, module, **settings))
    process.kill()
    began = time.monotonic()
    process.wait()
    shown(row, paths, Status.crashed, began)


MERGES = {
    "the scratch folder of a merge": "file:1:merging",
    "the shards of a merge": r"file:1:model.*safetensors",
    "the config of a merge": r"file:1:config\.json",
    "the name of a merge": "file:1:^/made$",
}


@pytest.mark.parametrize("save", MERGES)
def test_killed_within_a_save_a_merge_equals_one_that_was_not(kit: Kit, fault: Begin, save: str) -> None:
    row = fault(f"kill -9 while saving {save}", f"stopped at {MERGES[save]}, then killed")
    out = kit.user / "out"
    out.mkdir()
    paths = kit.new(kit.merged(out / "made"), name="merge")
    killed(kit, paths, row, "studio.jobs.merge", hold=MERGES[save], below=out)
    assert not (out / "made").exists()
    _same_output(kit, "studio.jobs.merge", paths, kit.new(kit.merged(kit.user / "plain" / "made"), name="merge"))
    row.ended, row.others = "resumed, every file equal to the uninterrupted merge's", kit.kept()


EXPORTS = {
    "the scratch folder of an export": "file:2:writing-made$",
    "the config of an export": r"file:1:config\.json",
    "the name of an export": "file:1:^/made$",
}


@pytest.mark.parametrize("save", EXPORTS)
def test_killed_within_a_save_an_export_equals_one_that_was_not(kit: Kit, fault: Begin, save: str) -> None:
    row = fault(f"kill -9 while saving {save}", f"stopped at {EXPORTS[save]}, then killed")
    out = kit.user / "out"
    out.mkdir()
    paths = kit.new(ExportRequest(str(kit.model), str(out / "made"), "nf4"), name="export")
    killed(kit, paths, row, "studio.jobs.export", hold=EXPORTS[save], below=out)
    assert not (out / "made").exists()
    plain = kit.new(ExportRequest(str(kit.model), str(kit.user / "plain" / "made"), "nf4"), name="export")
    _same_output(kit, "studio.jobs.export", paths, plain)
    row.ended, row.others = "resumed, every file equal to the uninterrupted export's", kit.kept()


def _same_output(kit: Kit, module: str, *runs: RunPaths) -> None:
    for paths in runs:
        assert kit.start(paths, module).wait() == 0, paths.output.read_text()[-3000:]
    (made,) = (kit.user / "out").iterdir()
    assert files_of(made) == files_of(kit.user / "plain" / "made")


def _waiting(kit: Kit, name: str) -> RunPaths:
    paths = kit.new(kit.recipe("LoRA fp32"), name=name)
    kit.join(paths)
    return paths


def test_killed_within_a_save_of_the_queues_order_nobody_loses_a_place(kit: Kit, fault: Begin) -> None:
    row = fault(
        "kill -9 while saving the queue's order", "the first of two that wait, stopped at order.json with its lock"
    )
    whole = kit.whole("LoRA fp32")
    first, second = _waiting(kit, "first"), _waiting(kit, "second")
    killed(kit, first, row, hold="file:1:order", below=kit.home / "queue")
    assert [entry.run for entry in Queue().waiting()] == [first, second]
    began = time.monotonic()
    process = kit.start(second)
    assert process.wait() == 0
    assert time.monotonic() - began < 60, "a dead process's lock held the queue"
    started, refused = relaunch_waiting(popen=kit.warm.popen)
    assert (started, refused) == ([first], [])
    wait_for(lambda: run_status(first) is Status.finished)
    assert Outcome(first) == Outcome(second) == whole
    row.ended, row.others = "the second had its turn, the first came back by queue resume; both equal", kit.kept()
