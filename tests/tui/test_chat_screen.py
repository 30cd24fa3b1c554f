"""Trying a model: two columns that fill as the answers come, and a process that ends with the screen."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from studio.core.recipe import Recipe
from studio.runs.chat import ChatProcess, ChatRequest
from studio.runs.layout import RunPaths
from studio.runs.system_prompt import SystemPrompt, keep_system_prompt
from studio.tui.app import StudioApp
from studio.tui.screens.chat import ChatScreen, Column
from tests.fakes.runs import CHECKOUT
from tests.tui.stories import BOTH, NARROW, assert_harmless, given, make_run, play, shown


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run with an adapter, as far as a screen looks at one."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    (base / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(4, 4)}, base / "model.safetensors")
    paths = make_run(tmp_path, "trained", Recipe(name="trained").with_("model.base", str(base)))
    paths.adapter.mkdir()
    (paths.adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"lora_A": torch.zeros(4, 4)}, paths.adapter / "adapter_model.safetensors")
    return paths


class _Processes:
    """Starts the fake model, and knows what was started."""

    def __init__(self) -> None:
        self.started: list[ChatProcess] = []

    def chat(self, request: ChatRequest) -> ChatProcess:
        self.started.append(ChatProcess(request, module="tests.fakes.chat_job"))
        return self.started[-1]


async def until(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, shown(pilot.app)  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        await pilot.pause()


@pytest.mark.slow
@BOTH
def test_two_answers_side_by_side(run: RunPaths, tmp_path: Path, size: tuple[int, int]) -> None:
    processes = _Processes()
    keep_system_prompt(run, SystemPrompt("Answer at once.", 57, 60))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await app.push_screen(ChatScreen(run, services=given(chat=processes.chat)))
        await until(pilot, lambda: "Ask something" in shown(app))
        assert "bfloat16 on cpu" in shown(app)
        assert "a note" in shown(app)
        assert "temperature 0 (the likeliest token)" in shown(app), "nothing of it is cut off"
        await until(pilot, lambda: "^r With base" in shown(app))  # the footer follows a moment later
        assert "Stop answer" not in shown(app), "there is none"
        assert "as in 57 of 60 rows of the training: Answer at once." in shown(app)
        await pilot.press(*"hello", "enter")
        await until(pilot, lambda: shown(app).count("4 tokens") == 2)
        text = shown(app)
        assert "base heard hello" in text
        assert "tuned heard hello" in text
        columns = {column.id: column.region for column in app.screen.query(Column)}
        assert columns["side-base"].right <= columns["side-tuned"].x
        assert_harmless(app)
        await pilot.press(*"again", "enter")
        await until(pilot, lambda: "after 3" in " ".join(shown(app).split()))
        await until(pilot, lambda: "^o System prompt" in shown(app))
        await pilot.press("ctrl+o")
        await until(pilot, lambda: "No system prompt; 57 of 60 rows" in shown(app) and "without the" in shown(app))
        await pilot.press(*"new", "enter")
        await until(pilot, lambda: "heard new after 0" in " ".join(shown(app).split()))
        await until(pilot, lambda: len(app.screen._said.turns) == 2)  # type: ignore[attr-defined]  # both have ended
        await pilot.press("ctrl+y")
        assert app.clipboard.startswith("base: base heard new after 0 \\x1b[31mred\n\ntuned: tuned heard new after 0")
        await pilot.press("f1")
        await until(pilot, lambda: "Questions to the tuned model" in shown(app))
        await pilot.press("f1", "ctrl+n")
        await until(pilot, lambda: "hello" not in shown(app))
        await pilot.press("ctrl+t")
        await until(pilot, lambda: "temperature 0.3" in shown(app))
        await pilot.press("ctrl+r", *"alone", "enter")
        await until(pilot, lambda: "tuned heard alone" in shown(app))
        assert "base heard" not in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, ChatScreen))
        await until(pilot, lambda: processes.started[0]._process.poll() is not None)

    play(story, tmp_path, size=size)


@pytest.mark.parametrize("sent", [False, True])
def test_what_is_typed_while_the_model_loads_is_kept_and_asked(
    run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    go = tmp_path / "go"
    monkeypatch.setenv("FAKE_CHAT_WAITS_FOR", str(go))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await app.push_screen(ChatScreen(run, services=given(chat=_Processes().chat)))
        await until(pilot, lambda: "loading the base model" in shown(app))
        assert "The model is loading" in shown(app)
        await pilot.press(*"hello")
        if sent:
            await pilot.press("enter")
            assert "your question is asked then" in shown(app)
        assert "hello" in shown(app)
        go.touch()
        if not sent:
            await until(pilot, lambda: "bfloat16 on cpu" in shown(app))
            assert app.screen.query_one(Input).value == "hello"
            assert "heard" not in shown(app), "not before enter"
            await pilot.press("enter")
        await until(pilot, lambda: "tuned heard hello" in shown(app))
        assert app.screen.query_one(Input).value == ""

    play(story, tmp_path, size=NARROW)


def test_a_model_alone_has_one_column_and_no_key_for_its_base(run: RunPaths, tmp_path: Path) -> None:
    def alone(request: ChatRequest) -> ChatProcess:
        return ChatProcess(replace(request, adapter=""), module="tests.fakes.chat_job")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await app.push_screen(ChatScreen(run, services=given(chat=alone)))
        await until(pilot, lambda: "Ask something" in shown(app))
        assert [column.id for column in app.screen.query(Column) if column.display] == ["side-tuned"]
        assert "With base" not in shown(app)

    play(story, tmp_path)


@pytest.mark.slow
def test_an_answer_is_stopped(run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CHAT", "slow")
    processes = _Processes()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await app.push_screen(ChatScreen(run, services=given(chat=processes.chat)))
        await until(pilot, lambda: "Ask something" in shown(app))
        await pilot.press(*"hello", "enter")
        await until(pilot, lambda: "wait" in shown(app))
        # Not offered in the middle of an answer: with base.
        await until(pilot, lambda: "^c Stop answer" in shown(app) and "With base" not in shown(app))
        await pilot.press(*"more")
        await pilot.press("ctrl+c")
        await until(pilot, lambda: "stopped" in shown(app))
        await until(pilot, lambda: "Stop answer" not in shown(app))
        assert app.screen.query_one(Input).value == "more", "what was typed meanwhile is there to be asked"

    play(story, tmp_path)
    processes.started[0]._process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "said"), [("refuses", "9.0 GB of memory"), ("dies", "something broke")])
def test_a_model_that_does_not_load_says_why(
    run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    monkeypatch.setenv("FAKE_CHAT", how)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await app.push_screen(ChatScreen(run, services=given(chat=_Processes().chat)))
        await until(pilot, lambda: said in shown(app))
        assert app.screen.query_one(Input).disabled

    play(story, tmp_path)


def test_a_run_without_an_adapter_says_so(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await app.push_screen(ChatScreen(make_run(tmp_path, "new"), services=given(chat=_Processes().chat)))
        await until(pilot, lambda: "has no adapter yet" in " ".join(shown(app).split()))
        assert "It has ended: escape goes back" in shown(app), "nothing is loading any more"
        offered = ("Stop answer", "New", "With base")
        await until(pilot, lambda: not any(key in shown(app) for key in offered))

    play(story, tmp_path)
