"""`lora-studio chat`: one question from a script, a conversation in a terminal, and what cannot be asked."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from studio.commands.chat import read_command
from studio.runs.layout import RunPaths
from studio.runs.system_prompt import SystemPrompt, keep_system_prompt
from tests.cli.conftest import Cli


@pytest.fixture
def run(cli: Cli, recipe: Path) -> str:
    """A finished training run with an adapter whose files are whole."""
    import torch
    from safetensors.torch import save_file

    document = cli("train", str(recipe), "--json").document
    adapter = Path(document["path"]) / "adapter"
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    save_file({"base_model.lora_A.weight": torch.zeros(4, 4)}, adapter / "adapter_model.safetensors")
    return str(document["run"])


def test_one_question_as_json(cli: Cli, run: str) -> None:
    outcome = cli("chat", run, "--prompt", "hello", "--json")
    assert outcome.code == 0, outcome.err
    answers = outcome.document["answers"]
    assert list(answers) == ["tuned", "base"]
    assert answers["tuned"]["text"].startswith("tuned heard hello after 0")
    assert answers["base"]["reason"] == "stop"
    assert "note: a note" in outcome.err


@pytest.mark.parametrize(
    ("rows", "words", "system", "whence", "told"),
    [
        (40, (), "Answer in one word.", "training", "as in 40 of 60 rows of the training: Answer in one word."),
        (40, ("--system", ""), "", "none", "No system prompt; 40 of 60 rows of the training had: Answer in one"),
        (40, ("--system", "Rhyme."), "Rhyme.", "given", "System prompt: Rhyme.; 40 of 60 rows of the training had"),
        (20, (), "", "none", "No system prompt; 20 of 60 rows of the training had"),
        (0, (), "", "none", ""),
    ],
)
def test_the_system_prompt_of_the_training_is_used_and_told(
    cli: Cli, run: str, home: Path, rows: int, words: tuple[str, ...], system: str, whence: str, told: str
) -> None:
    if rows:
        keep_system_prompt(RunPaths(home / "runs" / run), SystemPrompt("Answer in one word.", rows, 60))
    outcome = cli("chat", run, "--prompt", "hello", "--json", *words)
    assert (outcome.document["system"], outcome.document["system_from"]) == (system, whence)
    assert f"after {1 if system else 0}" in outcome.document["answers"]["tuned"]["text"], "the model is told it"
    assert told in outcome.err if told else "system prompt" not in outcome.err.lower()


def test_what_a_model_writes_cannot_steer_the_terminal(cli: Cli, run: str) -> None:
    outcome = cli("chat", run, "--prompt", "hello")
    assert "\x1b" not in outcome.out
    assert "\\x1b[31mred" in outcome.out
    assert "tuned:" in outcome.out
    assert "base:" in outcome.out


@pytest.mark.parametrize(("word", "sides"), [("--tuned-only", ["tuned"]), ("--base-only", ["tuned"])])
def test_one_side(cli: Cli, run: str, word: str, sides: list[str]) -> None:
    assert list(cli("chat", run, "--prompt", "hi", word, "--json").document["answers"]) == sides


@pytest.mark.parametrize(("prompt", "found"), [("", "is empty"), (" \n", "is empty"), ("\udcff hi", "not UTF-8")])
def test_a_question_that_cannot_be_asked_is_refused_at_once(cli: Cli, run: str, prompt: str, found: str) -> None:
    outcome = cli("chat", run, "--prompt", prompt, "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert found in outcome.err


def test_a_question_through_a_pipe(cli: Cli, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert "tuned heard from a pipe" in cli("chat", run).out


def test_a_model_that_cannot_be_loaded(cli: Cli, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CHAT", "refuses")
    outcome = cli("chat", run, "--prompt", "hi", "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert "9.0 GB of memory" in outcome.err


def test_a_process_that_dies_says_its_last_words(cli: Cli, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CHAT", "dies")
    outcome = cli("chat", run, "--prompt", "hi")
    assert outcome.code == 1
    assert "something broke" in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "nowhere"),
        (("RUN", "--temperature", "9"), "temperature is 9.0; wanted 0 to 5"),
        (("RUN", "--max-tokens", "0", "--top-p", "2"), "top p is 2.0"),
        (("RUN", "--max-tokens", "0"), "max new tokens is 0; wanted 1 to 1,000,000."),
    ],
)
def test_what_cannot_be_asked(cli: Cli, run: str, words: tuple[str, ...], said: str) -> None:
    outcome = cli("chat", *(run if word == "RUN" else word for word in words), "--prompt", "hi")
    assert outcome.code == 2
    assert said in outcome.err


def test_a_run_without_an_adapter_is_named(cli: Cli, run: str, home: Path) -> None:
    (home / "runs" / run / "adapter" / "adapter_config.json").unlink()
    outcome = cli("chat", run, "--prompt", "hi")
    assert outcome.code == 2
    assert "has no adapter yet" in outcome.err


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/quit", "quit", 0),
        ("/exit", "quit", 0),
        ("/temp 0.7", "temperature", 0.7),
        ("/max 20", "max_new_tokens", 20),
        ("/top-k x", "help", 0),
        ("/what", "help", 0),
        ("/system", "system", ""),
        ("/system Be brief. ", "system", "Be brief."),
    ],
)
def test_commands(line: str, name: str, value: float | str) -> None:
    command = read_command(line)
    assert command is not None
    assert (command.name, command.value) == (name, value)


def test_a_question_is_no_command() -> None:
    assert read_command("what is 1/2?") is None


class _Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *words: str, ctrl_c: Any = signal.SIG_DFL, **environment: str) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, ctrl_c)  # a test run in the background of a script ignores it
            os.environ.update(environment)
            os.execv(sys.executable, [sys.executable, "-m", "tests.fakes.cli", *words])  # noqa: S606
        self.seen = ""

    def until(self, text: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 4096).decode()
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self, pressing: str = "") -> int:
        """Wait for the end; press keys until then, as a user does whose first signal came before readline waits."""
        end, again = time.monotonic() + 60, 0.0
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            if pressing and time.monotonic() > again:
                self.type(pressing)
                again = time.monotonic() + 2
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it does not end")


@pytest.mark.slow
def test_a_conversation(run: str, home: Path) -> None:
    terminal = _Terminal("chat", run)
    terminal.until("you: ")
    terminal.type("one\n")
    terminal.until("tuned heard one after 0")
    terminal.until("base heard one after 0")
    terminal.until("you: ")
    terminal.type("two\n")
    terminal.until("tuned heard two after 2")
    terminal.until("you: ")
    terminal.type("/reset\n")
    terminal.until("a new conversation")
    terminal.type("/temperature 99\n")
    terminal.until("wanted 0 to 5")
    terminal.type("three\n")
    terminal.until("tuned heard three after 0")
    terminal.until("you: ")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN])
def test_ctrl_c_stops_an_answer_and_not_the_chat(run: str, home: Path, inherited: signal.Handlers) -> None:
    terminal = _Terminal("chat", run, ctrl_c=inherited, FAKE_CHAT="slow")
    terminal.until("you: ")
    terminal.type("one\n")
    terminal.until("wait")
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until("you: ")
    assert terminal.end(pressing="\x03") == 0


@pytest.mark.slow
def test_the_models_process_ends_with_who_asked(run: str, home: Path) -> None:
    import psutil

    terminal = _Terminal("chat", run)
    terminal.until("you: ")
    (child,) = psutil.Process(terminal.pid).children()
    os.kill(terminal.pid, signal.SIGKILL)
    assert terminal.end() == -signal.SIGKILL
    child.wait(60)
    assert not child.is_running()


def test_the_help_names_every_knob() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.cli", "chat", "--help"], capture_output=True, text=True, check=True
    )
    for knob in (
        "--temperature",
        "--top-p",
        "--top-k",
        "--repetition-penalty",
        "--max-tokens",
        "--seed",
        "--base-only",
    ):
        assert knob in done.stdout
