"""No key that the foot, the help or the frame of a screen names is dead, wherever its cursor is.

Pressed, it shows something, opens something or says why it does not.
"""

import json
import queue
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from textual._compositor import Compositor
from textual.binding import Binding
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets._footer import FooterKey
from textual.worker import WorkerCancelled

from studio.core.events import Finished
from studio.probe.setup import Answers
from studio.runs.chat import Answered, Piece, Ready, TurnDone
from studio.runs.held_out import HeldOutRecord, keep_record
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from studio.runs.show import Opened, RowShown, ShownExample, Summary
from studio.tui.app import StudioApp
from studio.tui.services import Services
from tests.fakes.runs import LiveWorker, make_run
from tests.tui.stories import Asked, given, play, services_that, shown, train
from tests.tui.test_audit_screen import an_audit
from tests.tui.test_merge_screen import Fake, merge_run
from tests.tui.test_setup_screen import Told, finding

pytestmark = pytest.mark.slow

EVERY_KEY = (200, 24)
"""A terminal whose foot has room for all keys; few rows, because most of the time is spent on drawing them."""
MOST_KINDS = 2
"""Kinds of widgets of a screen on which every key is pressed."""
_LEAVING = ("escape", "ctrl+l")
_TALKS = "_talk"
"""The worker that listens to a process for as long as a screen is there."""


def named(app: StudioApp) -> dict[str, Binding]:
    """The keys that foot, help and frame name now; quitting is left out, as nothing is seen after it."""
    screen, keys = app.screen, dict[str, Binding]()
    at_foot = {key.key for key in screen.query(FooterKey)}
    framed = any("⏎" in str(child.border_subtitle) for child in screen.children)
    for key, active in screen.active_bindings.items():
        binding, own = active.binding, active.node in (screen, app) and not key.startswith(("ctrl+", "super+"))
        alone = "focus_" in binding.action and len(screen.focus_chain) < 2
        told = (binding.description and (key in at_foot or own)) or (framed and key == "enter")
        if active.enabled and told and not alone and "quit" not in binding.action:
            keys[key] = binding
    return keys


def seen(app: StudioApp) -> tuple[object, ...]:
    """All that a key could change: screens, focus, messages, clipboard, every cell with its style."""
    cells = [(one.text, one.style) for strip in app.screen._compositor.render_strips() for one in strip]
    return tuple(app.screen_stack), app.screen.focused, len(app._notifications), app.clipboard, cells


async def still(pilot: Pilot[None]) -> None:
    """Wait for what a key has begun; a screen that is left takes its workers with it."""
    await pilot.pause()
    if begun := [worker for worker in pilot.app.workers if worker.name != _TALKS and not worker.is_finished]:
        with suppress(WorkerCancelled):
            await pilot.app.workers.wait_for_complete(begun)
        await pilot.pause()


def is_there(screen: Screen[Any], binding: Binding) -> bool:
    """Whether a key chooses the view that is shown already, or goes up from the first line of a list or report."""
    return binding.action in (f"view('{getattr(screen, 'view', '')}')", "move('page_up')", "turn_report(-1)")


async def go_to(pilot: Pilot[None], app: StudioApp, way: "Way") -> None:
    """Go back to the first screen, and from there to the one of a way."""
    while len(app.screen_stack) > 1 and app.screen is not app.screen_stack[0]:
        app.pop_screen()
        await pilot.pause()
    for key, words in way:
        await pilot.press(*([key] if key else []))
        for _ in range(600):
            await still(pilot)
            if words in shown(app):
                break
        else:
            raise AssertionError(f"{key} never showed {words}:\n{shown(app)}")


async def dead_keys(pilot: Pilot[None], app: StudioApp, way: "Way") -> list[str]:
    """Press every named key of a screen with the cursor on each kind of its widgets; return those that did nothing."""
    await go_to(pilot, app, way)
    of_kind = {type(widget): widget for widget in reversed(app.screen.focus_chain)}
    kinds: list[type[Widget] | None] = [*of_kind][:MOST_KINDS] or [None]
    kind_of_screen, pressed, dead = type(app.screen), 0, list[str]()
    for kind in kinds:
        for key in sorted(named(app), key=lambda one: one in _LEAVING):
            if type(app.screen) is not kind_of_screen:
                await go_to(pilot, app, way)
            app.clear_notifications()
            if kind is not None and type(app.screen.focused) is not kind:
                app.screen.set_focus(next((one for one in app.screen.focus_chain if type(one) is kind), None))
            await pilot.pause()
            now = named(app)
            if key not in now or is_there(app.screen, now[key]):  # an earlier key has left nothing for it to do
                continue
            if kind not in kinds[:1] and app.screen.active_bindings[key].node is app:
                continue  # the program's own keys, such as the theme's, are pressed once on each screen
            before, depth = seen(app), len(app.screen_stack)
            await pilot.press(key)
            await still(pilot)
            pressed += 1
            if seen(app) == before:
                dead.append(f"{key} {now[key].description} on {kind and kind.__name__} of {kind_of_screen.__name__}")
            while len(app.screen_stack) > depth:
                app.pop_screen()
                await pilot.pause()
    assert pressed > 0, f"no key of {app.screen} was pressed"
    return dead


class Process:
    """The parent's end of a process that has said what it has to say, and answers at once."""

    def __init__(self, *said: object) -> None:
        self._said: queue.Queue[object] = queue.Queue()
        self._tell(*said)

    def _tell(self, *said: object) -> None:
        for event in said:
            self._said.put(event)

    def next_event(self, seconds: float) -> object:
        with suppress(queue.Empty):
            return self._said.get(timeout=seconds)
        return None

    def close(self) -> None:
        """There is no process."""


