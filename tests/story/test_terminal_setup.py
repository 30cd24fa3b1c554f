"""The whole story in a real terminal: set-up, configure, warning, fit, launch, watch, quit, come back, compare."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.core.events import Finished
from studio.core.recipe import FIELDS, Recipe
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.supervise import stop
from studio.runs.worker import Worker
from tests.fakes.runs import make_run
from tests.fakes.tiny_model import make_tiny_model
from tests.story.tmux import STUDIO, TMUX, Terminal
from tests.tui.stories import train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TMUX is None, reason="tmux is not installed")]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short name: 80 columns cut long ones, and pytest's own are as long as its workers' names."""
    with tempfile.TemporaryDirectory(prefix="story-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(params=[(80, 24), (120, 40), (200, 60)], ids=["80x24", "120x40", "200x60"])
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    """A terminal, an earlier run to compare with, a model and data nearby; what still runs at the end is stopped."""
    make_tiny_model(tmp_path / "tiny")
    rows = [{"prompt": f"what is {n}", "completion": f"{n} is {n}"} for n in range(60)]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with Worker(make_run(tmp_path / "home", "earlier", Recipe(name="earlier"), now=1_000_000)) as worker:
        train(worker, range(1, 40))
        worker.emit(Finished, outcome="done", step=39)
    opened = Terminal(*request.param, tmp_path / "home")
    yield opened
    opened.close()
    for folder in (tmp_path / "home" / "runs").glob("*"):
        if run_status(RunPaths(folder)).live:
            stop(RunPaths(folder), grace_seconds=10)


def go_to(terminal: Terminal, path: str) -> None:
    """Find a field by its path; the words beside the form name it then."""
    terminal.type("/")
    terminal.until(lambda text: "Find a field" in text, "what finds a field")
    terminal.type("-l", path)
    terminal.until(lambda text: path in paths_on(text), "that it is found")
    terminal.type("Enter")
    terminal.until(lambda text: "Find a field" not in text and path in paths_on(text), "the field")


def paths_on(screen: str) -> set[str]:
    """Every path of a recipe that is named: a half-painted screen names none that is new."""
    return set(re.findall(r"[a-z]+\.[a-z_]+", screen)) & FIELDS.keys()


def turn_to(terminal: Terminal, path: str, value: str) -> None:
    """Type a value into a slider."""
    go_to(terminal, path)
    terminal.type(*value, "Enter")
    terminal.settle()


def test_the_whole_story(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type(f"cd {tmp_path} && PYTHONPATH={Path.cwd()} {STUDIO} setup", "Enter")
    terminal.until(lambda text: "What will it train on?" in text and "Memory" in text, "the machine")
    terminal.type("Down", "Enter")
    terminal.until(lambda text: "Plan for which card?" in text, "the cards")
    terminal.type("-l", "3060 laptop")
    # Large screens have a ladder of cards beside the list: the card is looked for right under what was typed.
    terminal.until(lambda text: re.search(r"3060 laptop.*\n.*RTX 3060 Laptop +6\.0 GiB +laptop", text), "the one card")
    terminal.type("Enter")
    terminal.until(lambda text: "Which model is to learn?" in text, "the model's question")
    terminal.until(lambda text: "0.13 B parameters" in text and tmp_path.name in text, "the models")
    terminal.type("Down")
    terminal.until(lambda text: "0.00 B parameters" in text, "what is known of the small model")
    terminal.type("Enter")
    terminal.until(lambda text: "What is it to learn from?" in text and "mine.jsonl" in text, "the data's question")
    terminal.type("Down")
    terminal.until(lambda text: "60 rows" in text, "the check of the data")
    terminal.type("Enter")
    terminal.until(lambda text: "What is it for?" in text, "the goal's question")
    terminal.type("Enter")
    terminal.until(lambda text: "Look at every knob first" in text and "fits" in text, "the recommendation")
    terminal.type("Enter")

    terminal.until(lambda text: "Rank" in text and "adapter.rank" in text, "the configure screen")
    turn_to(terminal, "train.micro_batch", "512")
    turn_to(terminal, "train.seq_len", "32768")
    # Once the rows were looked at, it is said instead at which length, as no row is longer, it fits.
    terminal.until(lambda text: re.search("does not fit|fits at", text) is not None, "the warning")
    terminal.until(lambda text: re.search(r"\bf Fit\b", text) is not None, "the key that helps")
    terminal.type("f")
    terminal.until(lambda text: not re.search("does not fit|fits at", text) and "u Undo" in text, "that it fits")
    turn_to(terminal, "train.steps", "1000000")

    terminal.type("r")
    asked = terminal.until(lambda text: training(text) or "Launch it here" in text, "the run, or the CPU's question")
    if "Launch it here" in asked:
        terminal.type("y")
    terminal.until(training, "the run")
    (folder,) = (path for path in (tmp_path / "home" / "runs").iterdir() if not path.name.startswith("earlier"))
    terminal.type("q")
    terminal.until(lambda text: text.rstrip().endswith("ready:"), "the shell")
    assert run_status(RunPaths(folder)) is Status.running
    terminal.type(f"clear; PYTHONPATH={Path.cwd()} {STUDIO}", "Enter")
    terminal.until(training, "the run found again")
    terminal.type("x")
    terminal.until(lambda text: "Stop this run?" in text, "the question")
    terminal.type("y")
    terminal.until(lambda text: "stopped after" in text, "that it stopped")
    terminal.type("Escape")
    terminal.settle()
    terminal.type("o")
    terminal.until(lambda text: "2 runs in" in text, "the list")
    terminal.type("Space", "Down", "Space", "c")
    terminal.until(lambda text: "of 2 runs" in text and "recipes differ" in text, "the comparison")
    terminal.type("q")
    terminal.until(lambda text: text.rstrip().endswith("ready:"), "the shell at the end")


def training(screen: str) -> bool:
    """Whether this is the run screen of a run that takes steps."""
    return "x Stop" in screen and re.search(r"step\s+[1-9][\d ,]*/1[ ,]?000[ ,]?000", screen) is not None
