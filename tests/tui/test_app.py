"""The app as a whole: what it opens on, what it leaves alone, what it never imports."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.core.events import Finished
from studio.core.recipe import Recipe
from studio.launch.start import start as start_job
from studio.probe.forecast import Forecaster
from studio.runs.control import requested
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.tui.app import StudioApp
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.run import RunScreen
from tests.fakes.runs import MODULE, LiveWorker, fake_environment, wait_for
from tests.tui.stories import (
    Asked,
    card_of,
    forecaster_on,
    given,
    make_run,
    play,
    services_that,
    settle,
    shown,
    train,
    until,
)

NEVER = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
ESTIMATORS = ("studio.core.vram", "studio.core.fit", "studio.probe", "studio.launch")
NOT_FOR_THE_FIRST_FRAME = (
    "plotext",
    "pynvml",
    "tomlkit",
    "numpy",
    "pyarrow",
    "huggingface_hub",
    "psutil",
    "filelock",
    "studio.runs.log",
    "studio.tui.screens.fill",
    "studio.tui.screens.cards",
)


def imported_by(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after running some code."""
    script = f"{code}\nimport sys; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_the_screens_never_import_what_jobs_need() -> None:
    every = "\n".join(
        f"import {'.'.join(path.with_suffix('').parts)}"
        for folder in (Path("studio/tui"), Path("widgets"))
        for path in sorted(folder.rglob("*.py"))
        if path.name != "__init__.py"
    )
    assert "studio.tui.screens.run" in every
    loaded = imported_by(every + "\nimport studio.launch.start, studio.probe.cards, studio.runs.supervise, plotext")
    assert loaded.isdisjoint(NEVER)
    assert "textual" in loaded


def test_the_first_frame_waits_for_nothing_it_does_not_show() -> None:
    loaded = imported_by("import studio.tui.app")
    assert loaded.isdisjoint((*NEVER, *NOT_FOR_THE_FIRST_FRAME))
    assert not [name for name in loaded if name.startswith(ESTIMATORS)], "they take an eighth of the time to it"


def test_the_newest_live_run_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_run(tmp_path, "first", now=1_000_000), make_run(tmp_path, "second", now=2_000_000)
    with LiveWorker(first) as one, LiveWorker(second) as two:
        train(one, range(1, 3))
        train(two, range(1, 5))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await until(pilot, lambda: isinstance(app.screen, RunScreen))
            assert isinstance(app.screen, RunScreen)
            assert app.screen.paths.name == second.name
            assert "2 runs are alive" in " ".join(shown(app).split())
            await settle(pilot)
            assert not looked, "nobody sees the forecast yet"
            assert not guessed, "nor the data"
            await pilot.press("escape")
            await settle(pilot)
            assert isinstance(app.screen, ConfigureScreen)
            await until(pilot, lambda: bool(looked and guessed))
            await pilot.press("q")

        looked: list[str] = []
        guessed: list[Recipe] = []
        on_a_card = forecaster_on(card_of())

        def forecaster(recipe: Recipe, planned: str) -> Forecaster:
            looked.append(planned)
            return on_a_card(recipe, planned)

        play(story, tmp_path, services=given(services_that(Asked(), forecaster=forecaster), guess_data=guessed.append))
        told = capsys.readouterr().err
        assert first.name in told
        assert second.name in told
        one.emit(Finished, outcome="done")
        two.emit(Finished, outcome="done")


def test_without_a_live_run_the_recipe_stays(tmp_path: Path) -> None:
    with LiveWorker(make_run(tmp_path)) as worker:
        train(worker, range(1, 3))
        worker.emit(Finished, outcome="done")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await settle(pilot)
        assert isinstance(app.screen, ConfigureScreen)

    play(story, tmp_path)


def test_launch_at_once(tmp_path: Path) -> None:
    asked = Asked()
    services = services_that(asked, makes=lambda: make_run(tmp_path, "made"))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert [recipe.name for recipe in asked.started] == ["at once"]

    play(story, tmp_path, recipe=Recipe(name="at once"), services=services, launch=True)