class Rows(Process):
    """Shows six rows, one of them cut."""

    def __init__(self) -> None:
        super().__init__(Opened(described="six rows", rows=6), Summary(6, 6, 8))

    def _row(self, place: int) -> RowShown:
        text = tuple(f"row {place} {'says a word ' * 9}".split(" "))
        example = ShownExample("", tuple(range(len(text))), text, ((2, len(text)),), (0,), len(text), 20)
        return RowShown(place, 6, place + 1, examples=(example,))

    def ask_place(self, place: int) -> None:
        self._tell(self._row(place))

    def ask_next(self, place: int, step: int, only: str = "all", words: str = "", *, around: bool = False) -> None:
        self.ask_place((place + step) % 6)


class Chat(Process):
    """Answers with a word; asked for a long story it goes on until it is told to end."""

    def __init__(self) -> None:
        super().__init__(Ready(("tuned", "base"), "cpu", "bfloat16", ("a note",)))

    def ask(self, asked: dict[str, object], sampling: object) -> None:
        for side in asked:
            self._tell(Piece(side, "a word"), Answered(side, 1, 0.1, "stop"))
        self._tell(TurnDone())

    def cancel(self) -> None:
        self._tell(TurnDone())


def ended(root: Path, name: str, at: float) -> RunPaths:
    """A training that has ended, with an adapter and rows that it held out."""
    paths = make_run(root, name, now=at)
    with LiveWorker(paths, clock=lambda: at) as worker:
        train(worker, range(1, 5))
        worker.emit(Finished, outcome="done", step=4)
    paths.adapter.mkdir()
    (paths.adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    header = json.dumps({"lora_A": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (paths.adapter / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    keep_record(paths, HeldOutRecord("embedded", "embedded", "auto", held_out=("00" * 12,) * 7))
    return paths


Way = tuple[tuple[str, str], ...]
"""Keys, each with what is seen once it was heeded; an empty key waits."""
_RUNS, _MODEL, _DATA = ("o", "second"), ("enter", "is to learn?"), ("enter", "learn from?")
_SETUP = (("S", "train on?"), _MODEL)
WAYS: dict[str, dict[str, Way]] = {
    "recipe": {
        "configure": (),
        "cards": (("g", "Plan for which card"),),
        "save": (("s", "Save the recipe"),),
        "open": (("O", "Open a recipe"), ("", "Rank")),
        "find": (("slash", "Find a field"),),
        "help": (("question_mark", "Keys"),),
        "data": (("d", "row 1"),),
    },
    "runs": {
        "runs": (_RUNS,),
        "run": (_RUNS, ("enter", "done after")),
        "note": (_RUNS, ("n", "A note on")),
        "compare": (_RUNS, ("space", "1 "), ("down", ""), ("space", ""), ("c", "of 2 runs")),
        "merge": (_RUNS, ("enter", "done after"), ("m", "Merge into")),
        "merged": (_RUNS, ("tab", "merge"), ("m", "Verified")),
        "chat": (_RUNS, ("enter", "done after"), ("t", "Ask something")),
        "audit": (("a", "audit-base"),),
        "audit-ask": (_RUNS, ("a", "Start (r)")),
        "deleting": (_RUNS, ("d", "delete it")),
    },
    "no runs": {"runs": (("o", "No runs"),), "audit": (("a", "No audit"),)},
    "set-up": {
        "machine": _SETUP[:1],
        "model": _SETUP,
        "data": (*_SETUP, _DATA),
        "goal": (*_SETUP, _DATA, ("enter", "for?")),
        "recipe": (*_SETUP, _DATA, ("enter", "for?"), ("enter", "Start training")),
    },
    "columns": {"columns": (*_SETUP, _DATA, ("", "frage"), ("enter", "antwort"))},
}
"""Screens by what the studio begins with, each by the keys that lead to it."""


def services(root: Path, begin: str) -> Services:
    """Services that start nothing."""
    file = root / "mine.jsonl"
    names = ("frage", "antwort") if begin == "columns" else ("prompt", "completion")
    file.write_text("".join(json.dumps(dict.fromkeys(names, f"word {place}")) + "\n" for place in range(9)), "utf-8")
    settled = services_that(Asked(), refuses="not now")
    looks = finding(Told(), settled, files=(file,))
    unasked = {"known_fits": lambda _: None, "guess_data": lambda _: None, "keep_answers": lambda _: None}
    known = {"recall_answers": lambda: Answers(data=str(file)), "merge_facts": Fake(root).facts}
    return given(looks, show_data=lambda _: Rows(), chat=lambda _: Chat(), **unasked, **known)


@pytest.mark.parametrize("begin", WAYS)
def test_keys_of_screens(tmp_path: Path, begin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one of the keys saves a recipe
    # `seen` draws the screen; what Textual draws besides, for a terminal that is not there, takes a third of the time.
    monkeypatch.setattr(Compositor, "render_update", lambda self, **_: self._dirty_regions.clear())
    if begin == "runs":
        ended(tmp_path, "first", 1_000_000)
        ended(tmp_path, "second-before", 1_500_000)  # one is deleted
        last = ended(tmp_path, "second", 2_000_000)
        an_audit(tmp_path)
        merge_run(
            tmp_path, MergeRequest(str(last.adapter), "embedded", run=str(last.root), out=str(tmp_path / "merged"))
        )
    found: dict[str, list[str]] = {}

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        for name, way in WAYS[begin].items():
            if dead := await dead_keys(pilot, app, way):
                found[name] = dead

    play(story, tmp_path, size=EVERY_KEY, services=services(tmp_path, begin))
    assert not found
