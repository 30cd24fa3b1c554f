"""A new kind of job is a row of the table and a module of its own: started, watched, listed, resumed as all others."""

import json
from pathlib import Path

import pytest

from studio.cli import main
from studio.core.errors import BadInput
from studio.launch.kinds import KINDS
from studio.launch.start import resume, start
from studio.runs import launched
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.status import Status, run_status
from studio.runs.store import list_runs
from studio.runs.watch import read_history
from tests.fakes.runs import fake_environment, wait_for
from tests.fakes.toy_job import COUNT, CountRequest


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "count", COUNT)


@pytest.fixture
def asked(tmp_path: Path) -> CountRequest:
    text = tmp_path / "poem.txt"
    text.write_text("the fog comes on little cat feet the fog moves on")
    return CountRequest(str(text), words=("fog", "cat", "dog"), least=1, share=True)


def begun(request: CountRequest, root: Path) -> RunPaths:
    paths = start(request, root, environment=fake_environment())
    wait_for(lambda: not run_status(paths).live and not lock_held(paths.lock))
    return paths


def test_it_runs_as_a_run(asked: CountRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = begun(asked, tmp_path / "runs")
    assert paths.name.startswith("count-poem-20")
    assert run_status(paths) is Status.finished
    assert read_job(paths, CountRequest) == asked
    history = read_history(paths)
    assert history.finished is not None
    assert history.finished.result == {"counts": {"fog": 2, "cat": 1}, "shares": {"fog": 2 / 11, "cat": 1 / 11}}
    assert [(info.name, info.job, info.status) for info in list_runs(tmp_path / "runs")] == [
        (paths.name, "count", Status.finished)
    ]
    assert main(["runs", "list", "--json", "--runs-dir", str(tmp_path / "runs")]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["run"], listed["job"], listed["status"]) == (paths.name, "count", "finished")
    assert main(["runs", "show", paths.name, "--json", "--runs-dir", str(tmp_path / "runs")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["recipe"] == {"text": asked.text, "words": ["fog", "cat", "dog"], "least": 1, "share": True}


def test_what_its_check_says_is_heard(asked: CountRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []
    near = CountRequest("poem.txt", words=("fog",))
    paths = start(near, tmp_path, environment=fake_environment(), on_checked=lambda seen: notes.extend(seen.notes))
    assert notes == ["counting is quick"]
    written = read_job(paths, CountRequest)
    assert written is not None and written.text == asked.text, "as the check made it"
    with pytest.raises(BadInput, match=r"there is no text nowhere\.txt"):
        start(CountRequest("nowhere.txt", words=()), tmp_path / "runs", environment=fake_environment())
    assert not (tmp_path / "runs").exists()


def test_a_run_of_it_that_failed_is_resumed(asked: CountRequest, tmp_path: Path) -> None:
    text = Path(asked.text)
    words = text.read_text()
    text.write_bytes(b"\xff")
    paths = begun(asked, tmp_path / "runs")
    assert run_status(paths) is Status.failed
    text.write_text(words)
    resume(paths, environment=fake_environment()).process.wait(60)
    assert run_status(paths) is Status.finished


def test_a_version_without_its_row_refuses_it(
    asked: CountRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that starts runs for jobs has the shipped table."""
    for name, value in fake_environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match="'count' is a kind of job that this version does not know"):
        launched.start_run(asked, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
