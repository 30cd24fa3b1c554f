"""Every tensor of a file is read once; what is kept of it is believed only while the file is the same."""

import json
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.probe import weight_sums as module
from studio.probe.weight_sums import weight_sums

OLD = time.time_ns() - 10**12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own; files count as settled at once, which a test that is about that takes back."""
    monkeypatch.setattr(module, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(module, "_YOUNG_SECONDS", -1.0)
    return tmp_path / "cache" / "weight-sums"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were read from a file, in the order of reading."""
    names: list[str] = []
    summed = module._Reading._sum

    def counted(self: module._Reading, file: module._File, entry: module.TensorEntry, room: memoryview) -> str:
        names.append(file.path.name)
        return summed(self, file, entry, room)

    monkeypatch.setattr(module._Reading, "_sum", counted)
    return names


def weights(path: Path, fills: dict[str, int], *, size: int = 64, dtype: str = "BF16") -> Path:
    """A safetensors file of 16-bit tensors, each filled with one byte."""
    table, offset = {}, 0
    for name in fills:
        table[name] = {"dtype": dtype, "shape": [2, size // 4], "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(table).encode()
    data = b"".join(bytes([fill]) * size for fill in fills.values())
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_any_single_tensor_that_changed_has_another_sum(tmp_path: Path) -> None:
    fills = {f"layer.{place}": place for place in range(21)}
    before = weight_sums([weights(tmp_path / "a.safetensors", fills)]).sums
    assert before is not None
    for name in fills:
        after = weight_sums([weights(tmp_path / "b.safetensors", {**fills, name: 99})]).sums
        assert after is not None
        assert {key for key in before if before[key] != after[key]} == {name}


def test_the_last_byte_of_a_tensor_larger_than_a_read_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_BYTES", 16)
    path = weights(tmp_path / "a.safetensors", {"x": 1, "y": 1})
    before = weight_sums([path]).sums
    with path.open("r+b") as file:
        file.seek(-65, os.SEEK_END)  # the last byte of x
        file.write(b"\x02")
    after = weight_sums([path]).sums
    assert before is not None
    assert after is not None
    assert before["x"] != after["x"]
    assert before["y"] == after["y"]


def test_shape_and_format_are_part_of_a_sum(tmp_path: Path) -> None:
    one = weights(tmp_path / "one.safetensors", {"x": 1})
    other = weights(tmp_path / "other.safetensors", {"x": 1}, dtype="F16")
    reshaped = tmp_path / "reshaped.safetensors"
    reshaped.write_bytes(one.read_bytes().replace(b"[2, 16]", b"[16, 2]"))
    assert len({str(weight_sums([path]).sums) for path in (one, other, reshaped)}) == 3


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path, read: list[str]) -> None:
    one, two = weights(tmp_path / "1.safetensors", {"a": 1, "b": 2}), weights(tmp_path / "2.safetensors", {"c": 3})
    first = weight_sums([one, two])
    assert sorted(read) == ["1.safetensors", "1.safetensors", "2.safetensors"]
    read.clear()
    assert weight_sums([one, two]) == first
    assert read == []
    weights(two, {"c": 4})
    assert weight_sums([one, two]) != first
    assert read == ["2.safetensors"]


def test_a_file_overwritten_in_place_with_its_old_time_is_read_again(tmp_path: Path, read: list[str]) -> None:
    path = weights(tmp_path / "a.safetensors", {"x": 1})
    os.utime(path, ns=(OLD, OLD))
    before, status = weight_sums([path]).sums, path.stat()
    read.clear()
    weights(path, {"x": 2})
    os.utime(path, ns=(OLD, OLD))
    now = path.stat()
    assert (now.st_ino, now.st_size, now.st_mtime_ns) == (status.st_ino, status.st_size, status.st_mtime_ns)
    assert weight_sums([path]).sums != before
    assert read


def test_a_file_changed_a_moment_ago_is_not_kept(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(module, "_YOUNG_SECONDS", 1000.0)
    path = weights(tmp_path / "a.safetensors", {"x": 1})
    weight_sums([path])
    weight_sums([path])
    assert len(read) == 2
    assert not cache.exists()


def _flip(file: Path) -> None:
    text = file.read_text()
    place = text.rindex('": "') + 4
    file.write_text(text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :])


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("[[[["),
        lambda file: file.write_text('{"schema": 1, "key": [], "proof": 3, "sums": {"x": null}}'),
        lambda file: os.truncate(file, 2**25),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_damaged_cache_costs_reading_again_and_nothing_else(
    tmp_path: Path, read: list[str], cache: Path, damage: Callable[[Path], object]
) -> None:
    path = weights(tmp_path / "a.safetensors", {"x": 1, "y": 2})
    first = weight_sums([path])
    (kept,) = cache.iterdir()
    damage(kept)
    read.clear()
    assert weight_sums([path]) == first
    assert len(read) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(module, "cache_root", lambda: tmp_path / "file")
    path = weights(tmp_path / "a.safetensors", {"x": 1})
    assert weight_sums([path]).sums == weight_sums([path]).sums
    assert len(read) == 2


def test_the_cache_is_bounded_and_keeps_what_was_used_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, read: list[str]
) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 3)
    paths = [weights(tmp_path / f"{place}.safetensors", {"x": place}) for place in range(6)]
    for place, path in enumerate(paths):
        weight_sums([path])
        for kept in cache.iterdir():  # every step a second later than the one before
            seen = kept.stat().st_mtime_ns
            os.utime(kept, ns=(seen - 10**9, seen - 10**9))
        if place >= 1:
            weight_sums([paths[0]])
        assert len(list(cache.iterdir())) <= 3
    read.clear()
    weight_sums([paths[0]])
    assert read == []
    weight_sums([paths[1]])
    assert read == ["1.safetensors"]


