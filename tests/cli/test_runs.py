import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from studio.commands.follow import event_line, loss_ends
from studio.commands.runs_list import fitted
from studio.core.events import Evaluated, Finished, Planned, Saved, Started, StepDone
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.note import write_note
from studio.runs.process import is_alive, read_mark
from studio.runs.requests import MergeRequest
from studio.runs.status import Status, run_status
from studio.runs.store import find_run
from studio.runs.supervise import stop
from studio.runs.watch import read_history
from studio.tui.panels.notes import notes_text
from tests.cli.conftest import Cli
from tests.fakes.runs import launch_fake, make_run, wait_for, write_log


@pytest.fixture
def trained(cli: Cli, home: Path, recipe: Path) -> RunPaths:
    """A finished run."""
    return find_run(home / "runs", cli("train", str(recipe), "--json").document["run"])


def _slow(home: Path) -> RunPaths:
    paths = make_run(home)
    launch_fake(paths, steps=2000, seconds=0.02)
    wait_for(lambda: run_status(paths) is Status.running)
    return paths


def test_an_empty_list(cli: Cli, home: Path) -> None:
    assert cli("runs", "list").out == f"no runs in {home / 'runs'}\n"
    assert cli("runs", "list", "--json").document == []
    assert not home.exists()


def test_a_list_in_words_and_in_json(cli: Cli, trained: RunPaths) -> None:
    head, line = cli("runs", "list").out.splitlines()
    assert head.split() == ["run", "status", "method", "model", "step", "loss", "held-out", "started", "note"]
    assert line.split()[:7] == [trained.name, "finished", "qlora", "embedded", "5/5", "2.4261", "2.0000"]
    (info,) = cli("runs", "list", "--json").document
    assert (info["run"], info["status"], info["step"], info["eval_loss"]) == (trained.name, "finished", 5, 2.0)


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_in_a_terminal_no_line_of_the_list_is_broken(
    cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    for name in ("one", "a-name-that-somebody-has-made-rather-long"):
        paths = make_run(home, name)
        write_log(paths, Started(at=1.0, job="train", method="qlora", model="meta-llama/Llama-3.1-8B-Instruct"))
        write_note(paths, "学习率减半, the best so far\t" + "x" * 40)
    piped = cli("runs", "list").out
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli("runs", "list").out == piped, "a pipe has no width"
    monkeypatch.setattr("studio.commands.runs_list.sys.stdout.isatty", lambda: True, raising=False)
    lines = cli("runs", "list").out.splitlines()
    assert max(map(cell_len, lines[:-1])) <= columns
    assert lines[0].split()[:2] == ["run", "status"]
    assert all(line.split()[1] == "crashed" for line in lines[1:3])
    assert lines[-1].startswith("not shown: model, method")


def test_a_terminal_that_is_wide_enough_shows_the_list_as_a_pipe_does(
    cli: Cli, trained: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped = cli("runs", "list").out
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("studio.commands.runs_list.sys.stdout.isatty", lambda: True, raising=False)
    assert cli("runs", "list").out == piped


def test_what_is_shortened_in_a_terminal_first_is_what_can_be_told_from_less() -> None:
    row = ["run-20260101-120000", "finished", "qlora", "a/model", "5/5", "2.4261", "2.0000", "12:30", ""]
    head, line, *told = fitted([row], 80).splitlines()
    assert (head.split(), told) == (["run", "status", "method", "model", "step", "loss", "held-out", "started"], [])
    assert line.split() == row[:-1]
    assert "2026-…" not in fitted([[*row[:3], "m" * 60, *row[4:7], "2026-01-01", "n" * 60]], 80)


def test_runs_dir_works_before_and_after_the_verb(cli: Cli, trained: RunPaths, tmp_path: Path) -> None:
    root = str(trained.root.parent)
    elsewhere = str(tmp_path / "elsewhere")
    assert len(cli("--runs-dir", root, "runs", "list", "--json").document) == 1
    assert len(cli("runs", "list", "--json", "--runs-dir", elsewhere).document) == 0
    assert len(cli("--runs-dir", elsewhere, "runs", "list", "--json").document) == 0


def test_showing_a_run(cli: Cli, trained: RunPaths) -> None:
    outcome = cli("runs", "show", "last")
    assert outcome.code == 0
    for word in ("status     finished", "steps      5 of 5", "adapter", "training loss", "recipe.toml"):
        assert word in outcome.out
    document = cli("runs", "show", "mine", "--json").document
    assert document["recipe"]["name"] == "mine"
    assert [event["step"] for event in document["evals"]] == [0, 5]
    assert document["samples"][0]["prompt"] == "what?"
    assert document["files"]["events.jsonl"] > 0 and document["files"]["held_out.json"] > 0


def test_showing_a_damaged_run_is_no_error(cli: Cli, home: Path) -> None:
    folder = home / "runs" / "broken\x1b[31m"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("= = =")
    (folder / "events.jsonl").write_bytes(b"\xff\n" * 100)
    for words in (["runs", "show", "broken"], ["runs", "list"]):
        outcome = cli(*words)
        assert outcome.code == 0
        assert "\x1b" not in outcome.out + outcome.err
    assert cli("runs", "show", "broken", "--json").document["recipe"] is None


def test_attaching_to_a_run_that_has_ended_tells_how(cli: Cli, trained: RunPaths) -> None:
    outcome = cli("runs", "attach", "last")
    assert outcome.code == 0
    assert "finished after 5 steps" in outcome.out
    assert cli("runs", "attach", "last", "--json").document["status"] == "finished"


def test_attaching_follows_and_an_interrupt_only_detaches(home: Path) -> None:
    paths = _slow(home)
    command = [sys.executable, "-m", "tests.fakes.cli", "runs", "attach", "try"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines[0] == "started: train qlora embedded\n"
    assert lines[1].startswith("running at step ")
    assert lines[3].startswith("step ")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "the run lives on" in out
    assert run_status(paths) is Status.running
    stop(paths, 60)


def test_a_run_whose_folder_is_deleted_is_gone_and_its_worker_ends(home: Path) -> None:
    paths = _slow(home)
    marked = read_mark(paths.process)
    command = [sys.executable, "-m", "tests.fakes.cli", "runs", "attach", "try", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()
    shutil.rmtree(paths.root)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "is gone: its folder was deleted" in err
    assert marked is not None
    wait_for(lambda: not is_alive(marked[0]))


def test_a_held_out_loss_from_before_training_is_not_told_as_its_outcome(cli: Cli, home: Path) -> None:
    paths = make_run(home)
    write_log(
        paths,
        Started(at=1.0, job="train", method="lora", model="m"),
        Evaluated(at=2.0, step=0, loss=4.0, loss_tokens=1, rows=1, seconds=1.0),
        StepDone(at=3.0, step=1, loss=3.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0),
        Finished(at=4.0, outcome="stopped", step=1),
    )
    assert "held out   loss 4.0000 (only at step 0)\n" in cli("runs", "show", "try").out
    assert "held-out loss 4.0000 (only at step 0)\n" in cli("runs", "attach", "try").out
    ends = cli("runs", "show", "try", "--json").document["eval_loss"]
    assert (ends["first_step"], ends["last_step"]) == (0, 0)


def test_a_merge_is_shown_without_the_losses_it_has_not(cli: Cli, home: Path) -> None:
    paths = make_run(home, "merge-try")
    write_job(paths, MergeRequest(adapter="/a", base="embedded", out="/o"))
    write_log(
        paths,
        Started(at=1.0, job="merge", model="embedded"),
        Saved(at=2.0, what="merged", path="/o"),
        Finished(at=3.0, outcome="done"),
    )
    lines = cli("runs", "show", "merge").out.splitlines()
    facts = [line.split()[0] for line in lines if not line.startswith("file")]
    assert facts == ["run", "folder", "status", "job", "time", "output"]
    assert lines[5].split() == ["output", "/o"]


def test_comparing_two_runs(cli: Cli, trained: RunPaths, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "8")
    other = cli("train", str(recipe), "--json", "--set", "adapter.rank=64", "--set", "method=lora").document["run"]
    outcome = cli("runs", "compare", trained.name, other)
    assert outcome.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line}
    assert rows["adapter.rank"] == ["16", "64"]
    assert rows["method"] == ["qlora", "lora"]
    assert rows["steps"] == ["5/5", "8/8"]
    document = cli("runs", "compare", trained.name, other, "--json").document
    assert document["recipe_differences"] == {"method": ["qlora", "lora"], "adapter.rank": [16, 64]}
    assert [run["steps"] for run in document["runs"]] == [5, 8]


def test_a_loss_that_was_never_measured_is_one_dash() -> None:
    assert loss_ends({"first": None, "last": None, "first_step": None, "last_step": None}) == "-"


def test_comparing_needs_two_different_runs(cli: Cli, trained: RunPaths) -> None:
    outcome = cli("runs", "compare", "last", trained.name)
    assert outcome.code == 2
    assert "two or more" in outcome.err


def test_a_note_is_written_and_listed(cli: Cli, home: Path) -> None:
    paths = make_run(home)
    assert cli("runs", "note", paths.name).out.startswith("no note")
    assert cli("runs", "note", paths.name, "best so far", "--json").document == {
        "run": paths.name,
        "note": "best so far",
    }
    assert cli("runs", "list", "--json").document[0]["note"] == "best so far"
    assert "best so far" in cli("runs", "list").out
    assert cli("runs", "note", paths.name, "x" * 501).code == 2


def test_what_a_training_left_out_is_told_by_reason_wherever_its_run_is(cli: Cli, home: Path) -> None:
    paths = make_run(home)
    planned = Planned(
        at=2.0, total_steps=1, trainable_parameters=1, rows=1, held_out_rows=0, device="cpu", dtype="fp32",
        loss_path="full", left_out={"no_answer": 2000, "refused_by_template": 3, "of_tomorrow": 1},
    )  # fmt: skip
    step = StepDone(at=3.0, step=1, loss=3.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
    end = Finished(at=4.0, outcome="done", step=1)
    write_log(paths, Started(at=1.0, job="train", method="lora", model="m"), planned, step, end)
    told = (
        "2,004 left out (2,000 without an answer, 3 that the chat template refuses, or that are not found in what it "
        "writes, 1 of_tomorrow)"
    )
    assert f"rows       {told}\n" in cli("runs", "show", "try").out
    assert event_line(planned).startswith(f"planned: 1 steps over 1 rows (0 held out), {told}, 1 trainable parameters")
    assert f"\nrows: {told}\n" in cli("runs", "attach", "try").out, "what a training says at its end"
    assert cli("runs", "show", "try", "--json").document["left_out"] == planned.left_out
    assert f"rows     {told}\n" in notes_text(read_history(paths)).plain, "the studio's run screen"
    write_log(paths, Started(at=1.0, job="train"), replace(planned, left_out={}), step, end)
    assert "left out" not in cli("runs", "show", "try").out + cli("runs", "attach", "try").out
