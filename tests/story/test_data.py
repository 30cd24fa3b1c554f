"""The data seen before the first step, in a real terminal: from the recipe and from the set-up."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.tiny_model import make_tiny_model
from tests.story.tmux import STUDIO, TMUX, Terminal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TMUX is None, reason="tmux is not installed")]
HOSTILE = "\x1b[2J\x1b]0;title\x07\u202ered [bold]no[/]"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short name: 80 columns cut long ones."""
    with tempfile.TemporaryDirectory(prefix="story-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(params=[(80, 24), (120, 40)], ids=["80x24", "120x40"])
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    make_tiny_model(tmp_path / "tiny")
    rows = [(f"what is {n} in words", f"it is {n}") for n in range(1, 41)]
    rows += [("tell a story", "and then " * 300), (HOSTILE, HOSTILE), (f"what is {5} in words", "it is 5")]
    lines = [{"prompt": asked, "completion": answer} for asked, answer in rows]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mine.toml").write_text(
        f"name = 'mine'\n[model]\nbase = '{tmp_path}/tiny'\n[data]\npath = '{tmp_path}/mine.jsonl'\n[eval]\nrows = 4\n"
    )
    opened = Terminal(*request.param, tmp_path / "home")
    yield opened
    opened.close()


@pytest.mark.parametrize("colours", ["", "NO_COLOR=1 "])
def test_the_rows_are_seen_before_the_first_step(terminal: Terminal, tmp_path: Path, colours: str) -> None:
    terminal.type(f"cd {tmp_path} && {colours}PYTHONPATH={Path.cwd()} {STUDIO} --recipe mine.toml", "Enter")
    terminal.until(lambda text: "Rank" in text and "Data" in text, "the configure screen")
    terminal.until(lambda text: "1 cut at 1 024" in text and "learnt" in text, "the worst of the data")
    terminal.type("d")
    terminal.until(lambda text: "▸it is 1<|im_end|>◂⏎" in text and "of 43" in text, "the first row")
    terminal.type("n")
    terminal.until(lambda text: "▸it is 2<|im_end|>◂⏎" in text, "the second")
    terminal.type("g")
    terminal.until(lambda text: "the number of a row" in text, "the line for it")
    terminal.type("42", "Enter")
    terminal.until(
        lambda text: r"\x1b[2J\x1b]0;title\x07\u202ered [bold]no[/]" in joined(text) and "row 42" in text,
        "row 42 and its escapes",
    )
    terminal.type("f")
    terminal.until(lambda text: "only cut rows" in text and "row 41" in text, "the row that is cut")
    terminal.type("End")
    terminal.until(lambda text: "1 734 below are lost" not in text and "<|im_end|>◂⏎" in text, "the end of the row")
    terminal.type("2")
    terminal.until(lambda text: "Tokens per example" in text and "an epoch" in text, "what the rows add up to")
    terminal.type("4")
    terminal.until(lambda text: "the same" in text, "the repeat")
    terminal.type("Escape")
    terminal.until(lambda text: "Rank" in text and "r Run" in text, "the configure screen again")
    terminal.type("q")
    terminal.until(lambda text: text.rstrip().endswith("ready:"), "the shell")


def test_the_rows_are_seen_in_the_set_up(terminal: Terminal, tmp_path: Path) -> None:
    answers = {"base": f"{tmp_path}/tiny", "data": f"{tmp_path}/mine.jsonl", "step": "data", "done": False}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "setup.json").write_text(json.dumps(answers))
    terminal.type(f"cd {tmp_path} && PYTHONPATH={Path.cwd()} {STUDIO} setup", "Enter")
    terminal.until(lambda text: "What is it to learn from?" in text and "43 rows" in text, "the data's question")
    terminal.type("d")
    terminal.until(lambda text: "▸it is 1<|im_end|>◂⏎" in text, "the first row")
    terminal.type("Escape")
    terminal.until(lambda text: "What is it to learn from?" in text, "the question again")


def test_rows_are_printed_without_a_screen(terminal: Terminal, tmp_path: Path) -> None:
    show = f"{STUDIO} data show mine.jsonl --model ./tiny --row 42"
    terminal.type(f"cd {tmp_path} && clear && TERM=dumb PYTHONPATH={Path.cwd()} {show} | tail -n 16", "Enter")
    text = terminal.until(lambda text: "an epoch" in text, "the row")
    assert r"\x1b[2J\x1b]0;title\x07\u202ered [bold]no[/]<|im_end|>◂" in joined(text)
    assert re.search(r"cut at 1,024 tokens: 1 of 43 examples", text)


def joined(screen: str) -> str:
    return "".join(line.rstrip() for line in screen.splitlines())
