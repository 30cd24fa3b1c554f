import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from studio.core.events import Finished
from studio.runs.log import read_events
from studio.runs.status import Status, run_status
from studio.runs.store import find_run, list_runs
from studio.runs.supervise import stop
from tests.cli.conftest import Cli
from tests.fakes.runs import wait_for


def test_training_in_plain_lines(cli: Cli, home: Path, recipe: Path) -> None:
    outcome = cli("train", str(recipe))
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith("run mine-")
    for word in (
        "planned: 5 steps",
        "warning: this worker is a fake",
        "step 5/5  loss",
        "held-out loss 4.0000 at step 0",
    ):
        assert word in outcome.out
    assert "finished after 5 steps" in outcome.out
    assert "training loss 3.6193 -> 2.4261, held-out loss 4.0000 -> 2.0000" in outcome.out
    (info,) = list_runs(home / "runs")
    assert lines[-1] == f"adapter: {info.paths.adapter}"
    assert "\x1b" not in outcome.out
    assert "training loss" in outcome.out
    assert all(len(line) <= 80 for line in lines if "|" in line)
    assert "fewer" in outcome.err or "note:" in outcome.err or outcome.err == ""


def test_what_was_noticed_before_the_start_is_not_told_a_second_time(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", str(recipe), "--json", "--set", "eval.rows=1000")
    (line,) = [line for line in cli(*words).err.splitlines() if "were asked for" in line]
    monkeypatch.setenv("FAKE_NOTE", line.removeprefix("note: "))
    outcome = cli(*words)
    assert outcome.err.count(line.removeprefix("note: ")) == 1
    assert outcome.document["warnings"] == [line.removeprefix("note: ")]


def test_lines_come_about_once_a_second(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "3000")
    outcome = cli("train", str(recipe))
    steps = [line for line in outcome.out.splitlines() if line.startswith("step ")]
    assert 2 <= len(steps) <= 20
    assert steps[-1].startswith("step 3000/3000")


def test_the_json_is_one_document_and_nothing_else(cli: Cli, home: Path, recipe: Path) -> None:
    outcome = cli("train", str(recipe), "--json", "--set", "name=other")
    assert outcome.code == 0
    document = outcome.document
    assert document["run"].startswith("other-")
    assert document["status"] == "finished"
    assert document["adapter"] == str(home / "runs" / document["run"] / "adapter")
    assert (document["steps"], document["total_steps"]) == (5, 5)
    assert document["train_loss"]["first"] > document["train_loss"]["last"]
    assert document["eval_loss"] == {"first": 4.0, "last": 2.0, "first_step": 0, "last_step": 5}
    assert document["failure"] is None
    assert document["warnings"] == ["this worker is a fake"]
    assert "step 5/5" in outcome.err


def test_a_failure_says_what_and_what_to_do(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL_AT", "3")
    outcome = cli("train", str(recipe))
    assert outcome.code == 1
    assert "failed at step 2: the loss is nan at step 3" in outcome.err
    assert "what to do: Lower the learning rate." in outcome.err
    assert "the last lines of" in outcome.err
    document = cli("train", str(recipe), "--json").document
    assert document["failure"] == {
        "kind": "nonfinite_loss",
        "message": "the loss is nan at step 3",
        "advice": "Lower the learning rate.",
        "step": 2,
    }


def test_what_a_worker_cannot_use_is_bad_input_without_a_traceback(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_REFUSE_AT", "1")
    outcome = cli("train", str(recipe), "--json")
    assert outcome.code == 2
    assert outcome.document["failure"]["kind"] == "bad_input"
    assert "the rows cannot be used" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_crash_says_so_and_shows_the_last_output(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIE_AT", "3")
    outcome = cli("train", str(recipe))
    assert outcome.code == 1
    assert "crashed" in outcome.err
    assert "its process ended with exit code 9" in outcome.err
    assert "ended without saying why; it printed nothing" in outcome.err
    assert "what to do: lora-studio runs resume mine-" in outcome.err
    monkeypatch.setenv("FAKE_KILLED", "1")
    assert "was ended by SIGKILL; the system does that when its memory is full" in cli("train", str(recipe)).err


def test_a_fault_in_native_code_leaves_its_traceback(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SEGFAULT", "1")
    outcome = cli("train", str(recipe))
    assert outcome.code == 1
    assert "was ended by SIGSEGV" in outcome.err
    assert "Fatal Python error: Segmentation fault" in outcome.err


def test_the_output_of_a_job_cannot_command_the_terminal(
    cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SAYS", "\x1b]0;owned\x07\x9b31m[/bold] \u202e")
    monkeypatch.setenv("FAKE_FAIL_AT", "2")
    outcome = cli("train", str(recipe))
    assert r"\x1b]0;owned\x07" in outcome.err
    shown = outcome.out + outcome.err
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u202e"}


def test_detached_training_returns_at_once(cli: Cli, home: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "10000")
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    outcome = cli("train", str(recipe), "--detach", "--json")
    assert outcome.code == 0
    paths = find_run(home / "runs", outcome.document["run"])
    assert run_status(paths).live
    assert "runs attach" in outcome.err
    assert stop(paths, 60) is Status.stopped


def _running_cli(recipe: Path, *words: str, **settings: str) -> "subprocess.Popen[str]":
    """The command line in a process of its own, following a slow run."""
    command = [sys.executable, "-m", "tests.fakes.cli", *words]
    environment = {**os.environ, "FAKE_STEPS": "400", "FAKE_SECONDS": "0.05", **settings}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def _wait_for_steps(home: Path) -> None:
    wait_for(lambda: any(info.last_step for info in list_runs(home / "runs")))


def test_the_first_interrupt_stops_the_run_and_saves(home: Path, recipe: Path) -> None:
    process = _running_cli(recipe, "train", str(recipe), "--json")
    _wait_for_steps(home)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert document["status"] == "stopped"
    assert 0 < document["steps"] < 400
    assert Path(document["adapter"]).is_dir()
    assert "Ctrl-C again returns at once" in err


@pytest.mark.parametrize("full", [True, False])
def test_diagnostics_that_nobody_can_take_do_not_cost_the_document(home: Path, recipe: Path, full: bool) -> None:
    if full:
        sink = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, sink = os.pipe()
        os.close(reader)
    command = [sys.executable, "-m", "tests.fakes.cli", "train", str(recipe), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=sink, text=True, check=False, timeout=60)
    os.close(sink)
    assert done.returncode == 0
    assert json.loads(done.stdout)["status"] == "finished"


def test_the_second_interrupt_leaves_the_run_to_stop_alone(home: Path, recipe: Path) -> None:
    process = _running_cli(recipe, "train", str(recipe), FAKE_DEAF="1")
    _wait_for_steps(home)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while "Ctrl-C again" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "the run lives on" in out
    paths = find_run(home / "runs", "last")
    assert run_status(paths) is Status.stopping
    assert not stop(paths, 0.1).live


def test_a_killed_command_line_leaves_the_run_alive(home: Path, recipe: Path) -> None:
    process = _running_cli(recipe, "train", str(recipe), FAKE_STEPS="40", FAKE_SECONDS="0.03")
    _wait_for_steps(home)
    process.kill()
    process.wait(60)
    paths = find_run(home / "runs", "last")
    assert run_status(paths).live
    wait_for(lambda: not run_status(paths).live)
    assert isinstance(read_events(paths.events)[-1], Finished)


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_command_quietly_and_not_the_run(home: Path, recipe: Path) -> None:
    process = _running_cli(recipe, "train", str(recipe), FAKE_SECONDS="0.01")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141  # as a shell says it of a program that a broken pipe ended
    assert process.stderr.read() == ""
    process.stderr.close()
    paths = find_run(home / "runs", "last")
    wait_for(lambda: not run_status(paths).live)
    assert run_status(paths) is Status.finished


def test_an_encoding_without_our_characters_ends_nothing(home: Path, recipe: Path) -> None:
    process = _running_cli(recipe, "train", str(recipe), FAKE_STEPS="3", PYTHONIOENCODING="ascii", FAKE_NOTE="日本 …")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.isascii()
    assert r"warning: \u65e5\u672c" in out
