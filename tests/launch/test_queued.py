"""Queued runs as real processes: launched at once, killed, cancelled, moved, and gone after a reboot."""

import json
import os
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from studio.core.events import Finished, Phase, Started
from studio.core.recipe import Recipe
from studio.launch.kinds import Checked
from studio.launch.queued import at_work, places_for, relaunch_waiting
from studio.launch.start import resume, start
from studio.probe.device import CPU_PLACE
from studio.runs.control import requested
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.process import read_mark
from studio.runs.queue import CPU, Queue
from studio.runs.recipe_file import dump_recipe
from studio.runs.status import Status, run_status
from studio.runs.summary import summary_of
from studio.runs.supervise import stop
from studio.runs.watch import read_history
from tests.fakes.runs import CHECKOUT, MODULE, fake_environment, wait_for


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    rows = ({"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "home"


def _recipe(home: Path, name: str) -> Recipe:
    return Recipe(name=name).with_("data.path", str(home.parent / "rows.jsonl")).with_("device.device", "cpu")


def _start(home: Path, name: str, *, queue: bool = True, **settings: Any) -> RunPaths:
    environment = fake_environment(**settings)
    return start(_recipe(home, name), home / "runs", module=MODULE, queue=lambda _: queue, environment=environment)


def _kill(paths: RunPaths) -> None:
    worker = read_mark(paths.process)
    assert worker is not None
    os.kill(worker[0].pid, signal.SIGKILL)
    wait_for(lambda: not run_status(paths).live)


def test_a_queued_run_waits_says_so_and_is_cancelled_or_served(home: Path) -> None:
    first = _start(home, "first", queue=False, steps=100000, seconds=0.02)
    second, third = _start(home, "second", steps=2), _start(home, "third", steps=2)
    wait_for(lambda: [run_status(paths) for paths in (second, third)] == [Status.queued] * 2)
    wait_for(lambda: any(isinstance(event, Phase) for event in read_events(third.events)))
    told = next(event for event in read_events(third.events) if isinstance(event, Phase))
    assert (told.name, told.detail) == ("queued", f"1 before it; at work: {first.name}")
    assert summary_of(third, read_history(third), run_status(third))["queued"] == told.detail
    assert at_work(CPU_PLACE) == []  # a launch on the CPU is not asked about
    stop(second, 30)
    assert run_status(second) is Status.stopped
    assert [entry.run for entry in Queue().waiting()] == [third]
    _kill(first)  # whatever ends a job, the card is free
    wait_for(lambda: run_status(third) is Status.finished)
    assert not requested(third, "queued")


@pytest.mark.slow
def test_the_queue_goes_on_after_a_reboot(home: Path) -> None:
    first = _start(home, "first", queue=False, steps=100000, seconds=0.02)
    waiting = [_start(home, name, steps=1) for name in ("second", "third")]
    for paths in (*waiting, first):
        _kill(paths)
    assert [run_status(paths) for paths in waiting] == [Status.crashed] * 2
    advice = summary_of(waiting[0], read_history(waiting[0]), Status.crashed)["failure"]["advice"]
    assert advice.startswith("lora-studio runs queue resume, by which it keeps its place; or lora-studio runs resume")
    started, refused = relaunch_waiting(module=MODULE, environment=fake_environment(steps=1))
    assert (started, refused) == (waiting, [])
    for paths in waiting:
        wait_for(lambda paths=paths: run_status(paths) is Status.finished)
    assert relaunch_waiting(module=MODULE) == ([], [])


@pytest.mark.slow
def test_a_stopped_run_is_resumed_by_way_of_the_queue(home: Path) -> None:
    stopped = _start(home, "first", steps=100000, seconds=0.02)
    stop(stopped, 30)
    busy = _start(home, "busy", queue=False, steps=100000, seconds=0.02)
    resume(stopped, module=MODULE, queue=True, environment=fake_environment(steps=1))
    wait_for(lambda: run_status(stopped) is Status.queued)
    stop(busy, 30)
    wait_for(lambda: run_status(stopped) is Status.finished)


def test_a_job_on_the_cpu_waits_for_no_card(home: Path) -> None:
    assert places_for(Checked(_recipe(home, "any"))).keys() == {CPU}


@pytest.mark.slow
def test_twelve_jobs_from_two_terminals_run_once_each_and_in_order(home: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FAKE_STEPS": "5", "FAKE_SECONDS": "0.05", "PYTHONPATH": str(CHECKOUT)}
    recipe = tmp_path / "recipe.toml"

    def terminal(letter: str) -> None:
        for number in range(6):
            name = f"{letter}{number}"
            words = ["train", str(recipe), "--queue", "--detach", "--set", f"name={name}"]
            command = [sys.executable, "-m", "tests.fakes.cli", *words]
            done = subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

    recipe.write_text(dump_recipe(_recipe(home, "twelve")))
    blocker = _start(home, "blocker", queue=False, steps=100000, seconds=0.02)
    terminals = [threading.Thread(target=terminal, args=(letter,)) for letter in "ab"]
    for thread in terminals:
        thread.start()
    for thread in terminals:
        thread.join()
    order = [entry.run for entry in Queue().waiting()]
    assert len(order) == 12
    for letter in "ab":  # each terminal's own came in its order
        assert [p.name[1] for p in order if p.name[0] == letter] == list("012345")

    cancelled, killed = order[3], order[5]
    stop(cancelled, 30)
    _kill(killed)
    Queue().move(order[11], 0)
    _kill(blocker)
    served = [order[11], *(p for p in order[:11] if p not in (cancelled, killed))]
    wait_for(lambda: run_status(served[2]) is Status.finished, 120)
    # A reboot: whatever still waits or works is gone at once.
    alive = [p for p in order if run_status(p).live]
    for paths in sorted(alive, key=lambda paths: run_status(paths) is not Status.queued):
        _kill(paths)
    at_work_then = [p for p in alive if not requested(p, "queued")]
    assert len(at_work_then) <= 1
    left = [entry.run for entry in Queue().waiting()]
    assert set(left) == {killed, *(p for p in alive if p not in at_work_then)}
    started, refused = relaunch_waiting(module=MODULE, environment=fake_environment(steps=5, seconds=0.05))
    assert (started, refused) == (left, [])
    for paths in left:
        wait_for(lambda paths=paths: run_status(paths) is Status.finished, 120)

    spans = []
    for paths in order:
        events = read_events(paths.events)
        begun = [event.at for event in events if isinstance(event, Started)]
        assert len(begun) == (0 if paths == cancelled else 1), paths.name  # each runs once
        ends = [event.at for event in events if isinstance(event, Finished)]
        spans += [(begun[0], ends[0], paths)] if begun and ends else []
    spans.sort()
    assert all(end <= begin for (_, end, _), (begin, _, _) in pairwise(spans))
    finished = [paths for _, _, paths in spans]
    assert finished == [p for p in (*served, killed) if p in finished and p not in left] + left
    assert set(finished) | {cancelled} | set(at_work_then) == set(order)
