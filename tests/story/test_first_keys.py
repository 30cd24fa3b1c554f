"""The first visit by keys, in a real terminal: the installed program, the guided set-up, a run on an own file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from studio.core.recipe import Recipe
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import load_recipe
from studio.runs.status import run_status
from studio.runs.supervise import stop
from tests.story.conftest import Installed
from tests.story.tmux import TMUX, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TMUX is None, reason="tmux is not installed")]

MOST_KEYS = 8
SIZES = [(80, 24), (120, 40), (200, 60)]


class Visitor:
    """Somebody at a terminal who counts the keys, and looks whether every name is whole."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self.keys = 0

    def press(self, *keys: str) -> None:
        for key in keys:
            self._terminal.type(key)
            self.keys += 1

    def sees(self, *words: str) -> str:
        """Wait until all words stand on the screen, whole."""
        return self._terminal.until(lambda text: all(word in text for word in words), " and ".join(words))

    def sees_either(self, *words: str) -> str:
        """Wait until one of the words stands on the screen, and return which."""
        text = self._terminal.until(lambda text: any(word in text for word in words), " or ".join(words))
        return next(word for word in words if word in text)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def visitor(request: pytest.FixtureRequest, visited: Installed) -> Iterator[Visitor]:
    """A terminal in a folder with the own file; the program is on its way to the set-up. What runs in the end ends."""
    (visited.home / "setup.json").unlink(missing_ok=True)
    terminal = Terminal(*request.param, visited.home)
    offline = f"HF_HUB_OFFLINE=1 HF_HOME={visited.folder}/hub"
    terminal.type(f"cd {visited.folder} && {offline} {visited.program} setup", "Enter")
    yield Visitor(terminal)
    terminal.close()
    for folder in (visited.home / "runs").glob("task-*"):
        if run_status(RunPaths(folder)).live:
            stop(RunPaths(folder), grace_seconds=5)


def test_an_own_file_is_a_run_after_eight_keys(visitor: Visitor, visited: Installed, recommended: Path) -> None:
    before = set((visited.home / "runs").glob("task-*"))
    visitor.sees("What will it train on?", str(visited.home / "runs"))
    visitor.press("Enter")
    visitor.sees("Which model is to learn?", "SmolLM2-135M-Instruct", "0.13 B parameters")
    visitor.press("Enter")
    visitor.sees("What is it to learn from?", f"{visited.folder}/mine.jsonl")
    visitor.press("Down")
    visitor.sees("60 rows", "asked ")
    visitor.press("Enter")
    visitor.sees("What is it for?", "One narrow task", "Continue pre-training")
    visitor.press("Enter")
    visitor.sees("Start training now", "Look at every knob first")
    visitor.press("Enter")
    if visitor.sees_either("Stop", "Launch it here", "r Run") == "r Run":
        visitor.press("r")
    if visitor.sees_either("x Stop", "Launch it here") == "Launch it here":
        visitor.press("y")
    visitor.sees("x Stop")
    (folder,) = set((visited.home / "runs").glob("task-*")) - before
    visitor.sees(folder.name)
    assert visitor.keys <= MOST_KEYS
    assert run_status(RunPaths(folder)).live
    assert read_job(RunPaths(folder), Recipe) == load_recipe(recommended)
