"""No key at the foot of the two main screens is dead: pressed, it shows something, opens something or says why not."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets._footer import FooterKey
from textual.worker import WorkerCancelled

from studio.core.events import Finished
from studio.runs.layout import RunPaths
from studio.tui.app import StudioApp
from tests.fakes.runs import LiveWorker, make_run
from tests.tui.stories import play, train, until

pytestmark = pytest.mark.slow

EVERY_KEY = (200, 60)
"""A terminal whose foot has room for all keys."""
_LEAVING = ("escape", "ctrl+l")
Open = Callable[[Pilot[None], StudioApp], Awaitable[None]]


def foot(app: StudioApp) -> dict[str, str]:
    """The keys that the foot shows, with what they say; quitting is left out, as nothing is seen after it."""
    return {key.key: key.description for key in app.screen.query(FooterKey) if key.action != "app.quit"}


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


async def press_all(pilot: Pilot[None], app: StudioApp, reopen: Open) -> set[str]:
    """Press every key of this screen's foot and return what they say."""
    base, depth, dead = app.screen, len(app.screen_stack), []
    words = foot(app)
    for key in sorted(words, key=lambda one: one in _LEAVING):
        if app.screen is not base:
            await reopen(pilot, app)
            base, depth = app.screen, len(app.screen_stack)
        if key not in foot(app):  # an earlier key has left nothing for it to do
            continue
        before = seen(app)
        await pilot.press(key)
        await still(pilot)
        if seen(app) == before:
            dead.append(f"{key} {words[key]}")
        while len(app.screen_stack) > depth:
            app.pop_screen()
            await still(pilot)
    assert not dead
    return set(words.values())


def ended(root: Path, name: str, at: float) -> RunPaths:
    paths = make_run(root, name, now=at)
    with LiveWorker(paths, clock=lambda: at) as worker:
        train(worker, range(1, 5))
        worker.emit(Finished, outcome="done", step=4)
    return paths


@pytest.mark.parametrize("key", ["", "o"], ids=["configure", "runs"])
def test_keys_of_a_screen(tmp_path: Path, key: str) -> None:
    ended(tmp_path, "first", 1_000_000)
    ended(tmp_path, "second", 2_000_000)

    async def opened(pilot: Pilot[None], app: StudioApp) -> None:
        while len(app.screen_stack) > 1 and app.screen is not app.screen_stack[0]:
            app.pop_screen()
            await still(pilot)
        if key:
            await pilot.press(key)
            await until(pilot, lambda: len(foot(app)) > 3)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await opened(pilot, app)
        assert len(await press_all(pilot, app, opened)) > 5

    play(story, tmp_path, size=EVERY_KEY)