def test_many_at_once_keep_whole_files(tmp_path: Path, cache: Path) -> None:
    path = weights(tmp_path / "a.safetensors", {f"t{place}": place for place in range(50)})
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(weight_sums([path]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(one == found[0] for one in found)
    assert [kept.suffix for kept in cache.iterdir()] == [".json"]


def test_the_reading_is_told_and_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, read: list[str]
) -> None:
    monkeypatch.setattr(module, "_TELL_SECONDS", 0.0)
    path = weights(tmp_path / "a.safetensors", {f"t{place}": place for place in range(200)})
    told: list[float] = []
    weight_sums([path], told.append)
    assert told
    assert told == sorted(told)
    assert all(0.0 <= one <= 1.0 for one in told)
    told.clear()
    weight_sums([path], told.append)
    assert told == []

    class Enough(Exception):
        pass

    def end(fraction: float) -> None:
        raise Enough

    weights(path, {f"t{place}": place + 1 for place in range(200)})
    before = [kept.read_bytes() for kept in cache.iterdir()]
    with pytest.raises(Enough):
        weight_sums([path], end)
    assert [kept.read_bytes() for kept in cache.iterdir()] == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weight-sums")]


def test_no_more_is_read_than_is_allowed_and_what_is_known_costs_nothing(tmp_path: Path, read: list[str]) -> None:
    path = weights(tmp_path / "a.safetensors", {"x": 1, "y": 2})
    seen = weight_sums([path], most_bytes=127)
    assert seen.sums is None
    assert set(seen.shapes) == {"x", "y"}
    assert read == []
    assert weight_sums([path], most_bytes=128).sums is not None
    assert weight_sums([path], most_bytes=0).sums is not None


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights(tmp_path / "a.safetensors", {"x": 1})
    os.utime(path, ns=(OLD, OLD))
    summed = module._Reading._sum

    def meddling(self: module._Reading, *args: object) -> str:
        weights(path, {"x": 2})
        return summed(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Reading, "_sum", meddling)
    with pytest.raises(BadInput, match="was changed while it was read"):
        weight_sums([path])


def test_a_link_is_the_file_that_it_points_to(tmp_path: Path, read: list[str]) -> None:
    """As in a hub's cache, where the files of each snapshot are links to shared blobs."""
    blob = weights(tmp_path / "0a1b2c", {"x": 1})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").symlink_to(blob)
    first = weight_sums([tmp_path / "one" / "model.safetensors"])
    assert weight_sums([tmp_path / "two" / "model.safetensors"]) == first
    assert len(read) == 1
