import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.errors import JobFailed
from studio.core.events import Failed, Finished, Phase, RunEvent, Saved, StepDone, Unknown, Warned
from studio.runs.log import EventTail, EventWriter, event_from_line, read_events
from tests.fakes.small_disk import small_disk


def _step(step: int, loss: float = 1.0, at: float = 5.0) -> StepDone:
    return StepDone(at=at, step=step, loss=loss, learning_rate=1e-4, grad_norm=0.5, tokens=10, seconds=0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_what_is_written_is_read_and_stamped_by_the_clock(path: Path) -> None:
    writer = EventWriter(path, clock=lambda: 42.0)
    writer.emit(Phase, name="load", detail="日本語 \x1b[31m \ud800")
    writer.write(_step(1))
    assert read_events(path)[1] == _step(1)
    first = read_events(path)[0]
    assert isinstance(first, Phase)
    assert (first.at, first.name) == (42.0, "load")
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_line_begins_with_the_schema_number(path: Path) -> None:
    EventWriter(path).write(_step(1))
    assert path.read_text().startswith('{"schema": 1, "kind": "StepDone"')


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_with_a_flag_and_comes_back(path: Path, value: float) -> None:
    EventWriter(path).write(_step(1, loss=value))
    table = json.loads(path.read_text())
    assert table["loss"] is None
    assert table["loss_nonfinite"] == str(value)
    (event,) = read_events(path)
    assert isinstance(event, StepDone)
    assert repr(event.loss) == repr(value)


def test_inside_a_result_a_number_that_is_not_finite_becomes_null(path: Path) -> None:
    EventWriter(path).emit(Finished, outcome="done", result={"a": math.nan, "b": [math.inf, {"c": 1.0}]})
    (event,) = read_events(path)
    assert isinstance(event, Finished)
    assert event.result == {"a": None, "b": [None, {"c": 1.0}]}


def test_a_torn_last_line_waits_and_is_read_when_it_is_whole(path: Path) -> None:
    line = json.dumps({"kind": "Phase", "at": 1.0, "name": "load"})
    path.write_text(line[:10])
    tail = EventTail(path)
    assert tail.poll() == []
    path.write_text(line)
    assert tail.poll() == []
    with path.open("a") as file:
        file.write("\n")
    assert tail.poll() == [Phase(at=1.0, name="load")]
    assert tail.poll() == []
    assert tail.restarts == 0


@given(cut=st.integers(min_value=0, max_value=400))
def test_wherever_a_log_is_cut_only_the_torn_line_is_lost(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    writer = EventWriter(path, clock=lambda: 1.0)
    for step in range(1, 4):
        writer.write(_step(step))
    writer.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    EventWriter(path, clock=lambda: 2.0).emit(Warned, message="a second worker")
    events = read_events(path)
    lines = whole[:cut].count(b"\n")
    assert events[:lines] == [_step(step) for step in range(1, lines + 1)][:lines] or lines == 0
    assert isinstance(events[-1], Warned)
    torn = events[lines:-1]
    assert len(torn) == (0 if whole[:cut].endswith(b"\n") or not cut else 1)
    assert all(isinstance(event, (Unknown, StepDone)) for event in torn)


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"\xff\xfe\x00",
        b"{",
        b"[" * 100_000,
        b'{"kind": "StepDone", "at": 1e999}',
        b'{"kind": "StepDone", "at": ' + b"9" * 5000 + b"}",
        b'{"kind": "StepDone", "at": 1.0, "step": "one"}',
        b'{"kind": "Phase", "at": 1.0, "name": ["list"]}',
        b'{"kind": "Phase", "at": 1.0}',
        b'{"kind": {"a": 1}, "at": 1.0}',
        b'{"kind": "Tomorrow", "at": 1.0, "new": true}',
        b'{"kind": "Saved", "at": 1.0, "what": "x", "path": "y", "step": 1e3}',
    ],
)
def test_a_line_that_is_none_of_ours_is_kept_as_unknown(line: bytes) -> None:
    event = event_from_line(line)
    assert isinstance(event, Unknown)


