"""`lora-studio runs` stop, pause, resume and rm: what each does to a run, and which runs it refuses."""

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from studio.core.events import Finished, Paused, Saved, Started, StepDone
from studio.runs.control import requested
from studio.runs.extension import read_extensions
from studio.runs.job import write_job
from studio.runs.log import read_events
from studio.runs.requests import MergeRequest
from studio.runs.status import Status, run_status
from studio.runs.supervise import stop
from tests.cli.conftest import Cli
from tests.cli.test_runs import _slow
from tests.fakes.runs import LiveWorker, launch_fake, make_run, wait_for, write_log
from tests.runs.test_checkpoints import checkpoint


def test_stopping_pausing_and_resuming(cli: Cli, home: Path) -> None:
    paths = _slow(home)
    told = cli("runs", "pause", "try")
    assert (told.code, told.out.split(": ", 1)[1]) == (
        0,
        f"pauses after its current step; continue it with: lora-studio runs resume {paths.name}\n",
    )
    wait_for(lambda: run_status(paths) is Status.paused)
    assert cli("runs", "resume", "try", "--json").document["message"] == "goes on"
    wait_for(lambda: run_status(paths) is Status.running)
    outcome = cli("runs", "stop", "try", "--json")
    assert (outcome.code, outcome.document["status"]) == (0, "stopped")
    assert outcome.document["message"] == "stopped"
    again = cli("runs", "stop", "try", "--force")
    assert (again.code, again.err) == (0, "")
    assert again.out.endswith(": nothing to stop: the run is stopped already\n")
    assert cli("runs", "stop", "try", "--json").document["status"] == "stopped"
    assert cli("runs", "pause", "try").code == 2


def test_a_live_run_pauses_without_its_recipe_too(cli: Cli, home: Path) -> None:
    paths = _slow(home)
    paths.recipe.unlink()
    assert cli("runs", "pause", "try").code == 0
    wait_for(lambda: run_status(paths) is Status.paused)
    stop(paths, 60)


def test_what_cannot_pause_is_not_asked_to(cli: Cli, home: Path) -> None:
    paths = make_run(home, "merge-try")
    write_job(paths, MergeRequest(adapter="/a", base="embedded", out="/o"))
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="merge", model="embedded")
        outcome = cli("runs", "pause", "merge-try", "--json")
        worker.emit(Finished, outcome="done")
    assert (outcome.code, outcome.out) == (2, "")
    assert (
        f"is of the kind merge: only training pauses. Stop it with lora-studio runs stop {paths.name}," in outcome.err
    )
    assert not requested(paths, "pause")


def test_a_run_that_does_not_listen_is_told_and_ended_by_force(cli: Cli, home: Path) -> None:
    paths = make_run(home)
    launch_fake(paths, steps=2000, seconds=0.02, deaf=1)
    wait_for(lambda: any(isinstance(event, StepDone) for event in read_events(paths.events)))  # it catches signals
    outcome = cli("runs", "stop", "try", "--wait", "0.2")
    assert outcome.code == 1
    assert "--force" in outcome.out
    assert run_status(paths) is Status.stopping
    outcome = cli("runs", "stop", "try", "--wait", "0.2", "--force", "--json")
    assert (outcome.code, outcome.document["status"]) == (0, "failed")


