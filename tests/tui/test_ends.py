"""Who has left a job's screen, or the studio, still hears how the job ended, and what it warned of."""

from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.core.events import Evaluated, Failed, Finished, Started, Warned
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from studio.runs.store import run_info
from studio.tui.app import StudioApp
from studio.tui.ends import Ends, ending_of
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.run import RunScreen
from tests.fakes.runs import LiveWorker, write_log
from tests.tui.stories import (
    HOSTILE,
    Asked,
    assert_harmless,
    make_run,
    play,
    services_that,
    shown,
    train,
    until,
)

LARGER = "q8_0 is 0.031 nats a token from the merged model: try a larger format"


def told(app: StudioApp) -> str:
    return "\n".join(notice.message for notice in app._notifications)


def export_run(root: Path, at: float = 1.0) -> RunPaths:
    paths = make_run(root, "export-q8_0-shell")
    write_job(paths, ExportRequest("/m", "/m.gguf", "q8_0"))
    write_log(
        paths,
        Started(at=at, job="export", model="/m"),
        Warned(at=at + 1, topic="export", message=f"{LARGER} {HOSTILE}"),
        Finished(at=at + 9, outcome="done"),
    )
    return paths


def test_the_warning_of_an_export_reaches_who_has_left_its_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rung: list[bool] = []
    written: list[str] = []
    for name in ("VTE_VERSION", "TMUX", "STY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        app.bell = lambda: rung.append(True)  # type: ignore[method-assign]
        app._driver.write = written.append  # type: ignore[method-assign, union-attr]
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert app._ends is not None
        paths = export_run(tmp_path)  # as the merge before it starts it
        paths.launch.write_text("{}")
        app._ends.look()
        await until(pilot, lambda: LARGER in told(app))
        assert isinstance(app.screen, RunScreen) and app.screen.paths == worker.paths
        assert f"{paths.name} finished after 9 s.\n" in told(app)
        await until(pilot, lambda: "q8_0 is 0.031" in shown(app))
        assert_harmless(app)
        assert len(rung) == 1
        (notice,) = (text for text in written if "\x1b]9;" in text)
        assert f"{paths.name} finished after 9 s." in notice
        worker.emit(Evaluated, step=2, loss=3.5, loss_tokens=900, rows=20, seconds=1.0)
        worker.emit(Finished, outcome="done", step=2)
        app._ends.look()
        await until(pilot, lambda: len(rung) == 2)
        assert not any("watched" in notice.message for notice in app._notifications), "its screen says it"
        worker.paths.launch.write_text("{}")  # resumed, and soon done again
        await pilot.press("escape")
        app._ends.look()
        await until(pilot, lambda: len(rung) == 3)
        (notice,) = (one for one in app._notifications if "watched" in one.message)
        assert "held-out loss 4.000 -> 3.500" in notice.message and notice.severity == "information"

    asked = Asked()
    with LiveWorker(make_run(tmp_path, "watched")) as worker:
        train(worker, range(1, 3))
        play(story, tmp_path, services=services_that(asked))
    assert len(asked.visits) == 1


def test_what_ended_badly_between_two_visits_is_told_at_the_next(tmp_path: Path) -> None:
    old, new = export_run(tmp_path, at=10.0), export_run(tmp_path, at=100.0)
    silent = make_run(tmp_path, "silent")
    write_log(silent, Started(at=100.0, job="merge"), Finished(at=109.0, outcome="done"))
    failed = make_run(tmp_path, "failed")
    write_log(
        failed, Started(at=100.0, job="train"), Failed(at=109.0, failure="out_of_memory", message="no", advice="less")
    )

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: LARGER in told(app))
        assert isinstance(app.screen, ConfigureScreen)
        assert {notice.message.split()[0] for notice in app._notifications} == {new.name, failed.name}
        assert f"{failed.name} has failed (out_of_memory) after 9 s." in told(app)

    play(story, tmp_path, services=services_that(Asked(), visited=50.0))
    live, endings = Ends(tmp_path / "runs").begin(None)
    assert (live, endings) == ([], []), "nobody has visited before"
    assert ending_of(run_info(old)).severity == "warning"
