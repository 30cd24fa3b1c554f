import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.runs.atomic import mend_folder, publish_folder, publish_new, read_object, write_whole


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
    scratch = _folder(tmp_path / ".two", "two")
    rename = Path.replace

    def dies_at_the_second(self: Path, target: Path) -> Path:
        if self == scratch:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(scratch, tmp_path / "final")
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


def test_in_a_place_of_the_users_an_empty_folder_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    publish_new(_folder(tmp_path / ".one", "one"), tmp_path / "final")
    assert (tmp_path / "final" / "inner" / "file").read_text() == "one"
    (tmp_path / "made.gguf").write_text("model")
    publish_new(tmp_path / "made.gguf", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "model"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["final", "out.gguf"]


def _users_folder(path: Path) -> None:
    _folder(path, "the user's")


@pytest.mark.parametrize(
    "appears",
    [
        _users_folder,
        lambda path: path.write_text("the user's"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("elsewhere", target_is_directory=True),
    ],
)
@pytest.mark.parametrize("made", ["folder", "file"])
def test_what_is_the_users_is_never_replaced(tmp_path: Path, appears: Callable[[Path], object], made: str) -> None:
    final, scratch = tmp_path / "final", tmp_path / ".made"
    (tmp_path / "elsewhere").mkdir()
    appears(final)
    before = final.lstat()
    if made == "folder":
        _folder(scratch, "ours")
    else:
        scratch.write_text("ours")
    with pytest.raises(FileExistsError):
        publish_new(scratch, final)
    assert (final.lstat().st_ino, final.lstat().st_size) == (before.st_ino, before.st_size)
    assert scratch.exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_file_system_without_second_names_replaces_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    (tmp_path / "made").write_text("ours")
    (tmp_path / "taken").write_text("the user's")
    with pytest.raises(FileExistsError):
        publish_new(tmp_path / "made", tmp_path / "taken")
    publish_new(tmp_path / "made", tmp_path / "free")
    assert (tmp_path / "taken").read_text() == "the user's"
    assert (tmp_path / "free").read_text() == "ours"


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", '{"a": 1', "[" * 100_000, '"\ud800'.encode("utf-8", "surrogatepass")]
)
def test_what_is_no_json_object_reads_as_an_empty_one(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_object(file) == {}


def test_an_object_is_read_unless_it_is_too_large_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert read_object(file) == read_object(tmp_path) == {}
    file.write_text('{"a": [1, 2.5, null]}')
    assert read_object(file) == {"a": [1, 2.5, None]}
    assert read_object(file, most_bytes=10) == {}
