import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from studio.runs.process import ProcessMark, is_alive, mark_of, mark_to_json, read_mark, send_signal
from tests.fakes.runs import wait_for


def _sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def _own() -> ProcessMark:
    mark = mark_of(os.getpid())
    assert mark is not None
    return mark


def test_this_process_is_alive_and_its_mark_comes_back_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "process.json"
    path.write_text(mark_to_json(_own(), more=7))
    found = read_mark(path)
    assert found is not None
    assert found[0] == _own()
    assert found[1]["more"] == 7
    assert is_alive(found[0])


@pytest.mark.parametrize(
    "change", [{"started": 1.0}, {"boot": "another"}, {"host": "another"}, {"pid": -1}, {"pid": 0}]
)
def test_a_mark_that_differs_in_one_thing_is_another_process(change: dict[str, object]) -> None:
    other = replace(_own(), **change)  # type: ignore[arg-type]
    assert not is_alive(other)
    assert not send_signal(other, signal.SIGTERM)


def test_a_signal_reaches_the_marked_process_only() -> None:
    child = _sleeper()
    mark = mark_of(child.pid)
    assert mark is not None
    assert not send_signal(replace(mark, started=mark.started + 1), signal.SIGKILL)
    assert child.poll() is None
    assert send_signal(mark, signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    assert not send_signal(mark, signal.SIGKILL)


def test_a_zombie_has_ended() -> None:
    child = _sleeper()
    mark = mark_of(child.pid)
    assert mark is not None
    os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: mark_of(child.pid) is None)
    assert not is_alive(mark)
    child.wait(60)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"pid": "x"}', '{"pid": 1}', '{"pid": 1e999, "started": 1}'])
def test_a_damaged_file_holds_no_mark(tmp_path: Path, text: str) -> None:
    path = tmp_path / "process.json"
    path.write_text(text)
    assert read_mark(path) is None
    assert read_mark(tmp_path / "missing") is None
