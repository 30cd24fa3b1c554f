"""What a job has started for it: by a process of its own, which ends once the run is held."""

from pathlib import Path

import psutil
import pytest

from studio.core.errors import BadInput, StudioError
from studio.core.events import Finished, Started
from studio.core.recipe import Recipe
from studio.launch.start import prepare
from studio.runs.chain import next_run
from studio.runs.job import read_job
from studio.runs.launched import resume_run, start_next, start_run
from studio.runs.process import read_mark
from studio.runs.requests import ExportRequest, MergeRequest
from studio.runs.status import Status, run_status
from studio.runs.supervise import stop
from tests.fakes.runs import MODULE, fake_environment, wait_for, write_log


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    for name, value in fake_environment(steps=1_000_000, seconds=0.02).items():
        monkeypatch.setenv(name, value)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "question {n}", "completion": "answer {n}"}}\n' for n in range(20)))
    return Recipe(name="lane").with_("data.path", str(rows)).with_("device.device", "cpu")


def test_a_run_is_started_for_a_job_stopped_and_resumed(recipe: Recipe, tmp_path: Path) -> None:
    paths = start_run(recipe, tmp_path / "runs", module=MODULE)
    assert run_status(paths).live
    assert read_job(paths, Recipe) == recipe
    assert paths.plan.is_file()
    worker = read_mark(paths.process)
    assert worker is not None
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    assert worker[0].pid not in ours, "the process that started it has ended: it outlives who asked"
    assert stop(paths, 60) is Status.stopped
    resume_run(paths, module=MODULE)
    assert run_status(paths).live
    with pytest.raises(BadInput, match="cannot be resumed while its worker lives"):
        resume_run(paths, module=MODULE)
    stop(paths, 60)


def test_what_is_wrong_with_a_job_is_told_and_leaves_no_folder(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"adapter\.rank"):
        start_run(recipe.with_("adapter.rank", 0), tmp_path / "runs", module=MODULE)
    with pytest.raises(BadInput, match=r"nowhere\.jsonl"):
        start_run(recipe.with_("data.path", str(tmp_path / "nowhere.jsonl")), tmp_path / "runs", module=MODULE)
    assert not (tmp_path / "runs").exists()


def test_a_process_that_starts_runs_and_dies_is_no_bad_input(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # a Python that finds nothing
    with pytest.raises(StudioError, match="ended early, with exit code") as caught:
        start_run(recipe, tmp_path / "runs", module=MODULE)
    assert not isinstance(caught.value, BadInput)


def test_an_export_that_cannot_be_started_is_told_where_its_merge_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = prepare(
        MergeRequest("/adapter", "embedded", str(tmp_path / "out"), then=("q8_0",)), tmp_path / "runs", 1e9
    )
    write_log(merged, Started(at=1.0, job="merge"), Finished(at=2.0, outcome="done"))
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    start_next(merged)
    assert "the export that should follow could not be started: the process" in capsys.readouterr().err
    assert next_run(merged) is None
    for name, value in {**fake_environment(), "PYTHONHOME": ""}.items():
        monkeypatch.setenv(name, value)
    start_next(merged, module="tests.fakes.export_job")
    following = next_run(merged)
    assert following is not None
    assert read_job(following, ExportRequest) == ExportRequest(str(tmp_path / "out"), f"{tmp_path}/out-q8_0", "q8_0")
    wait_for(lambda: run_status(following) is Status.finished)
