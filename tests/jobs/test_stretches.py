"""Stretches of files: the bytes are the same wherever they begin and however they come."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.core.errors import BadInput
from studio.jobs.merge import shards
from studio.jobs.merge.shards import StretchWriter
from studio.probe.safetensors_file import Stored, TensorEntry
from tests.examples import examples

SIZE = 3 * 2**20 + 5
DATA = b"".join(place.to_bytes(4, "big") for place in range(SIZE // 4 + 1))[:SIZE]


@pytest.mark.parametrize("at", [0, 8, 4096, 12345])
@pytest.mark.parametrize("size", [0, 1, 4096, 2**20 - 7, 2 * 2**20 + 4097])
def test_a_stretch_is_written_and_nothing_beside_it(tmp_path: Path, at: int, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    seen = bytearray()
    new = DATA[::-1][:size]
    with StretchWriter(path, at, seen.extend) as stretch:
        stretch.write(memoryview(new))
    assert path.read_bytes() == DATA[:at] + new + DATA[at + size :]
    assert seen == new


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 9000), sizes=st.lists(st.integers(1, 700_000), min_size=1, max_size=9))
def test_rooms_of_any_size_follow_each_other(tmp_path: Path, at: int, sizes: list[int]) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(at + sum(sizes)))
    seen = bytearray()
    with StretchWriter(path, at, seen.extend) as stretch:
        for place, size in enumerate(sizes):
            stretch.room(size)[:] = bytes([place + 1]) * size
    wanted = b"".join(bytes([place + 1]) * size for place, size in enumerate(sizes))
    assert path.read_bytes() == bytes(at) + wanted
    assert seen == wanted


def test_a_room_may_be_larger_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE + 100))
    with StretchWriter(path, 77) as stretch:
        stretch.room(10)[:] = b"0123456789"
        stretch.room(SIZE)[:] = DATA
    assert path.read_bytes()[77 : 87 + SIZE] == b"0123456789" + DATA


def test_stretches_of_one_file_are_written_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    cuts = [0, *(place * 53_017 + place % 7 * 611 for place in range(1, 59)), SIZE]

    def write(begin: int, end: int) -> None:
        with StretchWriter(path, begin) as stretch:
            stretch.write(memoryview(DATA[begin:end]))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write, begin, end) for begin, end in pairwise(cuts)]:
            done.result()
    assert path.read_bytes() == DATA


@pytest.mark.parametrize(("at", "size"), [(0, SIZE), (8, 5000), (4096, 4096), (13, 100), (SIZE - 3, 3), (5, 0)])
@pytest.mark.parametrize("piece", [64, 4096, 2**19, SIZE])
def test_a_stretch_is_read_piece_by_piece(tmp_path: Path, at: int, size: int, piece: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    pieces = [bytes(part) for part in _stored(path, at, size).pieces(memoryview(bytearray(piece)))]
    assert b"".join(pieces) == DATA[at : at + size]
    assert {len(part) for part in pieces[:-1]} <= {piece}


def test_a_part_of_a_stretch_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    pieces = [bytes(part) for part in _stored(path, 13, 5000).pieces(memoryview(bytearray(64)), 100, 777)]
    assert b"".join(pieces) == DATA[113:790]


def _stored(path: Path, at: int, size: int) -> Stored:
    return Stored(path, at, TensorEntry("U8", (size,), 0, size))


def test_what_became_shorter_is_not_made_up(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA[:10_000])
    with pytest.raises(BadInput, match="changed while it was read"):
        list(_stored(path, 8, 10_000).pieces(memoryview(bytearray(4096))))


def test_nothing_is_written_of_a_stretch_that_failed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with pytest.raises(KeyError), StretchWriter(path, 0) as stretch:
        stretch.write(memoryview(DATA[:50]))
        raise KeyError
    assert path.read_bytes() == bytes(100)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FileIO):
        def write(self, data: object) -> int:  # type: ignore[override]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "FileIO", Full)
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with pytest.raises(OSError, match="No space"), StretchWriter(path, 0) as stretch:
        stretch.write(memoryview(DATA))
