"""Disks that are full or read-only, and memory that is refused or taken: at a moment that the worker has reached."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from studio.core.errors import StudioError
from studio.runs.job import Job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from studio.runs.status import Status, run_status
from studio.runs.watch import read_history
from tests.fakes.runs import wait_for
from tests.fakes.small_disk import Filler, small_disk
from tests.faults.conftest import Kit, Outcome, files_of, shown
from tests.faults.table import Fault
from tests.faults.warm import WarmProcess

pytestmark = pytest.mark.slow
Begin = Callable[..., Fault]
EQUAL = "equal to the undisturbed run"


@pytest.fixture
def disk(kit: Kit) -> Iterator[Path]:
    with small_disk(kit.root / "disk", "4m") as place:
        yield place


def go_on(process: WarmProcess) -> float:
    """Let a worker that holds go on, and return the moment."""
    process.send_signal(signal.SIGCONT)
    return time.monotonic()


def warned(paths: RunPaths, topic: str) -> str:
    """Wait for a warning and return its message."""
    wait_for(lambda: any(event.topic == topic for event in read_history(paths).warnings))
    return next(event.message for event in read_history(paths).warnings if event.topic == topic)


@pytest.mark.parametrize("save", ["saving a checkpoint", "saving the adapter"])
def test_a_full_disk_under_a_save_of_a_training(kit: Kit, fault: Begin, disk: Path, save: str) -> None:
    row = fault(f"full disk, {save}", "a tmpfs of 4 MiB, filled to the last byte from outside as the save begins")
    whole = kit.whole("LoRA fp32")
    paths, filler = kit.new(root=disk), Filler(disk)
    process = kit.held(kit.start(paths, hold=f"phase:{save}"))
    filler.fill()
    began = go_on(process)
    topic = "checkpoint" if "checkpoint" in save else "disk"
    row.told, row.shown_seconds = warned(paths, topic), time.monotonic() - began
    if topic == "disk":
        wait_for(lambda: run_status(paths) is Status.paused)
    filler.free()
    assert process.wait() == 0
    assert Outcome(paths) == whole
    row.ended, row.others = f"went on by itself when there was room; {EQUAL}", kit.kept()


def test_a_full_disk_under_the_log(kit: Kit, fault: Begin, disk: Path) -> None:
    row = fault("full disk, the log", "a tmpfs of 4 MiB, filled from outside after step 3")
    whole = kit.whole("LoRA fp32")
    # Without checkpoints, which would tell of the disk first; more steps than what the log's last page has room for.
    recipe = kit.recipe("LoRA fp32", **{"train.checkpoint_every": 0, "train.steps": 60})
    whole = kit.finish(kit.new(recipe))
    paths, filler = kit.new(recipe, root=disk), Filler(disk)
    process = kit.held(kit.start(paths, hold="step:3"))
    filler.fill()
    began = go_on(process)
    shown(row, paths, Status.paused, began)
    row.told = f"paused: {read_history(paths).paused_for}"
    filler.free()
    assert process.wait() == 0
    assert Outcome(paths) == whole
    row.ended, row.others = f"went on by itself when there was room, no line lost; {EQUAL}", kit.kept()


def job_of(kit: Kit, module: str, out: Path) -> tuple[str, Job]:
    job = kit.merged(out) if module == "merge" else ExportRequest(str(kit.model), str(out), "nf4")
    return f"studio.jobs.{module}", job


@pytest.mark.parametrize("what", ["merge", "export"])
def test_a_full_disk_under_what_is_made(kit: Kit, fault: Begin, what: str) -> None:
    with small_disk(kit.root / "disk", "300m") as disk:  # some room must be free at the start
        _full_under(
            kit, fault(f"full disk, {what}", "a tmpfs under the output, filled before its first file"), disk, what
        )


def _full_under(kit: Kit, row: Fault, disk: Path, what: str) -> None:
    module, job = job_of(kit, what, disk / "made")
    paths, filler = kit.new(job, name=what), Filler(disk)
    process = kit.held(kit.start(paths, module, hold=r"file:1:^/\.", below=disk))
    filler.fill()
    began = go_on(process)
    shown(row, paths, Status.failed, began)
    assert process.wait() == 1
    filler.free()
    assert not list(disk.glob("**/model*")), "something half-made is left"
    assert kit.start(paths, module).wait() == 0, read_history(paths).failed
    _, job = job_of(kit, what, kit.user / "made")
    assert kit.start(kit.new(job, name=what), module).wait() == 0
    assert files_of(disk / "made") == files_of(kit.user / "made")
    row.ended, row.others = "refused with the reason; resumed when there was room, every file equal", kit.kept()


def test_a_full_disk_under_the_queue(kit: Kit, fault: Begin) -> None:
    row = fault("full disk, the queue", "a tmpfs of 4 MiB under the queue's folder, filled when one run waits in it")
    whole = kit.whole("LoRA fp32")
    first, second = kit.new(name="first"), kit.new(name="second")
    shutil.rmtree(kit.home / "queue", ignore_errors=True)
    with small_disk(kit.home / "queue", "4m") as disk:
        kit.join(first)
        filler = Filler(disk)
        filler.fill()
        began = time.monotonic()
        with pytest.raises(StudioError, match="cannot be written"):
            kit.join(second)
        process = kit.start(first)
        row.told, row.shown_seconds = warned(first, "disk"), time.monotonic() - began
        assert run_status(first) is Status.queued
        filler.free()
        assert process.wait() == 0
        assert Outcome(first) == whole
    row.ended, row.others = f"the new one refused with the reason, the other kept its turn and was {EQUAL}", kit.kept()


def test_a_full_disk_under_a_new_run(kit: Kit, fault: Begin, disk: Path) -> None:
    from studio.launch.start import start

    row = fault("full disk, a new run", "a tmpfs of 4 MiB under the runs, filled before a launch")
    Filler(disk).fill()
    began = time.monotonic()
    with pytest.raises(StudioError) as refused:
        start(kit.recipe("LoRA fp32"), disk / "runs", popen=kit.warm.popen)
    row.told, row.shown_seconds = str(refused.value), time.monotonic() - began
    assert not list(disk.glob("runs/*"))
    row.ended, row.others = "refused with the reason, no folder left", kit.kept()


def test_a_full_disk_under_the_cache(kit: Kit, fault: Begin) -> None:
    row = fault("full disk, the cache", "a tmpfs of 4 MiB under the cache, filled before the start")
    whole = kit.whole("LoRA fp32")
    with small_disk(kit.home / "cache", "4m") as disk:
        Filler(disk).fill()
        paths = kit.new()
        assert kit.finish(paths) == whole
    row.told = (
        "; ".join(event.message for event in read_history(paths).warnings if "full" in event.message) or "nothing"
    )
    row.ended, row.others = f"went on without it; {EQUAL}", kit.kept()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let a folder be read-only for everybody, the superuser too, by a mount; skipped without the right to."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting a folder read-only needs root on Linux")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_read_only_checkpoints(kit: Kit, fault: Begin) -> None:
    row = fault("read-only, checkpoints", "the folder mounted read-only as a save begins")
    whole = kit.whole("LoRA fp32")
    paths = kit.new()
    process = kit.held(kit.start(paths, hold="phase:saving a checkpoint"))
    with read_only(paths.checkpoints):
        began = go_on(process)
        row.told, row.shown_seconds = warned(paths, "checkpoint"), time.monotonic() - began
        assert process.wait() == 0
    assert Outcome(paths) == whole
    row.ended, row.others = f"went on without checkpoints; {EQUAL}", kit.kept()


def test_a_read_only_run_folder_under_the_adapter(kit: Kit, fault: Begin) -> None:
    row = fault("read-only, the adapter", "the run's folder mounted read-only as the adapter is saved")
    whole = kit.whole("LoRA fp32")
    paths = kit.new()
    process = kit.held(kit.start(paths, hold="phase:saving the adapter"))
    with read_only(paths.root):
        began = go_on(process)
        row.told, row.shown_seconds = warned(paths, "disk"), time.monotonic() - began
        assert run_status(paths) is Status.paused
    assert process.wait() == 0
    assert Outcome(paths) == whole
    row.ended, row.others = f"waited, and went on when it was writable; {EQUAL}", kit.kept()


@pytest.mark.parametrize("what", ["merge", "export"])
def test_a_read_only_place_for_what_is_made(kit: Kit, fault: Begin, what: str) -> None:
    row = fault(f"read-only, {what}", "the output's folder mounted read-only before the start")
    out = kit.user / "out"
    module, job = job_of(kit, what, out / "made")
    paths = kit.new(job, name=what)
    with read_only(out):
        began = time.monotonic()
        assert kit.start(paths, module).wait() == 1
        shown(row, paths, Status.failed, began)
    assert kit.start(paths, module).wait() == 0
    row.ended, row.others = "refused with the reason; resumed when it was writable", kit.kept()


def test_read_only_runs(kit: Kit, fault: Begin) -> None:
    from studio.launch.start import start

    row = fault("read-only, a new run", "the runs' folder mounted read-only before a launch")
    recipe = kit.recipe("LoRA fp32")
    with read_only(kit.root / "other-runs"):
        began = time.monotonic()
        with pytest.raises(StudioError) as refused:
            start(recipe, kit.root / "other-runs", popen=kit.warm.popen)
        row.told, row.shown_seconds = str(refused.value), time.monotonic() - began
    row.ended, row.others = "refused with the reason", kit.kept()


PHASES = {
    "reading the data": "phase:reading the data",
    "loading the base model": "phase:loading the base model",
    "training": "step:3",
    "evaluating": "phase:evaluating",
    "answering": "phase:answering",
    "saving a checkpoint": "phase:saving a checkpoint",
    "saving the adapter": "phase:saving the adapter",
}


def refuse_memory(process: WarmProcess) -> None:
    """Let a process have no more address space than it has."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize()
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("phase", PHASES)
def test_no_more_memory_in_a_phase_of_training(kit: Kit, fault: Begin, phase: str) -> None:
    row = fault(f"address space refused, {phase}", f"stopped at {PHASES[phase]}; RLIMIT_AS set to what it holds")
    whole = kit.whole("long rows")
    paths = kit.new(kit.recipe("long rows"))
    process = kit.held(kit.start(paths, hold=PHASES[phase]))
    refuse_memory(process)
    go_on(process)
    code, began = process.wait(), time.monotonic()  # until it ended it had what it needed
    if code == 0:
        assert Outcome(paths) == whole
        row.told, row.ended = "nothing: what it held was enough", EQUAL
    else:
        history = shown(row, paths, Status.failed if code == 1 else Status.crashed, began)
        assert history.failed is not None and history.failed.failure == "out_of_memory", history.failed
        assert kit.finish(paths) == whole
        row.ended = "refused with the reason; resumed, equal to the undisturbed run"
    row.others = kit.kept()


