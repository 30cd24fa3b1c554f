"""Stretches of files past the system's cache: the bytes are the same wherever they begin, and where that is refused."""

import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from studio.jobs.base.weights import uncached
from studio.jobs.base.weights.uncached import PAGE_BYTES, StretchWriter, read_stretch

SIZE = 3 * 2**20 + 5
DATA = b"".join(place.to_bytes(4, "big") for place in range(SIZE // 4 + 1))[:SIZE]


class Refusing(FileIO):
    """What some file systems give: a file that opens past the cache and then cannot be used so."""

    def write(self, data: object) -> int:  # type: ignore[override]
        raise OSError(errno.EINVAL, "not past the cache")

    def readinto(self, buffer: object) -> int:  # type: ignore[override]
        raise OSError(errno.EINVAL, "not past the cache")


def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    del monkeypatch


def _not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached, "_open_uncached", lambda path, mode: None)


def _refused_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached, "_open_uncached", Refusing)


@pytest.mark.parametrize("system", [_as_it_is, _not_opened, _refused_late])
@pytest.mark.parametrize("at", [0, 8, 4096, 4104, 12345])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 2**20 - 7, 2 * 2**20 + 4097])
def test_a_stretch_is_written_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: Callable[[pytest.MonkeyPatch], None], at: int, size: int
) -> None:
    system(monkeypatch)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    seen = bytearray()
    new = DATA[::-1][:size]
    with StretchWriter(path, at, seen.extend) as stretch:
        stretch.write(memoryview(new))
    assert path.read_bytes() == DATA[:at] + new + DATA[at + size :]
    assert seen == new


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_neighbours_share_a_page(tmp_path: Path) -> None:
    """Edges of stretches lie in one page of the cache while the pages beside it go past the cache."""
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


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("at", "size"), [(0, SIZE), (8, 5000), (4096, 4096), (4104, 2**20), (13, 100), (SIZE - 3, 3)])
@pytest.mark.parametrize("piece", [64, 4096, 2**19, SIZE])
def test_a_stretch_is_read_piece_by_piece(tmp_path: Path, cached: bool, at: int, size: int, piece: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    pieces = [bytes(part) for part in read_stretch(path, at, size, piece, cached=cached)]
    assert b"".join(pieces) == DATA[at : at + size]
    assert {len(part) for part in pieces[:-1]} <= {piece}


def test_where_reads_past_the_cache_are_refused_they_go_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncached, "_open_uncached", Refusing)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    pieces = [bytes(part) for part in read_stretch(path, 4104, 100_000, 4096, cached=False)]
    assert b"".join(pieces) == DATA[4104:104_104]


def test_a_page_never_goes_past_the_cache_in_part() -> None:
    """Where the system's pages are larger than a disk's, as on some ARM machines, two threads would share one."""
    assert PAGE_BYTES % mmap.PAGESIZE == 0


@pytest.mark.parametrize("cached", [True, False])
def test_what_became_shorter_is_not_made_up(tmp_path: Path, cached: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA[:10_000])
    with pytest.raises(EOFError):
        list(read_stretch(path, 8, 10_000, 4096, cached=cached))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FileIO):
        def write(self, data: object) -> int:  # type: ignore[override]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(uncached, "_open_uncached", Full)
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with pytest.raises(OSError, match="No space"), StretchWriter(path, 0) as stretch:
        stretch.write(memoryview(DATA))
