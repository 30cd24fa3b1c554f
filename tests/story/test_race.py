"""The race from the studio in a real terminal, on the embedded model: started, watched, read, remembered."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.core.recipe import Recipe
from studio.probe.audit import read_report
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe, load_recipe
from studio.runs.status import run_status
from studio.runs.store import list_runs
from studio.runs.supervise import stop
from tests.story.tmux import STUDIO, TMUX, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TMUX is None, reason="tmux is not installed")]

RACE_SECONDS = 600


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(120, 40, tmp_path / "home")
    yield opened
    opened.close()
    for folder in (tmp_path / "home" / "runs").glob("*"):
        if run_status(RunPaths(folder)).live:
            stop(RunPaths(folder), grace_seconds=10)


def small(recipe: Recipe) -> Recipe:
    """The demo with few rows: its model, its data, its method."""
    changes = {"train.micro_batch": 2, "train.accumulation": 1, "eval.rows": 6, "eval.every": 0, "eval.samples": 0}
    for path, value in changes.items():
        recipe = recipe.with_(path, value)
    return recipe


def test_a_race_is_started_read_and_remembered(terminal: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(dump_recipe(small(load_recipe(Path("recipes/demo.toml")))))
    runs = tmp_path / "home" / "runs"
    terminal.type(f"cd {Path.cwd()} && {STUDIO} --recipe {file}", "Enter")
    terminal.until(lambda text: "not measured" in text, "the trade, its quality not measured yet")
    terminal.type("a")
    terminal.until(lambda text: "No audit yet" in text, "the audit screen")
    terminal.type("e")
    terminal.until(lambda text: "Optimizer steps of each lane" in text, "what can be chosen")
    terminal.type("Down", "Down")
    terminal.until(lambda text: "⏎ Edit" in text, "the keys of a line")
    terminal.type("Enter", "C-u")
    terminal.until(lambda text: "to the end of" in text, "an empty line")
    terminal.type("2", "Enter")
    terminal.settle()
    terminal.type("r")
    terminal.until(lambda text: "racing" in text, "the race on the run screen")
    race = next(info.paths for info in list_runs(runs) if info.job == "audit")
    began = time.monotonic()
    while run_status(race).live and time.monotonic() - began < RACE_SECONDS:
        time.sleep(1)
    report = read_report(race)
    assert report is not None, (race.root / "output.log").read_text()[-2000:]
    terminal.type("Escape")
    screen = terminal.until(lambda text: "held-out loss, measured" in text, "the table of the race")
    for lane in report["lanes"]:
        assert f"{lane['task']['loss']['value']:.4f}" in screen, "the report's own figures"
        assert lane["steps"] == 2
    for wanted in ("lora", "qlora", "base held in", "16-bit", "nf4+dq", "peak memory, estimated", "tokens/s, measured"):
        assert wanted in screen
    terminal.type("Escape")
    screen = terminal.until(lambda text: "4 bit adds" in text, "the outcome beside the sliders")
    measured = re.search(r"held-out loss\s+(\d\.\d+)\s+(\d\.\d+)", screen)
    assert measured is not None, screen
    losses = [f"{lane['task']['loss']['value']:.3f}" for lane in report["lanes"]]
    assert list(measured.groups()) == losses
