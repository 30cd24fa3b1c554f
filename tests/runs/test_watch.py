import json
from pathlib import Path

import pytest

from studio.core.events import Evaluated, Failed, Finished, MemorySeen, RunEvent, Started, StepDone, Warned
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.log import EventWriter
from studio.runs.status import Status, run_status
from studio.runs.summary import folder_bytes, peak_bytes, summary_of
from studio.runs.watch import RunWatch, last_output, read_history
from tests.fakes.runs import make_run, write_log


def _step(step: int, loss: float = 2.0) -> StepDone:
    return StepDone(at=step, step=step, loss=loss, learning_rate=1e-4, grad_norm=0.5, tokens=100, seconds=0.5)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path)


def test_a_watch_folds_what_comes(paths: RunPaths) -> None:
    watch = RunWatch(paths)
    assert watch.poll() == []
    writer = EventWriter(paths.events)
    writer.write(_step(1))
    assert watch.poll() == [_step(1)]
    writer.write(_step(2))
    assert watch.catch_up().last_step == 2
    assert not watch.behind


def test_a_watch_begins_anew_when_the_log_is_replaced(paths: RunPaths) -> None:
    write_log(paths, _step(1), _step(2))
    watch = RunWatch(paths)
    before = watch.catch_up()
    write_log(paths, _step(1))
    assert watch.catch_up() is not before
    assert list(watch.history.train.steps) == [1]


def test_catching_up_ends_at_a_torn_line(paths: RunPaths) -> None:
    write_log(paths, _step(1))
    with paths.events.open("a") as file:
        file.write('{"kind"')
    assert read_history(paths).last_step == 1


def test_the_last_lines_of_the_output_show_bars_as_they_ended(paths: RunPaths) -> None:
    assert last_output(paths) == []
    paths.output.write_bytes(b"first\n" + b"x" * 20_000 + b"\n\n  10%\r 50%\r100%\nnot \xff utf-8\nlast\r\n")
    assert last_output(paths, 3) == ["100%", "not \ufffd utf-8", "last"]
    assert last_output(paths, 0) == []


def _summary(paths: RunPaths, *events: RunEvent) -> dict[str, object]:
    write_log(paths, *events)
    return summary_of(paths, read_history(paths), run_status(paths, now=1e12))


def test_a_summary_is_plain_json_even_of_nothing(paths: RunPaths) -> None:
    summary = _summary(paths)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["status"] == "crashed"
    assert summary["adapter"] is None


def test_a_summary_of_a_finished_run(paths: RunPaths) -> None:
    paths.adapter.mkdir()
    summary = _summary(
        paths,
        Started(at=10.0, job="train", method="lora", model="m", total_steps=2),
        Evaluated(at=11.0, step=0, loss=3.0, loss_tokens=1, rows=1, seconds=1.0),
        _step(1, 2.5),
        Warned(at=12.0, message="careful"),
        _step(2, 1.5),
        MemorySeen(at=13.0, step=2, stage="step", resident_peak_bytes=1000),
        Evaluated(at=14.0, step=2, loss=1.0, loss_tokens=1, rows=1, seconds=1.0),
        Finished(at=15.0, outcome="done", step=2),
    )
    assert summary["train_loss"] == {"first": 2.5, "last": 1.5}
    assert summary["eval_loss"] == {"first": 3.0, "last": 1.0, "first_step": 0, "last_step": 2}
    assert (summary["seconds"], summary["steps"], summary["tokens"]) == (5.0, 2, 200)
    assert (summary["peak_bytes"], summary["warnings"], summary["failure"]) == (1000, ["careful"], None)
    assert summary["adapter"] == str(paths.adapter)


def test_a_loss_that_is_not_finite_is_null_in_a_summary(paths: RunPaths) -> None:
    summary = _summary(paths, _step(1, float("nan")))
    assert summary["train_loss"] == {"first": None, "last": None}


def test_a_summary_says_why_a_run_ended_badly(paths: RunPaths) -> None:
    failed = _summary(paths, _step(4), Failed(at=1.0, failure="oom", message="m", advice="a", step=4))
    assert failed["failure"] == {"kind": "oom", "message": "m", "advice": "a", "step": 4}
    crashed = _summary(paths, _step(4))
    assert isinstance(crashed["failure"], dict)
    assert crashed["failure"]["kind"] == "crashed"


def test_the_peak_is_the_highest_reading_of_the_card_else_of_the_process() -> None:
    history = History()
    assert peak_bytes(history) is None
    history.fold([MemorySeen(at=1.0, step=1, stage="s", resident_peak_bytes=7)])
    assert peak_bytes(history) == 7
    history.fold(MemorySeen(at=1.0, step=1, stage="s", peak_bytes=size) for size in (3, 9, 5))
    assert peak_bytes(history) == 9


def test_the_size_of_a_folder_counts_files_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"12345")
    (tmp_path / "a" / "b" / "two").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 8
    assert folder_bytes(tmp_path / "missing") == 0
    assert Status.finished == "finished"
