"""In a real terminal (tmux): launch, watch, quit, reopen, stop. Seen by what stands on the screen."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.core.recipe import Recipe
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.recipe_file import dump_recipe
from studio.runs.status import Status, run_status
from studio.runs.supervise import stop
from tests.fakes.tiny_model import make_tiny_model
from tests.story.tmux import STUDIO, TMUX, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TMUX is None, reason="tmux is not installed")]


@pytest.fixture
def long_recipe(tmp_path: Path) -> Path:
    """A run that lasts until it is stopped."""
    model = make_tiny_model(tmp_path / "tiny")
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"what is {n}", "completion": f"{n} is {n}"} for n in range(40)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    recipe = Recipe(name="story", method="lora")
    for path, value in {
        "model.base": str(model),
        "model.dtype": "fp32",
        "data.path": str(data),
        "adapter.rank": 4,
        "train.micro_batch": 4,
        "train.accumulation": 1,
        "train.seq_len": 64,
        "train.steps": 1_000_000,
        "train.learning_rate": 1e-4,
        "train.recompute": "none",
        "eval.rows": 4,
        "eval.every": 200,
        "eval.samples": 1,
        "eval.sample_tokens": 4,
        "device.device": "cpu",
    }.items():
        recipe = recipe.with_(path, value)
    file = tmp_path / "story.toml"
    file.write_text(dump_recipe(recipe))
    return file


@pytest.fixture(params=[(80, 24), (120, 40)], ids=["80x24", "120x40"])
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    """A terminal; whatever runs when the test ends is stopped."""
    opened = Terminal(*request.param, tmp_path / "home")
    yield opened
    opened.close()
    for folder in (tmp_path / "home" / "runs").glob("*"):
        stop(RunPaths(folder), grace_seconds=10)


def test_launch_watch_quit_reopen_stop(terminal: Terminal, long_recipe: Path, tmp_path: Path) -> None:
    terminal.type(f"cd {Path.cwd()} && {STUDIO} --recipe {long_recipe}", "Enter")
    terminal.until(lambda text: "Rank" in text and "story" in text, "the configure screen")
    terminal.type("r")
    terminal.until(training, "the run screen")
    (folder,) = (tmp_path / "home" / "runs").iterdir()
    paths = RunPaths(folder)
    assert run_status(paths) is Status.running
    terminal.type("q")
    terminal.until(lambda text: text.rstrip().endswith("ready:"), "the shell again")
    before = steps(paths)
    time.sleep(1.5)
    assert run_status(paths) is Status.running
    assert steps(paths) > before, "leaving the studio must leave the run alive"

    terminal.type(f"clear; {STUDIO}", "Enter")
    terminal.until(lambda text: folder.name in text or ("story" in text and "step" in text), "the run found again")
    terminal.until(training, "its progress")
    terminal.type("x")
    terminal.until(lambda text: "Stop" in text or "stop" in text, "the question")
    terminal.type("y")
    terminal.until(lambda text: "stopped" in text, "that it stopped")
    assert run_status(paths) is Status.stopped
    assert (paths.adapter / "adapter_model.safetensors").is_file()
    terminal.type("q")
    terminal.until(lambda text: text.rstrip().endswith("ready:"), "the shell at the end")


def test_a_killed_worker_shows_as_crashed_with_its_last_words(
    terminal: Terminal, long_recipe: Path, tmp_path: Path
) -> None:
    terminal.type(f"cd {Path.cwd()} && {STUDIO} --recipe {long_recipe}", "Enter")
    terminal.until(lambda text: "Rank" in text, "the configure screen")
    terminal.type("r")
    terminal.until(training, "its progress")
    (folder,) = (tmp_path / "home" / "runs").iterdir()
    paths = RunPaths(folder)
    os.kill(json.loads(paths.process.read_text())["pid"], 9)
    terminal.until(lambda text: "crashed" in text, "that it crashed")
    for line in paths.events.read_text().splitlines()[:-1]:
        json.loads(line)


def training(screen: str) -> bool:
    """Whether this is the run screen of a run that takes steps."""
    return "x Stop" in screen and re.search(r"step\s+[1-9][\d ,]*/1[ ,]?000[ ,]?000", screen) is not None


def steps(paths: RunPaths) -> int:
    history = History()
    history.fold(read_events(paths.events))
    return history.last_step
