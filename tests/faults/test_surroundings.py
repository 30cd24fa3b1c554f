"""Folders that go away while a run works, signals, a terminal that hangs up, clocks, and two of everything at once."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from studio.launch.start import start
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.queue import Queue
from studio.runs.recipe_file import dump_recipe
from studio.runs.status import Status, run_status
from studio.runs.watch import read_history
from tests.fakes.runs import CHECKOUT, wait_for
from tests.faults.conftest import Kit, Outcome, files_of, resumed, shown
from tests.faults.table import Fault
from tests.faults.test_disks_and_memory import job_of
from tests.faults.warm import stopped

pytestmark = pytest.mark.slow
Begin = Callable[..., Fault]
COMMAND = (sys.executable, "-c", "from studio.cli import main; raise SystemExit(main())")
EQUAL = "resumed, equal to the uninterrupted run"


def test_a_run_folder_is_moved_while_it_runs(kit: Kit, fault: Begin) -> None:
    row = fault("moved run folder", "renamed after step 3, while the worker was stopped there")
    whole = kit.whole("LoRA fp32")
    paths = kit.new()
    process = kit.held(kit.start(paths, hold="step:3"))
    there = RunPaths(paths.root.with_name("moved"))
    paths.root.rename(there.root)
    process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    assert process.wait() == 1
    shown(row, there, Status.failed, began)
    assert not paths.root.exists(), [str(path) for path in paths.root.rglob("*")]
    resumed(kit, there)
    assert Outcome(there) == whole
    row.ended, row.others = f"failed with the reason; at its new place {EQUAL}", kit.kept()


def test_a_run_folder_is_deleted_while_it_runs(kit: Kit, fault: Begin) -> None:
    row = fault("deleted run folder", "removed after step 3, while the worker was stopped there")
    paths = kit.new()
    process = kit.held(kit.start(paths, hold="step:3"))
    shutil.rmtree(paths.root)
    process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    assert process.wait() == 1
    row.shown_seconds, row.told = time.monotonic() - began, "nobody is left to be told: the process ended"
    assert not paths.root.exists(), [str(path) for path in paths.root.rglob("*")]
    row.ended, row.others = "the worker ended and left nothing behind", kit.kept()


def test_the_data_are_deleted_while_it_runs(kit: Kit, fault: Begin) -> None:
    row = fault("deleted data", "the file removed after step 3, while the worker was stopped there")
    whole = kit.whole("LoRA fp32")
    paths = kit.new()
    process = kit.held(kit.start(paths, hold="step:3"))
    (kit.user / "chats.jsonl").unlink()
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    row.told = "; ".join(warning.message for warning in read_history(paths).warnings) or "nothing"
    assert Outcome(paths) == whole
    row.ended, row.others = "went on with what it had read, equal to the undisturbed run", kit.kept()


def test_the_base_is_deleted_while_it_runs(kit: Kit, fault: Begin, tmp_path: Path) -> None:
    row = fault("deleted base", "the folder removed after step 3, while the worker was stopped there")
    whole = kit.whole("LoRA fp32")
    own = shutil.copytree(kit.model, tmp_path / "own")
    paths = kit.new(kit.recipe("LoRA fp32", **{"model.base": str(own)}))
    process = kit.held(kit.start(paths, hold="step:3"))
    shutil.rmtree(own)
    process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    if process.wait() == 0:
        row.told, row.ended = "nothing", "went on with what it had loaded, equal to the undisturbed run"
    else:
        shown(row, paths, Status.failed, began)
        shutil.copytree(kit.model, own)
        resumed(kit, paths)
        row.ended = f"failed with the reason; put back: {EQUAL}"
    assert Outcome(paths) == whole
    row.others = kit.kept()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_in_order(kit: Kit, fault: Begin, number: signal.Signals) -> None:
    row = fault(f"{number.name} to the worker", "after step 3, while the worker was stopped there")
    whole = kit.whole("LoRA fp32")
    paths = kit.new()
    process = kit.held(kit.start(paths, hold="step:3"))
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    assert process.wait() == 0
    shown(row, paths, Status.stopped, began)
    resumed(kit, paths)
    assert Outcome(paths) == whole
    row.ended, row.others = f"stopped in order, with a checkpoint; {EQUAL}", kit.kept()


def test_a_terminal_hangs_up(kit: Kit, fault: Begin) -> None:
    """The real command, in a session on a pseudo terminal of its own; its other end is closed."""
    row = fault("terminal hang-up", "lora-studio train in a pty, closed when the run had told its first step")
    whole = kit.whole("LoRA fp32")
    recipe = kit.root / "recipe.toml"
    recipe.write_text(dump_recipe(kit.recipe("LoRA fp32", **{"name": "terminal"})))
    words = [*COMMAND, "train", str(recipe), "--runs-dir", str(kit.runs)]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(sys.executable, words, {**os.environ, "PYTHONPATH": str(CHECKOUT)})  # noqa: S606
    drain = threading.Thread(target=_drain, args=(terminal,), daemon=True)
    drain.start()
    wait_for(lambda: next(kit.runs.glob("terminal*/events.jsonl"), None), 120)
    paths = RunPaths(next(kit.runs.glob("terminal*")))
    wait_for(lambda: read_history(paths).last_step, 120)
    os.close(terminal)
    began = time.monotonic()
    os.waitpid(pid, 0)
    row.shown_seconds, row.told = time.monotonic() - began, "nothing: its terminal is gone; the run goes on"
    wait_for(lambda: run_status(paths) is Status.finished)
    assert Outcome(paths) == whole
    row.ended, row.others = "finished by itself, equal to the uninterrupted run", kit.kept()


def _drain(terminal: int) -> None:
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:
        return


def test_two_resumes_at_once(kit: Kit, fault: Begin, crashed: RunPaths) -> None:
    row = fault("two resumes at once", "two workers started in one folder in the same moment")
    whole = kit.whole("LoRA fp32")
    # Both past the check that refuses the second: they meet at the lock.
    both = [kit.held(kit.start(crashed, anew=True, hold="file:1;step:6")) for _ in range(2)]
    began = time.monotonic()
    for process in both:
        process.send_signal(signal.SIGCONT)
    refused = wait_for(lambda: next((process for process in both if process.poll() is not None), None))
    assert refused.returncode == 1, crashed.output.read_text()[-2000:]
    (other,) = (process for process in both if process is not refused)
    kit.held(other).send_signal(signal.SIGCONT)
    assert other.wait() == 0, crashed.output.read_text()[-2000:]
    row.told = next(line for line in crashed.output.read_text().splitlines() if "RunBusy: " in line)
    row.shown_seconds = min(5.0, time.monotonic() - began)
    assert Outcome(crashed) == whole
    row.ended, row.others = "one was refused, the other resumed, equal to the uninterrupted run", kit.kept()


@pytest.mark.parametrize("what", ["merge", "export"])
def test_two_jobs_to_one_place(kit: Kit, fault: Begin, what: str) -> None:
    row = fault(f"two {what}s to one place", "started in the same moment")
    out = kit.user / "out" / "made"
    module, job = job_of(kit, what, out)
    runs = [kit.new(job, name=f"{what}-{letter}") for letter in "ab"]
    first = kit.start(runs[0], module, hold=r"file:1:^/\.(merging|writing)-made$", below=out.parent)
    kit.held(first)
    began = time.monotonic()
    assert kit.start(runs[1], module).wait() == 1
    shown(row, runs[1], Status.failed, began)
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    module, job = job_of(kit, what, kit.user / "plain" / "made")
    assert kit.start(kit.new(job, name=what), module).wait() == 0
    assert files_of(out) == files_of(kit.user / "plain" / "made")
    row.ended, row.others = "the second was refused, the first's files equal those of one alone", kit.kept()


def test_two_workers_of_one_queue(kit: Kit, fault: Begin) -> None:
    row = fault("two queue workers at once", "both started in the same moment, with one place")
    whole = kit.whole("LoRA fp32")
    runs = [kit.new(name=name) for name in ("first", "second")]
    for paths in runs:
        kit.join(paths)
    for process in [kit.start(paths) for paths in runs]:
        assert process.wait() == 0
    assert all(Outcome(paths) == whole for paths in runs)
    spans = [(events[0].at, events[-1].at) for events in map(_work, runs)]
    assert spans[0][1] <= spans[1][0], "they worked at the same time"
    assert not Queue().waiting()
    row.told = "queued, then each in its turn"
    row.ended, row.others = "one after the other, both equal to the uninterrupted run", kit.kept()


def _work(paths: RunPaths) -> list[Any]:
    return [event for event in read_events(paths.events) if getattr(event, "name", "") != "queued"]


def test_two_launches_in_one_second(kit: Kit, fault: Begin) -> None:
    row = fault("two launches at once", "of the same recipe, by the same clock")
    recipe, moment = kit.recipe("LoRA fp32"), time.time()
    both = [start(recipe, kit.runs, now=lambda: moment, popen=kit.warm.popen) for _ in range(2)]
    assert both[0].root != both[1].root
    for paths in both:
        wait_for(lambda paths=paths: run_status(paths) is Status.finished, 120)
        assert Outcome(paths) == kit.whole("LoRA fp32")
    row.told, row.ended, row.others = "two names", "two runs, both equal to the uninterrupted run", kit.kept()


def test_two_cleans_at_once(kit: Kit, fault: Begin, crashed: RunPaths) -> None:
    row = fault("two cleans at once", "lora-studio clean --delete, twice in the same moment, beside a crashed run")
    whole = kit.whole("LoRA fp32")
    words = [*COMMAND, "clean", "--delete", "--runs-dir", str(kit.runs)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    both = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in "ab"
    ]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    row.told = told[0].splitlines()[-1]
    resumed(kit, crashed)
    assert Outcome(crashed) == whole
    row.ended, row.others = f"both ended in order; the crashed run {EQUAL}", kit.kept()


def test_the_clock_jumps(kit: Kit, fault: Begin) -> None:
    row = fault("the clock jumps", "libfaketime: two days on after step 3, 400 days back after step 6", count=2)
    library = next(Path("/usr/lib").glob("**/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime (apt-get install faketime)")
    whole = kit.whole("LoRA fp32")
    clock = kit.root / "clock"
    clock.write_text("+0")
    more = {"LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    paths = kit.new()
    process = kit.cold(paths, {**more, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}, hold="step:3;step:6")
    for days in (2, -400):
        wait_for(lambda: stopped(process.pid), 200)
        assert run_status(paths) is Status.running
        clock.write_text(f"{days:+}d")
        os.kill(process.pid, signal.SIGCONT)
        wait_for(lambda: not stopped(process.pid))
    assert process.wait(200) == 0
    assert run_status(paths) is Status.finished
    moments = [event.at for event in read_events(paths.events)]
    assert max(moments) > time.time() + 86400 > time.time() - 86400 > min(moments), "the clock did not jump"
    row.told = "; ".join(warning.message for warning in read_history(paths).warnings) or "nothing"
    assert row.told.count("the machine's clock was set") == 2
    assert Outcome(paths) == whole
    row.ended, row.others = "finished, equal to the undisturbed run", kit.kept()
