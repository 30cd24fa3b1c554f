"""What goes on beside a run: a person's command and trackers, in processes of their own that never harm it."""

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.core.events import Evaluated, Failed, Finished, RunEvent, Started, StepDone, Warned
from studio.core.recipe import Recipe
from studio.runs.beside import Command, command_of_settings, follow, run_command, secretless, troubles
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.summary import summary_of
from studio.runs.watch import read_history
from tests.fakes.runs import CHECKOUT, fake_environment, launch_fake, make_run, wait_for, write_log

WRITES = "import json, sys; open(sys.argv[1], 'a').write(json.dumps(sys.argv[2:]) + chr(10))"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("LORA_STUDIO_HOME", str(home))
    return home


def set_command(home: Path, *command: str, on: str = "") -> None:
    (home / "settings.toml").write_text(f"[tell]\ncommand = {json.dumps(command)}\n{on}", encoding="utf-8")


def told(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(("settings", "event"), [({}, "finished"), ({"fail_at": 3}, "failed")])
def test_the_command_is_run_when_a_run_has_ended(
    home: Path, tmp_path: Path, settings: dict[str, int], event: str
) -> None:
    out = tmp_path / "told"
    set_command(home, sys.executable, "-c", WRITES, str(out), "{run}", "{event}", "{job}", "$HOME; `x`")
    paths = make_run(tmp_path)
    launch_fake(paths, steps=5, seconds=0.01, **settings)
    wait_for(lambda: told(out))
    assert told(out) == [[paths.name, event, "train", "$HOME; `x`"]]
    assert troubles(paths) == []


def test_the_command_is_run_when_the_process_of_a_run_was_killed(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "told"
    set_command(home, sys.executable, "-c", WRITES, str(out), "{run}", "{event}", "{words}")
    paths = make_run(tmp_path)
    handle = launch_fake(paths, steps=10_000, seconds=0.05)
    wait_for(lambda: read_history(paths).last_step > 1)
    os.kill(handle.pid, signal.SIGKILL)
    handle.process.wait()
    wait_for(lambda: told(out))
    assert told(out) == [[paths.name, "crashed", "crashed"]]


def test_a_command_that_fails_is_told_and_harms_nothing(home: Path, tmp_path: Path) -> None:
    set_command(home, sys.executable, "-c", "import sys; sys.exit('no\\x1b[31m network')")
    paths = make_run(tmp_path)
    launch_fake(paths, steps=3, seconds=0.01)
    wait_for(lambda: troubles(paths))
    assert run_status(paths) is Status.finished
    said = r"the command in settings.toml that tells of runs ended with exit code 1: no\x1b[31m network"
    assert troubles(paths) == [said]
    assert summary_of(paths, read_history(paths), Status.finished)["warnings"][-1] == said


def test_settings_that_are_not_understood_are_told_in_the_run(home: Path, tmp_path: Path) -> None:
    set_command(home, "notify-send", "run {run} ended")
    paths = make_run(tmp_path)
    launch_fake(paths, steps=2, seconds=0.01)
    wait_for(lambda: troubles(paths))
    assert "a placeholder is a whole argument, one of {run}, {event}" in troubles(paths)[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[tell]\ncommand = "notify {run}"', "a list of texts"),
        ("[tell]\ncommand = []", "a list of texts"),
        ('[tell]\ncommand = ["x", 3]', "a list of texts"),
        ('[tell]\ncommand = ["x"]\non = ["never"]', "on is a list of finish, failure, spike"),
        ("tell = 3", "a list of texts"),
        ("[tell", "cannot be read"),
    ],
)
def test_which_settings_are_refused(home: Path, text: str, says: str) -> None:
    (home / "settings.toml").write_text(text)
    with pytest.raises(BadInput, match=says):
        command_of_settings()


def test_without_settings_nothing_is_run(home: Path) -> None:
    assert command_of_settings() is None
    (home / "settings.toml").write_text("[other]\nx = 1\n")
    assert command_of_settings() is None


@pytest.mark.skipif(sys.platform == "win32", reason="sleep is a program of Unix")
def test_a_command_is_ended_after_its_time_with_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = f"sleep 60 & echo $! > {child}; wait"
    assert run_command(["sh", "-c", script], 0.5) == "took longer than 0.5 s, and was ended"
    wait_for(lambda: not _alive(int(child.read_text())))
    assert "cannot be started" in run_command([str(tmp_path / "no such program")])
    assert run_command(["true"]) == ""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_texts_of_others_reach_the_command_as_one_harmless_argument(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = RunPaths(tmp_path / "run")
    command = Command(paths, [sys.executable, "-c", WRITES, str(out), "{words}"], ("finish", "failure", "spike"))
    command.take(Failed(at=1.0, failure="error", message="-rf $(touch x)\n\x1b[2J; rm", advice=""))
    command.close("failed")
    assert told(out) == [[r"failed: -rf $(touch x)\n\x1b[2J; rm"]]


def test_spikes_are_told_but_not_each_of_many(tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = make_run(tmp_path)
    spikes = [Warned(at=1.0, topic="spike", message=f"the loss has leapt up {place}") for place in range(5)]
    write_log(paths, Started(at=1.0, job="train"), *spikes, Finished(at=2.0, outcome="done", step=9))
    words = [sys.executable, "-c", WRITES, str(out), "{event}", "{words}"]
    follow(paths, Command(paths, words, ("spike", "finish")), 0)
    assert told(out) == [["spike", "spike: the loss has leapt up 0"], ["finished", "finished: after 9 steps"]]
    out.unlink()
    follow(paths, Command(paths, words, ("failure",)), 0)
    assert told(out) == []


def test_a_reader_beside_begins_where_its_process_began(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    write_log(paths, Started(at=1.0, job="train"), Failed(at=1.0, failure="a", message="before", advice=""))
    begin = paths.events.stat().st_size
    events = paths.events.read_bytes()
    write_log(paths, Started(at=2.0, job="train"), Finished(at=3.0, outcome="stopped", step=4))
    paths.events.write_bytes(events + paths.events.read_bytes())
    seen = _Seen()
    follow(paths, seen, begin)
    assert [event.kind for event in seen.events] == ["Started", "Finished"]
    assert seen.ended == ["stopped"]


class _Seen:
    def __init__(self) -> None:
        self.events: list[RunEvent] = []
        self.ended: list[str] = []

    def take(self, event: RunEvent) -> None:
        self.events.append(event)

    def close(self, ended: str) -> None:
        self.ended.append(ended)


def test_secrets_of_the_environment_are_taken_out_of_what_a_library_says() -> None:
    environment = {"WANDB_API_KEY": "local-0123456789", "HOME": "/root/long", "HF_TOKEN": "x"}
    assert secretless("bad key local-0123456789 in /root/long x", environment) == "bad key *** in /root/long x"


STAND_IN = """
import json, os
OUT = os.environ["STAND_IN_OUT"]
def note(*what):
    with open(OUT, "a") as file: file.write(json.dumps(what) + chr(10))
class Settings(dict):
    def __init__(self, **given): super().__init__(**given)
class Run:
    def define_metric(self, name, step_metric): pass
    def log(self, values): note("log", values)
    def finish(self, exit_code): note("finish", exit_code)
def init(**given):
    if os.environ.get("STAND_IN_FAILS"): raise RuntimeError("denied: " + os.environ["WANDB_API_KEY"])
    if os.environ.get("STAND_IN_HANGS"):
        import time; note("hangs"); time.sleep(600)
    note("init", given["name"], given["mode"], given["config"]["train.steps"])
    return Run()
"""


def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: str) -> tuple[RunPaths, Path]:
    """A run that is tracked by a stand-in of W&B's library, from its launch on."""
    out = tmp_path / "out"
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "wandb.py").write_text(STAND_IN)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    recipe = Recipe(name="try").with_("train.track", ["wandb"]).with_("train.steps", 3)
    paths = make_run(tmp_path, recipe=recipe)
    environment = fake_environment(steps=3, seconds=0.3, watched=1)
    for name, value in {**settings, "STAND_IN_OUT": str(out), **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules), environment["PYTHONPATH"]]))
    launch_fake(paths, steps=3, seconds=0.3, watched=1)
    return paths, out


