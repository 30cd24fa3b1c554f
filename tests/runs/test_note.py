"""Notes on runs: one small file, whatever lies in it."""

from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.runs.layout import RunPaths
from studio.runs.note import MOST_CHARACTERS, read_note, write_note
from studio.runs.store import run_info
from tests.fakes.runs import make_run


def test_a_note_is_kept_shown_and_taken_away(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    assert read_note(paths) == ""
    write_note(paths, "  best so far \n")
    assert read_note(paths) == run_info(paths).note == "best so far"
    write_note(paths, " ")
    assert not paths.note.exists()


def test_what_is_no_note_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at most"):
        write_note(make_run(tmp_path), "x" * (MOST_CHARACTERS + 1))
    with pytest.raises(BadInput, match="no run folder"):
        write_note(RunPaths(tmp_path / "missing"), "x")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * 10**6, "é".encode() * 600])
def test_a_damaged_note_is_cut_and_never_an_error(tmp_path: Path, content: bytes) -> None:
    paths = make_run(tmp_path)
    paths.note.write_bytes(content)
    assert 0 < len(read_note(paths)) <= MOST_CHARACTERS