def test_a_step_number_beyond_64_bits_is_no_step() -> None:
    table = {"kind": "StepDone", "at": 1.0, "step": 10**30, "loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0}
    line = json.dumps(table | {"tokens": 1, "seconds": 1.0}).encode()
    assert isinstance(event_from_line(line), Unknown)


@given(st.binary(max_size=300))
def test_no_bytes_at_all_upset_the_reader(line: bytes) -> None:
    event = event_from_line(line.replace(b"\n", b""))
    assert event is None or isinstance(event, RunEvent)


def test_fields_of_tomorrow_are_dropped_and_empty_lines_passed_over(path: Path) -> None:
    path.write_text('\n{"kind": "Phase", "at": 1.0, "name": "x", "colour": "red"}\n\n')
    assert read_events(path) == [Phase(at=1.0, name="x")]


def test_reading_is_bounded_and_goes_on_where_it_stopped(path: Path) -> None:
    writer = EventWriter(path)
    for step in range(12_000):
        writer.write(_step(step))
    tail = EventTail(path)
    first = tail.poll(limit=2**20)
    assert 0 < len(first) < 12_000
    assert tail.behind_bytes > 0
    rest: list[RunEvent] = []
    while some := tail.poll(limit=2**20):
        rest += some
    assert [event.step for event in (*first, *rest) if isinstance(event, StepDone)] == list(range(12_000))
    assert tail.behind_bytes == 0


def test_a_line_longer_than_any_event_becomes_one_unknown(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"kind": "Phase", "at": 1.0, "name": "' + b"x" * 3 * 2**20 + b'"}\n')
        file.write(b'{"kind": "Phase", "at": 2.0, "name": "after"}\n')
    tail, events = EventTail(path), []
    for _ in range(8):
        events += tail.poll(limit=2**20)
    assert [type(event) for event in events] == [Unknown, Phase]


def test_a_replaced_and_a_cut_log_are_read_anew(path: Path) -> None:
    EventWriter(path).write(_step(1))
    tail = EventTail(path)
    assert len(tail.poll()) == 1
    other = path.with_name("other")
    EventWriter(other).write(_step(7))
    other.replace(path)
    assert tail.poll() == [_step(7)]
    assert tail.restarts == 1
    path.write_text('{"kind": "Phase", "at": 1.0, "name": "x"}\n')
    assert tail.poll() == [Phase(at=1.0, name="x")]
    assert tail.restarts == 2


def test_a_missing_log_has_no_events(path: Path) -> None:
    assert EventTail(path).poll() == []
    assert read_events(path) == []


def test_terminal_events_and_saved_are_flushed_to_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    writer = EventWriter(path)
    writer.write(_step(1))
    assert len(synced) == 0
    writer.emit(Saved, what="checkpoint", path="x")
    writer.emit(Failed, failure="f", message="m", advice="a")
    writer.emit(Finished, outcome="done")
    assert len(synced) == 3


def test_lines_of_several_threads_do_not_mix(path: Path) -> None:
    writer = EventWriter(path)

    def work(offset: int) -> None:
        for step in range(500):
            writer.write(_step(offset + step))

    threads = [threading.Thread(target=work, args=(number * 1000,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = read_events(path)
    assert len(events) == 2000
    assert all(isinstance(event, StepDone) for event in events)


def test_a_full_device_is_a_named_failure() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    writer = EventWriter(full)
    with pytest.raises(JobFailed) as caught:
        writer.write(_step(1))
    assert caught.value.kind == "disk_full"
    assert "space" in caught.value.advice


_SMALL_DISK = """
import sys
from pathlib import Path
from studio.core.errors import JobFailed
from studio.core.events import Phase
from studio.runs.log import EventWriter, read_events

path = Path(sys.argv[1]) / "events.jsonl"
writer, kinds = EventWriter(path), []
for number in range(100_000):
    try:
        writer.emit(Phase, name="x" * 300, detail=str(number))
    except JobFailed as failure:
        kinds.append(failure.kind)
        break
text = path.read_bytes()
assert kinds == ["disk_full"], kinds
assert text.endswith(b"\\n"), text[-50:]
assert len(read_events(path)) == number
(Path(sys.argv[1]) / "filler").unlink()
writer.emit(Phase, name="after", detail="there is room again")
assert read_events(path)[-1].name == "after"
print("whole", number)
"""


def test_on_a_disk_that_really_fills_no_torn_line_is_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        (disk / "filler").write_bytes(b"x" * 64 * 1024)
        done = _python(_SMALL_DISK, str(disk))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("whole ")


def _python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("at", ["1e300", "-1e300", "1e999", "NaN"])
def test_a_moment_without_a_date_is_none_of_ours(at: str) -> None:
    for kind in ("Phase", "Other"):
        event = event_from_line(f'{{"schema": 1, "kind": "{kind}", "at": {at}, "name": "load"}}'.encode())
        assert isinstance(event, Unknown)
        assert event.at == 0.0
