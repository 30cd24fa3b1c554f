import stat
from pathlib import Path

import pytest

from studio.runs.atomic import mend_folder, publish_folder, write_whole


def _folder(path: Path, word: str) -> Path:
    path.mkdir()
    (path / "inner").mkdir()
    (path / "inner" / "file").write_text(word)
    return path


def test_a_file_is_replaced_whole_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(target, "a file cannot replace a folder")
    assert path.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "folder"]


def test_a_folder_is_published_and_replaces_the_one_before(tmp_path: Path) -> None:
    publish_folder(_folder(tmp_path / ".one", "one"), tmp_path / "final")
    publish_folder(_folder(tmp_path / ".two", "two"), tmp_path / "final")
    assert (tmp_path / "final" / "inner" / "file").read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_a_kill_between_the_two_renames_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_folder(_folder(tmp_path / ".one", "one"), tmp_path / "final")
    aside = _folder(tmp_path / ".two", "two")
    rename = Path.replace

    def dies_at_the_second(self: Path, target: Path) -> Path:
        if self == aside:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(aside, tmp_path / "final")
    monkeypatch.undo()
    assert not (tmp_path / "final").exists()
    mend_folder(tmp_path / "final")
    assert (tmp_path / "final" / "inner" / "file").read_text() == "one"
    assert not (tmp_path / ".final.replaced").exists()


def test_mending_removes_what_a_kill_after_both_renames_left(tmp_path: Path) -> None:
    _folder(tmp_path / "final", "new")
    _folder(tmp_path / ".final.replaced", "old")
    mend_folder(tmp_path / "final")
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final" / "inner" / "file").read_text() == "new"


def test_mending_where_nothing_happened_changes_nothing(tmp_path: Path) -> None:
    mend_folder(tmp_path / "final")
    assert list(tmp_path.iterdir()) == []
