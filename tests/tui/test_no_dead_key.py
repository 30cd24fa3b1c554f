"""No key that the foot or the help of a screen names is dead, wherever its cursor is.

Pressed, it shows something, opens something or says why it does not.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from textual.binding import Binding
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets._footer import FooterKey
from textual.worker import WorkerCancelled

from studio.core.errors import StudioError
from studio.core.events import Finished
from studio.probe.setup import Answers
from studio.runs.layout import RunPaths
from studio.runs.show import ShowProcess, ShowRequest
from studio.tui.app import StudioApp
from tests.fakes.runs import LiveWorker, make_run
from tests.tui.stories import Asked, given, play, services_that, shown, train, until
from tests.tui.test_merge_screen import Fake

pytestmark = pytest.mark.slow

EVERY_KEY = (200, 60)
"""A terminal whose foot has room for all keys."""
MOST_KINDS = 2
"""Kinds of widgets of a screen on which every key is pressed: each press takes a tenth of a second."""
_LEAVING = ("escape", "ctrl+l")
Open = Callable[[Pilot[None], StudioApp], Awaitable[None]]


def named(app: StudioApp) -> dict[str, Binding]:
    """The keys that foot and help name now; quitting is left out, as nothing is seen after it."""
    screen, keys = app.screen, {}
    at_foot = {key.key for key in screen.query(FooterKey)}
    for key, active in screen.active_bindings.items():
        binding, own = active.binding, active.node in (screen, app) and not key.startswith(("ctrl+", "super+"))
        alone = "focus_" in binding.action and len(screen.focus_chain) < 2
        if (
            active.enabled
            and not alone
            and binding.description
            and (key in at_foot or own)
            and "quit" not in binding.action
        ):
            keys[key] = binding
    return keys


def seen(app: StudioApp) -> tuple[object, ...]:
    """All that a key could change: screens, focus, messages, every cell with its style."""
    cells = [(one.text, str(one.style)) for strip in app.screen._compositor.render_strips() for one in strip]
    return tuple(app.screen_stack), app.screen.focused, len(app._notifications), cells


async def still(pilot: Pilot[None]) -> None:
    """Wait for what a key has begun; a screen that is left takes its workers with it."""
    await pilot.pause()
    with suppress(WorkerCancelled):
        await pilot.app.workers.wait_for_complete()
    await pilot.pause()


def is_there(screen: Screen[Any], binding: Binding) -> bool:
    """Whether a key chooses the view that is shown already, or goes up from the first line of a list."""
    return binding.action in (f"view('{getattr(screen, 'view', '')}')", "move('page_up')")


async def press_all(pilot: Pilot[None], app: StudioApp, reopen: Open) -> int:
    """Press every named key of a screen with the cursor on each kind of its widgets; return how many were pressed."""
    kinds = list({type(widget): widget for widget in reversed(app.screen.focus_chain)})[:MOST_KINDS]
    kind_of_screen, pressed, dead = type(app.screen), 0, []
    for kind in kinds or [None]:
        for key in sorted(named(app), key=lambda one: one in _LEAVING):
            if type(app.screen) is not kind_of_screen:
                await reopen(pilot, app)
            if kind is not None:
                app.screen.set_focus(next((one for one in app.screen.focus_chain if type(one) is kind), None))
                await pilot.pause()
            now = named(app)
            if key not in now or is_there(app.screen, now[key]):  # an earlier key has left nothing for it to do
                continue
            app.clear_notifications()
            await pilot.pause()
            before, depth = seen(app), len(app.screen_stack)
            await pilot.press(key)
            await still(pilot)
            pressed += 1
            if seen(app) == before:
                dead.append(f"{key} {now[key].description} on {kind and kind.__name__}")
            while len(app.screen_stack) > depth:
                app.pop_screen()
                await still(pilot)
    assert not dead
    return pressed


def ended(root: Path, name: str, at: float) -> RunPaths:
    paths = make_run(root, name, now=at)
    with LiveWorker(paths, clock=lambda: at) as worker:
        train(worker, range(1, 5))
        worker.emit(Finished, outcome="done", step=4)
    return paths


SCREENS: dict[str, tuple[tuple[str, str], ...]] = {
    "configure": (),
    "cards": (("g", "Plan for which card"),),
    "save": (("s", "Save the recipe"),),
    "runs": (("o", "second"),),
    "run": (("o", "second"), ("enter", "done after")),
    "leaving": (
        ("o", "second"),
        ("x", "y"),
    ),
    "merge": (("o", "second"), ("enter", "done after"), ("m", "Merge into")),
    "audit": (("a", "Audit"),),
    "setup-model": (("S", "train on?"), ("enter", "is to learn?")),
    "setup-goal": (("S", "train on?"), ("enter", "is to learn?"), ("enter", "learn from?"), ("enter", "for?")),
}
"""Screens, each by the keys that lead to it and what is seen once each was heeded."""


@pytest.mark.parametrize("name", SCREENS)
def test_keys_of_a_screen(tmp_path: Path, name: str) -> None:
    ended(tmp_path, "first", 1_000_000)
    last = ended(tmp_path, "second", 2_000_000)
    last.adapter.mkdir()
    (last.adapter / "adapter_config.json").write_text("{}")

    async def opened(pilot: Pilot[None], app: StudioApp) -> None:
        while len(app.screen_stack) > 1 and app.screen is not app.screen_stack[0]:
            app.pop_screen()
            await still(pilot)
        for key, words in SCREENS[name]:
            await pilot.press(key)
            await until(pilot, lambda words=words: words in shown(app))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        assert await press_all(pilot, app, opened) > 0

    def show(request: ShowRequest) -> ShowProcess:
        raise StudioError("not now")

    kept = {"recall_answers": Answers, "keep_answers": lambda _: None, "show_data": show}
    services = given(services_that(Asked(), refuses="not now"), merge_facts=Fake(tmp_path).facts, **kept)
    play(story, tmp_path, size=EVERY_KEY, services=services)