def test_a_long_message_stays_as_long_as_it_takes_to_read(tmp_path: Path) -> None:
    """Why a resume was refused is nine lines in a narrow terminal, and was gone after five seconds."""

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        for message in ("Undone.", "x" * 300):
            app.screen.notify(message, markup=False)
        app.notify("y" * 300, timeout=3, markup=False)
        await settle(pilot)
        assert [note.timeout for note in app._notifications] == [app.NOTIFICATION_TIMEOUT, 20.0, 3]

    play(story, tmp_path)


def test_the_command_palette_and_help_open_on_every_screen(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("ctrl+p")
        await settle(pilot)
        await pilot.press("escape")
        await settle(pilot)
        assert isinstance(app.screen, ConfigureScreen)

    play(story, tmp_path)


SETTLING = """
import gc, sys
from pathlib import Path
from studio.core.recipe import Recipe
from studio.tui.app import StudioApp, show
from tests.tui.stories import Asked, services_that

class Settling(StudioApp):
    def on_mount(self):
        self.set_interval(0.1, self.leave_when_settled)

    def leave_when_settled(self):
        if gc.get_freeze_count():
            Path(sys.argv[1], "told").write_text(f"{gc.get_freeze_count()} {len(gc.get_objects())}")
            self.exit()

show(Settling(Recipe(), runs_root=Path(sys.argv[1]), services=services_that(Asked())))
"""


def test_what_the_start_made_is_not_searched_for_garbage_again(tmp_path: Path) -> None:
    headless = {**os.environ, "TEXTUAL_DRIVER": "textual.drivers.headless_driver:HeadlessDriver"}
    subprocess.run([sys.executable, "-c", SETTLING, str(tmp_path)], check=True, timeout=60, env=headless)
    set_aside, searched = map(int, (tmp_path / "told").read_text().split())
    assert set_aside > 20_000
    assert searched < set_aside / 10


CHANGING = """
import sys
from pathlib import Path
from studio.core.recipe import Recipe
from studio.tui.app import StudioApp, show
from tests.tui.stories import Asked, services_that

class Changing(StudioApp):
    def on_mount(self):
        self.set_interval(0.005, lambda: self.screen.set_class(not self.screen.has_class("-odd"), "-odd"))
    CSS = "Screen.-odd { background: red; }"

show(Changing(Recipe(name="try"), runs_root=Path(sys.argv[1]), services=services_that(Asked())))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
def test_no_process_is_left_of_a_terminal_that_is_lost(tmp_path: Path) -> None:
    """As when a window is closed or an SSH line drops, while the screen changes: it waited for its writer for ever."""
    import pty

    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, "-c", CHANGING, str(tmp_path)])  # noqa: S606  no shell
    seen = b""
    while b"Rank" not in seen:
        seen += os.read(terminal, 65536)
    os.close(terminal)
    try:
        wait_for(lambda: os.waitpid(process, os.WNOHANG)[0] == process, seconds=60)
    except AssertionError:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise


@pytest.mark.slow
def test_a_real_process_is_launched_watched_left_found_again_and_stopped(tmp_path: Path) -> None:
    """The main story, with the fake worker as the process."""
    seen: list[RunPaths] = []

    def start(recipe: Recipe, runs_root: Path, progress: object = None, *, queue: bool = False) -> RunPaths:
        environment = fake_environment(steps=100_000, seconds=0.02)
        seen.append(start_job(recipe, runs_root, module=MODULE, environment=environment))
        return seen[-1]

    services = given(start=start, card=lambda: "a card")
    recipe = Recipe(name="story")

    async def first_visit(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, RunScreen), seconds=60)
        await until(pilot, lambda: "running" in shown(app) and "loss" in shown(app))
        await pilot.press("q")

    async def second_visit(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        await until(pilot, lambda: "running" in shown(app))
        await pilot.press("x", "y")
        await until(pilot, lambda: "stopped after" in shown(app), seconds=60)
        assert "The adapter lies in" in shown(app)

    play(first_visit, tmp_path, recipe=recipe, services=services)
    assert run_status(seen[0]) is Status.running
    assert not requested(seen[0], "stop")
    play(second_visit, tmp_path, recipe=recipe, services=services)
    assert wait_for(lambda: run_status(seen[0]) is Status.stopped)