@pytest.mark.parametrize("what", ["merge", "export"])
def test_no_more_memory_for_what_is_made(kit: Kit, fault: Begin, what: str) -> None:
    row = fault(f"address space refused, {what}", "stopped before its first file; RLIMIT_AS set to what it holds")
    out = kit.user / "out"
    out.mkdir()
    module, job = job_of(kit, what, out / "made")
    paths = kit.new(job, name=what)
    process = kit.held(kit.start(paths, module, hold=r"file:1:^/\.", below=out))
    refuse_memory(process)
    go_on(process)
    code, began = process.wait(), time.monotonic()
    wait_for(lambda: not run_status(paths).live)
    shown(row, paths, run_status(paths), began)
    assert run_status(paths) in (Status.failed, Status.crashed)
    row.not_yet = "" if "memory is full" in row.told else f"its memory is not named: it ended by {code}"
    assert kit.start(paths, module).wait() == 0
    row.ended, row.others = "refused with the reason; resumed to its end", kit.kept()


@contextmanager
def memory_group() -> Iterator[tuple[Path, Path, Path]]:
    """A control group and the files of its memory's use and limit; skipped where none can be made."""
    root = Path("/sys/fs/cgroup")
    kinds = (
        (root / "memory", "memory.usage_in_bytes", "memory.limit_in_bytes"),
        (root, "memory.current", "memory.max"),
    )
    for parent, usage, limit in kinds:
        group = parent / f"lora-studio-faults-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
        if (group / limit).exists():
            try:
                yield group, group / usage, group / limit
            finally:
                with suppress(OSError):
                    group.rmdir()
            return
        with suppress(OSError):
            group.rmdir()
    pytest.skip("a control group with a memory limit needs root on Linux")


@pytest.mark.parametrize("phase", ["loading the base model", "training"])
def test_the_systems_killer_ends_a_training(kit: Kit, fault: Begin, phase: str) -> None:
    row = fault(f"killed for its memory, {phase}", "its control group's limit set to what it held when stopped there")
    whole = kit.whole("long rows")
    paths = kit.new(kit.recipe("long rows"))
    with memory_group() as (group, usage, limit):
        process = kit.held(kit.start(paths, hold=f"file:1;{PHASES[phase]}"))
        (group / "cgroup.procs").write_text(str(process.pid))
        go_on(process)
        wait_for(lambda: paths.process.exists() and kit.held(process))
        limit.write_text(usage.read_text())
        began = go_on(process)
        assert process.wait() == -signal.SIGKILL
        shown(row, paths, Status.crashed, began)
    assert "memory is full" in row.told
    assert kit.finish(paths) == whole
    row.ended, row.others = f"resumed; {EQUAL}", kit.kept()