def test_a_tracker_gets_the_figures_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = tracked(tmp_path, monkeypatch)
    wait_for(lambda: any(line[0] == "finish" for line in told(out)))  # type: ignore[comparison-overlap]
    lines: list[list[Any]] = list(told(out))
    assert lines[0] == ["init", paths.name, "offline", 3]
    assert lines[-1] == ["finish", 0]
    steps = [line[1]["step"] for line in lines if line[0] == "log" and "train/loss" in line[1]]
    assert steps == [1, 2, 3]
    assert troubles(paths) == [
        "wandb has no key and writes offline; send it later with: wandb sync, in the run's folder wandb"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "key", "mode"), [("", "0123456789", "online"), ("offline", "0123456789", "offline")])
def test_a_tracker_is_used_as_the_user_has_set_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, key: str, mode: str
) -> None:
    settings = {"WANDB_API_KEY": key} | ({"WANDB_MODE": asked} if asked else {})
    _, out = tracked(tmp_path, monkeypatch, **settings)
    wait_for(lambda: told(out))
    assert told(out)[0][2] == mode


def test_a_tracker_that_fails_is_told_once_without_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _ = tracked(tmp_path, monkeypatch, STAND_IN_FAILS="1", WANDB_API_KEY="secret-key-0123")
    wait_for(lambda: troubles(paths))
    wait_for(lambda: not run_status(paths).live)
    assert run_status(paths) is Status.finished
    assert troubles(paths) == ["wandb has failed, and gets nothing more of this run (RuntimeError: denied: ***)"]
    for path in (paths.events, *paths.beside.iterdir()):
        assert "secret-key-0123" not in path.read_text()


