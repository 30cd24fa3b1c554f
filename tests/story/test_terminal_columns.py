"""A file of columns that nobody knows, in a real terminal: the set-up asks, and the recipe names them."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.story.tmux import STUDIO, TMUX, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TMUX is None, reason="tmux is not installed")]
HOSTILE = "\x1b]0;owned\x07\x1b[2Jred\u202e"


@pytest.fixture(params=[(80, 24), (120, 40)], ids=["80x24", "120x40"])
def terminal(request: pytest.FixtureRequest) -> Iterator[tuple[Terminal, Path]]:
    """A terminal in a folder with one data file."""
    with tempfile.TemporaryDirectory(prefix="story-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        rows = [{"Nr": n, "Frage": f"What is {n}?", "Antwort": f"It is {n}.", HOSTILE: HOSTILE} for n in range(60)]
        (folder / "fragen.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        opened = Terminal(*request.param, folder / "home")
        yield opened, folder
        opened.close()


def test_the_set_up_asks_which_column_is_which(terminal: tuple[Terminal, Path]) -> None:
    shown, folder = terminal
    shown.type(f"cd {folder} && PYTHONPATH={Path.cwd()} {STUDIO} setup", "Enter")
    shown.until(lambda text: "What will it train on?" in text and "Memory" in text, "the machine")
    shown.type("Enter")
    shown.until(lambda text: "0.13 B parameters" in text, "the models")
    shown.type("Enter")
    shown.until(lambda text: "What is it to learn from?" in text and "fragen.jsonl" in text, "the data's question")
    shown.type("Down")
    told = shown.until(lambda text: "Enter asks which of them is the prompt" in text, "that its columns are not known")
    assert "Nr, Frage, Antwort" in told
    shown.type("Enter")
    asked = shown.until(lambda text: "Which column holds what is asked?" in text, "the question for the prompt")
    assert "What is 0?" in asked and "owned" in asked and "\u202e" not in asked
    shown.type("Down", "Enter")
    shown.until(lambda text: "Which column holds the answer" in text, "the question for the answer")
    shown.type("Down", "Enter")
    shown.until(lambda text: "What is it for?" in text, "the goal's question")
    shown.type("Enter")
    shown.until(lambda text: "Look at every knob first" in text, "the recommendation")
    shown.type("C-l")
    shown.settle()
    shown.type("q")
    shown.until(lambda text: text.rstrip().endswith("ready:"), "the shell")
    answers = json.loads((folder / "home" / "setup.json").read_text())
    assert answers["columns"] == [["prompt", "Frage"], ["completion", "Antwort"]]