def test_a_stopped_run_is_resumed_and_followed(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _slow(home)
    wait_for(lambda: len(read_events(paths.events)) > 8)
    assert cli("runs", "stop", "try").code == 0
    before = max(event.step for event in read_events(paths.events) if isinstance(event, StepDone))
    monkeypatch.setenv("FAKE_STEPS", str(before + 2))
    outcome = cli("runs", "resume", "try")
    assert outcome.code == 0
    assert f"continues after step {before}" in outcome.out
    assert f"finished after {before + 2} steps" in outcome.out
    assert "step 1/" not in outcome.out
    refused = cli("runs", "resume", "try")
    assert refused.code == 2
    assert "finished" in refused.err


def test_a_finished_run_trains_longer_once_it_was_said_how(
    cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _slow(home)
    stop(paths, 60)
    done = int((paths.root / "step.txt").read_text())
    monkeypatch.setenv("FAKE_STEPS", str(done + 1))
    assert cli("runs", "resume", "try").code == 0
    gone = cli("runs", "extend", "try", "--steps", "3")
    assert gone.code == 2
    assert f"lora-studio train RECIPE --set adapter.start={paths.name}" in gone.err
    checkpoint(paths, done + 1)
    monkeypatch.setenv("FAKE_STEPS", str(done + 4))
    outcome = cli("runs", "extend", "try", "--steps", "3", "--schedule", "restart")
    assert outcome.code == 0
    told, _, followed = outcome.out.partition("\n")
    assert f"{done + 1} -> {done + 4} steps" in told
    assert "(restart)" in told
    assert f"finished after {done + 4} steps" in followed
    (added,) = read_extensions(paths)
    assert (added.after, added.steps, added.tail) == (done + 1, 3, "restart")
    assert cli("runs", "extend", "try", "--steps", "0").code == 2
    assert cli("runs", "resume", "try").code == 2


def test_starting_over_with_damaged_checkpoints_wants_a_flag(cli: Cli, home: Path) -> None:
    paths = make_run(home, "broken", now=1e9)
    write_log(
        paths,
        Started(at=1e9, job="train"),
        StepDone(at=1e9, step=1, loss=1.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0),
        Saved(at=1e9, what="checkpoint", path="checkpoints/step-00000001", step=1),
    )
    (paths.checkpoints / "step-00000001").mkdir(parents=True)
    before = paths.events.read_bytes()
    refused = cli("runs", "resume", "broken")
    assert refused.code == 2
    assert "every checkpoint of the run" in refused.err
    assert "step 1 (it has no complete.json)" in refused.err
    assert f"lora-studio runs resume {paths.name} --from-start" in refused.err
    back = cli("runs", "resume", "broken", "--checkpoint", "7")
    assert back.code == 2
    assert "cannot go on after the checkpoint of step 7: there is none. Others: 1" in back.err
    assert paths.events.read_bytes() == before
    agreed = cli("runs", "resume", "broken", "--from-start")
    assert agreed.code == 0
    assert "finished" in agreed.out


def test_starting_over_is_refused_where_nothing_is_lost(cli: Cli, home: Path) -> None:
    paths = make_run(home, "merging", now=1e9)
    write_job(paths, MergeRequest("/a", "embedded", "/out"))
    write_log(paths, Started(at=1e9, job="merge"))
    refused = cli("runs", "resume", "merging", "--from-start")
    assert refused.code == 2
    assert "only training starts over" in refused.err


def test_resuming_detached_returns_at_once(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _slow(home)
    stop(paths, 60)
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    monkeypatch.setenv("FAKE_STEPS", "5000")
    outcome = cli("runs", "resume", "try", "--detach", "--json")
    assert outcome.code == 0
    assert run_status(paths).live
    stop(paths, 60)


def test_removing_runs(cli: Cli, home: Path) -> None:
    live = _slow(home)
    dead = make_run(home, "dead", now=1e9)
    write_log(dead, Started(at=1e9, job="train"))
    outcome = cli("runs", "rm", "dead", "try")
    assert outcome.code == 2
    assert "still live" in outcome.err
    assert dead.root.exists()
    stop(live, 10)
    assert cli("runs", "rm", "dead", "try", "dead", "--json").code == 0
    assert list((home / "runs").iterdir()) == []


def test_a_run_that_waits_for_its_disk_says_so_and_needs_no_resume(cli: Cli, home: Path) -> None:
    paths = make_run(home)
    why = "the disk of /runs is full"
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="train")
        worker.emit(Paused, step=3, paused=True, reason=why)
        document = cli("runs", "show", "try", "--json").document
        assert (document["status"], document["paused_for"]) == ("paused", why)
        assert f"paused: {why}" in cli("runs", "show", "try").out
        outcome = cli("runs", "resume", "try")
        assert outcome.code == 1
        assert "goes on by itself when there is room" in outcome.out
        worker.emit(Paused, step=3, paused=False)
        assert cli("runs", "show", "try", "--json").document["paused_for"] is None
        worker.emit(Finished, outcome="done")


def _removed_at_a_terminal(home: Path, answer: bytes, *flags: str) -> tuple[int, str, str]:
    """`runs rm last` where stdin and stderr are a terminal and stdout goes into a pipe: exit code, stdout, stderr."""
    keyboard, screen = pty.openpty()
    os.write(keyboard, answer)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.cli", "runs", "rm", "last", *flags],
        stdin=screen, stderr=screen, stdout=subprocess.PIPE, env={**os.environ, "LORA_STUDIO_HOME": str(home)},
    )  # fmt: skip
    os.close(screen)
    told = process.communicate(timeout=60)[0].decode()
    shown = b""
    with suppress(OSError):  # Linux's way to say that the other end is closed
        while part := os.read(keyboard, 4096):
            shown += part
    os.close(keyboard)
    return process.returncode, told, shown.decode()


def test_who_types_the_words_is_asked_before_a_run_is_removed(home: Path) -> None:
    doomed = make_run(home, "trained", now=1e9)
    write_log(doomed, Started(at=1e9, job="train"), Finished(at=2e9, outcome="done"))
    for folder in ("adapter", "checkpoints/step-00000001", "checkpoints/step-00000002"):
        (doomed.root / folder).mkdir(parents=True)
    (doomed.adapter / "weights").write_bytes(bytes(3 * 10**6))
    for answer in (b"\n", b"n\n", b"\x04"):
        code, told, shown = _removed_at_a_terminal(home, answer)
        assert (code, told) == (1, "")
        assert f"{doomed.name}: its log, 2 checkpoints and its adapter, 3.0 MB" in shown
        assert "Delete this run? This cannot be undone. [y/N]" in shown
        assert "nothing was removed" in shown
        assert doomed.root.exists()
    code, told, _ = _removed_at_a_terminal(home, b"y\n")
    assert (code, told) == (0, f"removed {doomed.name}: its log, 2 checkpoints and its adapter, 3.0 MB\n")
    assert not doomed.root.exists()


@pytest.mark.parametrize("flag", ["--yes", "--json"])
def test_a_yes_or_json_is_not_asked(home: Path, flag: str) -> None:
    doomed = make_run(home, "trained", now=1e9)
    write_log(doomed, Started(at=1e9, job="train"), Finished(at=2e9, outcome="done"))
    code, told, shown = _removed_at_a_terminal(home, b"", flag)
    assert (code, shown) == (0, "")
    assert doomed.name in told
    assert not doomed.root.exists()
