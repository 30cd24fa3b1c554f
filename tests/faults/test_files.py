"""A killed run whose files are torn, flipped, missing or foreign, and a damaged adapter."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import StudioError
from studio.launch.start import resume
from studio.probe.merge import check_merge
from studio.runs.layout import RunPaths
from studio.runs.status import Status
from studio.runs.watch import read_history
from tests.faults.conftest import Kit, Outcome, resumed, shown
from tests.faults.table import Fault

pytestmark = pytest.mark.slow
Begin = Callable[..., Fault]
EQUAL = "resumed, equal to the uninterrupted run"


def torn(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 0x10
    file.write_bytes(content)


def missing(file: Path) -> None:
    file.unlink()


def foreign(file: Path) -> None:
    file.write_bytes(b"\x00\xff\x1b[31m not one of ours \xfe" * 50)


DAMAGES = (torn, flipped, missing, foreign)
NEWEST = "checkpoints/step-00000004"
HARMLESS = [
    (f"{NEWEST}/adapter.safetensors", DAMAGES),
    (f"{NEWEST}/optimizer.safetensors", (torn, flipped)),
    (f"{NEWEST}/state.json", (foreign,)),
    (f"{NEWEST}/complete.json", (torn, missing)),
    ("process.json", (torn, foreign, missing)),
    ("launch.json", (foreign,)),
    ("plan.json", (foreign,)),
    ("worker.lock", (missing,)),
]
REFUSED = [
    ("recipe.toml", DAMAGES),
    ("identity.json", (foreign, missing)),
    ("held_out.json", (foreign, missing)),
]


def _cases(table: list[tuple[str, Any]]) -> list[Any]:
    return [pytest.param(name, damage, id=f"{damage.__name__} {name}") for name, damages in table for damage in damages]


def _resume(kit: Kit, paths: RunPaths) -> None:
    assert resume(paths, popen=kit.warm.popen).process.wait() == 0, read_history(paths).failed


@pytest.mark.parametrize(("name", "damage"), _cases(HARMLESS))
def test_a_damaged_file_that_a_resume_can_do_without(
    kit: Kit, fault: Begin, crashed: RunPaths, name: str, damage: Callable[[Path], None]
) -> None:
    row = fault(
        f"{damage.__name__} {Path(name).name}, {Path(name).parent.name or 'run'}", "in a run killed after step 5"
    )
    whole = kit.whole("LoRA fp32")
    if (crashed.root / name).exists() or damage is foreign:
        damage(crashed.root / name)
    shown(row, crashed, Status.crashed, time.monotonic())
    before = len(read_history(crashed).warnings)
    resumed(kit, crashed)
    row.told = "; ".join([row.told, *(warning.message for warning in read_history(crashed).warnings[before:])])
    assert Outcome(crashed) == whole
    row.ended, row.others = EQUAL, kit.kept()


@pytest.mark.parametrize(("name", "damage"), _cases(REFUSED))
def test_a_damaged_file_that_a_resume_needs(
    kit: Kit, fault: Begin, crashed: RunPaths, name: str, damage: Callable[[Path], None]
) -> None:
    row = fault(f"{damage.__name__} {name}, run", "in a run killed after step 5")
    whole, good = kit.whole("LoRA fp32"), (crashed.root / name).read_bytes()
    damage(crashed.root / name)
    began = time.monotonic()
    try:
        process = resume(crashed, popen=kit.warm.popen).process
        code, refusal = process.wait(), ""
    except StudioError as error:
        code, refusal = 1, str(error)
    row.shown_seconds = time.monotonic() - began
    if code == 0:
        assert Outcome(crashed) == whole
        warnings = [warning.message for warning in read_history(crashed).warnings]
        row.told, row.ended = "; ".join(warnings), EQUAL
        assert f"lost or damaged, and written anew: {name}." in row.told
    else:
        failed = read_history(crashed).failed
        row.told = refusal or (failed.message if failed else "")
        assert row.told and "Traceback" not in row.told and getattr(failed, "failure", "") != "error"
        (crashed.root / name).write_bytes(good)
        resumed(kit, crashed)
        assert Outcome(crashed) == whole
        row.ended = f"refused with the reason; put back: {EQUAL}"
    row.others = kit.kept()


def _log_torn(paths: RunPaths) -> None:
    with paths.events.open("ab") as log:
        log.write(b'{"kind": "step_done", "at": 1.0, "st')


def _log_noise(paths: RunPaths) -> None:
    with paths.events.open("ab") as log:
        log.write(b"\x00" * 4096 + b"\n[1, 2]\n" + b"\xff\xfe\x1b]0;x\x07" * 99 + b"\n")


def _log_missing(paths: RunPaths) -> None:
    paths.events.unlink()


def _log_foreign(paths: RunPaths) -> None:
    paths.events.write_text(json.dumps({"kind": "planet", "at": "soon"}) + "\n")


@pytest.mark.parametrize("damage", [_log_torn, _log_noise, _log_missing, _log_foreign], ids=lambda d: d.__name__[1:])
def test_a_damaged_log(kit: Kit, fault: Begin, crashed: RunPaths, damage: Callable[[RunPaths], None]) -> None:
    row = fault(f"{damage.__name__.removeprefix('_log_')} events.jsonl, run", "in a run killed after step 5")
    whole = kit.whole("LoRA fp32")
    good = crashed.events.read_bytes()
    damage(crashed)
    shown(row, crashed, Status.crashed, time.monotonic())
    if damage in (_log_missing, _log_foreign):  # the run's first start is in it
        began = time.monotonic()
        assert resume(crashed, popen=kit.warm.popen).process.wait() == 1
        shown(row, crashed, Status.failed, began)
        crashed.events.write_bytes(good)
        row.ended = "refused with the reason; put back: "
    resumed(kit, crashed)
    assert Outcome(crashed) == whole
    row.ended, row.others = row.ended + EQUAL, kit.kept()


def test_every_checkpoint_is_damaged(kit: Kit, fault: Begin, crashed: RunPaths) -> None:
    row = fault("flipped checkpoints, all", "in a run killed after step 5")
    whole = kit.whole("LoRA fp32")
    for folder in crashed.checkpoints.iterdir():
        flipped(folder / "adapter.safetensors")
    with pytest.raises(StudioError, match="every checkpoint") as refused:
        resume(crashed, popen=kit.warm.popen)
    row.told = str(refused.value)
    assert resume(crashed, from_start=True, popen=kit.warm.popen).process.wait() == 0
    assert Outcome(crashed) == whole
    row.ended, row.others = "refused with the reason; by --from-start equal to the uninterrupted run", kit.kept()


def test_a_checkpoint_of_another_run(kit: Kit, fault: Begin, crashed: RunPaths) -> None:
    row = fault("foreign checkpoint, of another rank", "a whole checkpoint of step 6 of another run, copied in")
    whole = kit.whole("LoRA fp32")
    other = kit.new(kit.recipe("LoRA fp32", **{"adapter.rank": 8}))
    kit.finish(other)
    shutil.copytree(other.checkpoints / "step-00000006", crashed.checkpoints / "step-00000006")
    process = resume(crashed, popen=kit.warm.popen).process
    began = time.monotonic()
    if process.wait() == 0:
        row.told = "; ".join(warning.message for warning in read_history(crashed).warnings)
    else:
        shown(row, crashed, Status.failed, began)
        shutil.rmtree(crashed.checkpoints / "step-00000006")
        resumed(kit, crashed)
    assert Outcome(crashed) == whole
    row.ended, row.others = f"refused with the reason; taken away: {EQUAL}", kit.kept()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_adapter_is_not_merged(kit: Kit, fault: Begin, damage: Callable[[Path], None]) -> None:
    row = fault(f"{damage.__name__} adapter_model.safetensors, adapter", "in the folder that a merge is given")
    adapter = kit.adapter()
    damage(adapter / "adapter_model.safetensors")
    request = kit.merged(kit.user / "out" / "made")
    began = time.monotonic()
    try:
        check_merge(request)
    except StudioError as refused:
        row.told, row.shown_seconds = str(refused), time.monotonic() - began
    else:
        paths = kit.new(request, name="merge")
        if kit.start(paths, "studio.jobs.merge").wait() == 0:
            row.told, row.ended, row.others = "nothing", "merged", kit.kept()
            row.not_yet = "an adapter's files carry no checksums: a flipped bit that leaves a finite number is not seen"
            return
        shown(row, paths, Status.failed, began)
    assert not (kit.user / "out" / "made").exists()
    row.ended, row.others = "refused with the reason", kit.kept()


@pytest.mark.parametrize("what", ["base", "data"])
def test_base_or_data_changed_before_a_resume(
    kit: Kit, fault: Begin, crashed: RunPaths, what: str, tmp_path: Path
) -> None:
    row = fault(f"changed {what} before a resume", "one number of the weights, or one row, between kill and resume")
    whole = kit.whole("LoRA fp32")
    file = kit.user / "chats.jsonl"
    if what == "base":
        own = shutil.copytree(kit.model, tmp_path / "own")
        crashed = kit.new(kit.recipe("LoRA fp32", **{"model.base": str(own)}))
        process = kit.held(kit.start(crashed, hold="step:5"))
        process.kill()
        process.wait()
        file = own / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good.replace(b"say 3", b"say X") if what == "data" else good[:-2] + b"\x01\x3c")
    began = time.monotonic()
    try:
        assert resume(crashed, popen=kit.warm.popen).process.wait() == 1
        shown(row, crashed, Status.failed, began)
    except StudioError as refused:
        row.told, row.shown_seconds = str(refused), time.monotonic() - began
    file.write_bytes(good)
    resumed(kit, crashed)
    assert Outcome(crashed) == whole
    row.ended, row.others = f"refused with the reason; put back: {EQUAL}", kit.kept()
