"""What was read of a large file is kept, noticed when it is unsound, and never taken for another file's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.probe.data import DataSet, Reading, inspect_data, read, read_data, row_cache, stored_rows
from studio.probe.data.meant import DataFiles
from studio.probe.data.stored_rows import StoredRows
from studio.runs import data_cache
from studio.runs.home import HOME_VARIABLE

CHAT = Reading("chat")


@pytest.fixture(autouse=True)
def small_counts_as_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(stored_rows, "IN_MEMORY_CHARACTERS", 500)
    monkeypatch.setattr(row_cache, "LEAST_BYTES", 500)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read, one entry a reading."""
    seen: list[Path] = []
    raw_rows = read._raw_rows

    def spied(place: DataFiles, *rest: Any) -> object:
        seen.append(place.path)
        return raw_rows(place, *rest)

    monkeypatch.setattr(read, "_raw_rows", spied)
    return seen


def line(n: int, answer: str = "answer") -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": f"q {n:04}"}, {"role": "assistant", "content": answer}]}
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [line(n) for n in range(200)]
    rows[7] = line(7, "see <image> here")  # a note
    rows[9] = json.dumps({"messages": [*json.loads(line(9))["messages"], {"role": "user", "content": "and"}]})
    path.write_text("\n".join(rows) + "\n")
    return path


def entries() -> list[Path]:
    return sorted(data_cache.data_cache().glob("[!.]*"))


def same(one: DataSet, other: DataSet) -> bool:
    return replace(one, rows=tuple(one.rows)) == replace(other, rows=tuple(other.rows))


def test_the_second_reading_finds_the_first_ones_rows(file: Path, readings: list[Path]) -> None:
    first, second = read_data(file), read_data(file)
    assert readings == [file]
    assert isinstance(second.rows, StoredRows)
    assert same(first, second)
    assert first.notes() == second.notes() != ()


def test_what_must_be_corrected_is_said_each_time(file: Path, readings: list[Path]) -> None:
    with file.open("a") as more:
        more.write('{"messages": 3}\nno json\n')
    said = []
    for _ in range(2):
        with pytest.raises(BadInput) as refused:
            read_data(file)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert "line 201" in said[0]
    assert same(inspect_data(file), inspect_data(file))
    assert readings == [file]


def test_another_way_of_reading_is_another_entry(file: Path, readings: list[Path]) -> None:
    read_data(file)
    read_data(file, CHAT)
    assert len(readings) == len(entries()) == 2


def test_a_file_changed_under_the_same_size_and_times_is_read_again(file: Path, readings: list[Path]) -> None:
    first, seen = read_data(file), file.stat()
    file.write_bytes(file.read_bytes().replace(b"q 0003", b"q 3000"))
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (seen.st_size, seen.st_mtime_ns)
    assert read_data(file).rows[3] != first.rows[3]
    assert len(readings) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(file: Path, readings: list[Path]) -> None:
    def meddle(done: int, total: int) -> None:
        if done:
            with file.open("a") as more:
                more.write(line(999) + "\n")

    rows = read_data(file, progress=meddle).rows
    assert len(list(rows)) >= 200
    assert entries() == []
    assert not list(data_cache.data_cache().iterdir())


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda entry: os.truncate(entry / "rows.jsonl", 100),
    "a flipped bit": lambda entry: flip(entry / "rows.jsonl"),
    "other starts": lambda entry: flip(entry / "starts.bin"),
    "a file is gone": lambda entry: (entry / "starts.bin").unlink(),
    "no facts": lambda entry: (entry / "facts.json").unlink(),
    "half the facts": lambda entry: os.truncate(entry / "facts.json", 40),
    "facts of nobody": lambda entry: (entry / "facts.json").write_text("[]"),
    "facts with other names": lambda entry: rename_facts(entry / "facts.json"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename_facts(path: Path) -> None:
    path.write_text(path.read_text().replace('"columns"', '"rows_of_old"'))


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unsound_entry_is_noticed_and_made_anew(file: Path, readings: list[Path], damage: str) -> None:
    first = read_data(file)
    first = replace(first, rows=tuple(first.rows))
    DAMAGES[damage](entries()[0])
    assert same(first, read_data(file))
    assert same(first, read_data(file))
    assert len(readings) == 2


def test_an_entry_that_is_removed_while_its_rows_are_used_can_be_read_to_the_end(file: Path) -> None:
    rows = read_data(file).rows
    shutil.rmtree(data_cache.data_cache())
    assert len(list(rows)) == len(rows) == 200


def test_a_full_disk_is_no_obstacle(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    wanted = read_data(file)
    shutil.rmtree(data_cache.data_cache())
    for name in ("scratch_entry", "keep_entry"):
        with monkeypatch.context() as patched:
            patched.setattr(row_cache, name, full)
            assert same(read_data(file), wanted)
        assert entries() == []
        assert not list(data_cache.data_cache().glob(".*"))


def test_whoever_comes_second_takes_the_entry_of_the_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, inner = row_cache.keep_entry, []

    def slow(key: str, scratch: Path, facts: dict[str, object]) -> object:
        if not inner:
            inner.append(None)
            inner[0] = read_data(file)  # another run, from beginning to end, just before this one's rename
        return keep(key, scratch, facts)

    monkeypatch.setattr(row_cache, "keep_entry", slow)
    outer = read_data(file)
    assert same(outer, inner[0])  # type: ignore[arg-type]
    assert len(entries()) == 1
    assert not list(data_cache.data_cache().glob(".*"))


def test_an_interrupted_reading_leaves_nothing(file: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_data(file, progress=stop)
    assert not data_cache.data_cache().exists() or not list(data_cache.data_cache().iterdir())


_KILLED = """
import sys, time
from pathlib import Path
from studio.probe.data import read_data, row_cache, stored_rows
stored_rows.IN_MEMORY_CHARACTERS = row_cache.LEAST_BYTES = 500
def wait(done, total):
    if done:
        print("reading", flush=True)
        time.sleep(60)
read_data(Path(sys.argv[1]), progress=wait)
"""


def test_a_killed_reading_leaves_a_scratch_folder_that_is_removed_later(file: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _KILLED, str(file)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"reading\n"
        other.send_signal(signal.SIGKILL)
    left = list(data_cache.data_cache().iterdir())
    assert len(left) == 1
    assert left[0].name.startswith(".rows-")
    first = read_data(file)
    assert len(entries()) == 1
    assert left[0].exists()  # its writer might still live
    old = time.time() - 2 * 3600
    for path in (*left[0].iterdir(), left[0]):
        os.utime(path, (old, old))
    read_data(file, CHAT)  # makes room for another entry
    assert len(first.rows) == 200
    assert not left[0].exists()


def test_entries_used_longest_ago_make_room(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_data(file)
    size = data_cache.kept_bytes()
    assert size > file.stat().st_size / 2
    monkeypatch.setattr(data_cache, "MOST_BYTES", 3 * size)
    for n in range(5):
        other = tmp_path / f"other{n}.jsonl"
        other.write_bytes(file.read_bytes())
        read_data(other)
        old = time.time() - 1000 + n
        for entry in entries():
            if entry.stat().st_mtime > old:
                os.utime(entry, (old, old))
    assert data_cache.kept_bytes() <= 3 * size
    assert 1 <= len(entries()) <= 3


def test_small_files_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    path = tmp_path / "small.jsonl"
    path.write_text(line(1) + "\n")
    assert isinstance(read_data(path).rows, tuple)
    assert not (tmp_path / "home").exists()