@pytest.mark.slow
def test_a_tracker_that_hangs_does_not_keep_a_run_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, out = tracked(tmp_path, monkeypatch, STAND_IN_HANGS="1")
    wait_for(lambda: told(out) == [["hangs"]])
    wait_for(lambda: run_status(paths) is Status.finished)
    for pid in _beside(paths):
        os.kill(pid, signal.SIGKILL)


def _beside(paths: RunPaths) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"studio.runs.beside" in words and str(paths.root).encode() in words:
            found.append(int(folder.name))
    return found


def test_a_tracker_that_is_not_installed_is_told(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is not None:
        pytest.skip("trackio is installed here")
    paths = make_run(tmp_path, recipe=Recipe(name="try").with_("train.track", ["trackio"]))
    launch_fake(paths, steps=2, seconds=0.01, watched=1)
    wait_for(lambda: troubles(paths))
    assert troubles(paths) == ["train.track: trackio is not installed, and nothing is sent to it. Install trackio"]


def ended_run(tmp_path: Path) -> RunPaths:
    """A run of five steps whose log is there."""
    paths = make_run(tmp_path, recipe=Recipe(name="try"))
    steps = [
        StepDone(at=1e9 + step, step=step, loss=3 / step, learning_rate=1e-4, grad_norm=1.0, tokens=100, seconds=0.5)
        for step in range(1, 6)
    ]
    more = (Evaluated(at=1e9 + 9, step=5, loss=1.5, loss_tokens=9, rows=1, seconds=1.0),)
    write_log(paths, Started(at=1e9, job="train"), *steps, *more, Finished(at=1e9 + 10, outcome="done", step=5))
    return paths


def track(paths: RunPaths, name: str, **environment: str) -> None:
    """Let a tracker's process follow a run, with nothing to read answers from."""
    done = subprocess.run(
        [sys.executable, "-m", "studio.runs.beside", str(paths.root), name, "0"],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, troubles(paths)


def test_tensorboard_gets_real_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    paths = ended_run(tmp_path)
    track(paths, "tensorboard")
    read = EventAccumulator(str(paths.tensorboard))
    read.Reload()
    assert [(one.step, round(one.value, 3)) for one in read.Scalars("train/loss")] == [
        (1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75), (5, 0.6),
    ]  # fmt: skip
    assert [one.value for one in read.Scalars("eval/loss")] == [1.5]


@pytest.mark.slow
def test_wandb_writes_offline_without_asking(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    paths = ended_run(tmp_path)
    track(paths, "wandb", WANDB_MODE="disabled", WANDB_API_KEY="", NETRC=str(tmp_path / "none"))
    (file,) = paths.root.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in file.read_bytes()


@pytest.mark.slow
def test_mlflow_writes_into_a_folder_without_a_server(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    paths = ended_run(tmp_path)
    track(paths, "mlflow", MLFLOW_TRACKING_URI="")
    (losses,) = paths.root.glob("mlruns/*/*/metrics/train/loss")
    assert next(line.split()[1:] for line in losses.read_text().splitlines()) == ["3.0", "1"]
    track(paths, "mlflow", MLFLOW_TRACKING_URI="")  # as at a resume: the same run of MLflow goes on
    assert len(list(paths.root.glob("mlruns/*/*/metrics/train/loss"))) == 1


@pytest.mark.slow
def test_trackio_writes_where_it_keeps_its_projects(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    paths = ended_run(tmp_path)
    track(paths, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    with sqlite3.connect(tmp_path / "trackio" / "lora-studio.db") as base:
        assert base.execute(
            "select count(*) from metrics where cast(metrics as text) like '%train/loss%'"
        ).fetchone() == (5,)


def test_troubles_of_a_run_without_any_are_none(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    assert troubles(paths) == []
    assert summary_of(paths, History(), Status.starting)["warnings"] == []
