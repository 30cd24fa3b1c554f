"""What the screens know of a run without a screen: output, cursors, predictions, words."""

import math
from pathlib import Path

import pytest

from studio.core.events import Finished, StepDone
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.worker import Worker
from studio.tui.feed import Cursor, OutputTail, RunFeed, harmless
from studio.tui.panels.run_memory import planned_peak_bytes
from studio.tui.readable import count, duration, gib, number, setting
from tests.fakes.runs import LiveWorker, make_run
from tests.tui.stories import HOSTILE, train


def test_output_comes_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    tail = OutputTail(log)
    assert tail.poll() == []
    log.write_text("one\ntwo\nthr")
    assert tail.poll() == ["one", "two"]
    assert tail.poll() == []
    with log.open("a") as file:
        file.write("ee\nfour\n")
    assert tail.poll() == ["three", "four"]


def test_output_of_a_new_worker_is_read_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    log.write_text("a long first line of the old worker\n")
    tail = OutputTail(log)
    tail.poll()
    log.write_text("new\n")
    assert tail.poll() == ["new"]


def test_a_long_log_begins_at_its_end_with_a_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    log.write_text("".join(f"line {number:07d} {'x' * 80}\n" for number in range(5000)))
    lines = OutputTail(log).poll()
    assert len(lines) < 800
    assert lines[0].startswith("line 000")
    assert lines[-1].startswith("line 0004999")


def test_of_a_flood_the_newest_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    log.write_text("first\n")
    tail = OutputTail(log)
    tail.poll()
    with log.open("a") as file:
        file.writelines(f"line {number:07d} {'x' * 80}\n" for number in range(10_000))
    lines = tail.poll()
    assert len(lines) < 3000
    assert lines[-1].startswith("line 0009999")
    assert lines[0].startswith("line 000")


def test_output_that_is_no_utf8_or_hostile(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    log.write_bytes(b"\xff\xfe\x00bad\n" + HOSTILE.encode() + b"\n10%\r20%\n" + b"y" * 10_000 + b"\n")
    lines = OutputTail(log).poll()
    assert len(lines) == 4
    assert lines[2] == "20%"
    assert len(lines[3]) <= 4000
    assert all(line.isprintable() for line in lines)
    assert harmless("a\u202eb") == ["a\\u202eb"]


def test_cursor_hands_on_what_is_new_and_all_when_the_series_changed() -> None:
    cursor, source = Cursor(), object()
    assert cursor.start([1, 2, 3], source) == 0
    assert cursor.start([1, 2, 3], source) == 3
    assert cursor.start([1, 2, 3, 4], source) == 3
    assert cursor.start([1, 2], source) == 0, "cut"
    assert cursor.start([1, 3, 4], source) == 0, "replaced"
    assert cursor.start([1, 3, 4], object()) == 0, "another worker"
    assert Cursor().start([], source) == 0


def test_the_feed_tells_the_end_at_once_and_asks_for_the_status_seldom_while_steps_flow(tmp_path: Path) -> None:
    paths, asked = make_run(tmp_path), []

    def status_of(which: RunPaths) -> Status:
        asked.append(which)
        return run_status(which)

    feed = RunFeed(paths, status_of=status_of)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 3))
        assert feed.look().status is Status.running
        for step in range(3, 23):
            worker.emit(StepDone, step=step, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=1, seconds=1.0)
            assert feed.look().news == 1
        assert len(asked) <= 7
        worker.emit(Finished, outcome="done", step=22)
        assert feed.look().status is Status.finished


def test_a_worker_that_vanishes_is_noticed_at_the_next_look_without_news(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    feed = RunFeed(paths)
    worker = Worker(paths)
    worker.__enter__()
    train(worker, range(1, 3))
    assert feed.look().status is Status.running
    worker._log.close()
    worker._lock.release()
    worker._signals.restore()
    paths.process.write_text("{}")
    assert feed.look().status is Status.crashed


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"peak_bytes": 5}', 5),
        ('{"peak_bytes": -5}', None),
        ('{"peak_bytes": "5"}', None),
        ('{"peak_bytes": true}', None),
        ("[]", None),
        ("{", None),
        ("", None),
    ],
)
def test_prediction(tmp_path: Path, text: str, wanted: int | None) -> None:
    paths = RunPaths(tmp_path)
    paths.plan.write_text(text)
    assert planned_peak_bytes(paths) == wanted


def test_no_plan_no_prediction(tmp_path: Path) -> None:
    assert planned_peak_bytes(RunPaths(tmp_path)) is None


def test_words_for_numbers() -> None:
    assert [duration(value) for value in (0, 59.4, 60, 3599.6, 7620, 200_000, None, math.inf)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "1 h 00 min",
        "2 h 07 min",
        "2 d 7 h",
        "-",
        "-",
    ]
    assert [number(value) for value in (0.84501, 12.0, 0.0, 1e-5, math.nan, None)] == [
        "0.8450",
        "12.00",
        "0.000",
        "1e-5",
        "nan",
        "-",
    ]
    assert [setting(value) for value in (16, 0.03, 2e-4, 1.5e-4, 0, 0.25, 1e-8, 32768, 0.005)] == [
        "16",
        "0.03",
        "2e-4",
        "1.5e-4",
        "0",
        "0.25",
        "1e-8",
        "32768",
        "0.005",
    ]
    assert [gib(value) for value in (2**30, 1.25 * 2**30, None, math.nan)] == ["1.0", "1.2", "-", "-"]
    assert [count(value) for value in (1204.4, 999, 41_943_040, None)] == ["1 204", "999", "41 943 040", "-"]
