"""Checksums of every tensor in safetensors files, read once and kept: by inode, size and times of each file.

A checksum is XXH3 of 128 bits over format, shape and all bytes of a tensor. It does not depend on the file in which the
tensor lies, or where in it. It tells copies from other numbers, but is no proof against somebody who makes two tensors
with one sum on purpose.

The sums of a file are kept under its device, inode, size, time of change, and the time of its inode's change, which
`touch` and `cp -p` cannot set back. Each file's sums are one small file in the cache's `weight-sums/`, written whole,
so that several processes need no lock. One that cannot be read, or is damaged, counts as missing. The files of a hub
snapshot are links to blobs that are named by their SHA-256, but the name is not used: a blob may be damaged, which only
reading it can tell.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from studio.probe.safetensors_file import SafetensorsHeader, Stored, TensorEntry, changed, read_header
from studio.runs.atomic import write_whole
from studio.runs.home import cache_root

if TYPE_CHECKING:
    from xxhash import xxh3_128

Tell = Callable[[float], None]
"""Told the fraction done, 0 to 1, ten times a second; an exception that it raises ends the reading."""

_FOLDER, _SCHEMA = "weight-sums", 1
_MOST_KEPT, _MOST_KEPT_BYTES = 512, 16 * 2**20
"""How many files of sums are kept, the newest; and the largest size of one, in which a tensor takes about 100 bytes."""
_YOUNG_SECONDS = 2.0
"""A file that was changed less than this ago may be changed again within one tick of its file system's clock, so its
time does not tell the two contents apart: its sums are not kept."""
_READ_BYTES = 2**22
_MOST_THREADS = 4
_TELL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class WeightSums:
    """The weights of a model, by their checksums.

    Attributes:
        shapes: Format and shape of every tensor by name, such as `BF16 [64, 32]`.
        sums: The checksum of every tensor by name; None where a file would have to be read for it.
    """

    shapes: dict[str, str]
    sums: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it was when its header was read."""

    path: Path
    header: SafetensorsHeader
    status: os.stat_result
    looked_ns: int

    @property
    def key(self) -> str:
        seen = self.status
        return f"{seen.st_dev}-{seen.st_ino}-{seen.st_size}-{seen.st_mtime_ns}-{seen.st_ctime_ns}"

    @property
    def kept_at(self) -> Path:
        return cache_root() / _FOLDER / f"{self.status.st_dev:x}-{self.status.st_ino:x}.json"

    @property
    def settled(self) -> bool:
        """Whether its last change was long enough ago for its times to differ from those of a later change."""
        return self.looked_ns - max(self.status.st_mtime_ns, self.status.st_ctime_ns) > _YOUNG_SECONDS * 1e9


def weight_sums(
    paths: Sequence[Path], tell: Tell | None = None, *, most_bytes: int | None = None, anew: bool = False
) -> WeightSums:
    """Return the checksums of all tensors in some files.

    Args:
        paths: The files of one model; a tensor's name occurs once.
        tell: Told how far the reading is; it may end it. Not called where all sums are known.
        most_bytes: How much may be read of what is not known; None reads all of it.
        anew: Whether every byte is read, even where its sum is known.

    Raises:
        BadInput: A file is damaged, or was changed while it was read.
        OSError: A file cannot be read.
    """
    files = [_File(path, read_header(path), path.stat(), time.time_ns()) for path in paths]
    shapes = {name: form_of(one) for file in files for name, one in file.header.tensors.items()}
    sums: dict[str, str] = {}
    unknown: list[_File] = []
    for file in files:
        known = None if anew else _recall(file)
        sums |= known or {}
        if known is None:
            unknown.append(file)
    needed = sum(file.header.buffer_bytes for file in unknown)
    if most_bytes is not None and needed > most_bytes:
        return WeightSums(shapes, None)
    for file, found in _read(unknown, tell or (lambda fraction: None), needed):
        sums |= found
        _keep(file, found)
    return WeightSums(shapes, sums)


def form_of(entry: TensorEntry) -> str:
    """Return format and shape of a tensor, such as `BF16 [64, 32]`."""
    return f"{entry.dtype} {list(entry.shape)}"


def begun_sum(entry: TensorEntry) -> "xxh3_128":
    """Return the checksum of a tensor before its first byte; `update` takes the bytes.

    XXH3 took 0.007 seconds a GB in a core's cache, CRC-32 took 0.14 and BLAKE2b 0.77. It is to find other numbers and
    faults of disk or memory, not forgeries.
    """
    import xxhash  # noqa: PLC0415  not needed for the first frame

    return xxhash.xxh3_128(f"{form_of(entry)}\n".encode())


class _Reading:
    """The tensors that are still to be read, and the sums of those that were; shared by the threads."""

    def __init__(self, files: Sequence[_File]) -> None:
        self._waiting = iter([(file, name) for file in files for name in _in_order(file.header)])
        self._lock = Lock()
        self.ended = Event()
        self.read_bytes = 0
        self.sums: dict[Path, dict[str, str]] = {file.path: {} for file in files}

    def work(self) -> None:
        """Read tensor after tensor until none is left, or it is ended."""
        room = memoryview(bytearray(_READ_BYTES))
        while not self.ended.is_set():
            with self._lock:
                file, name = next(self._waiting, (None, ""))
            if file is None:
                return
            found = self._sum(file, file.header.tensors[name], room)
            with self._lock:
                self.sums[file.path][name] = found

    def _sum(self, file: _File, entry: TensorEntry, room: memoryview) -> str:
        made = begun_sum(entry)
        for piece in Stored(file.path, 8 + file.header.header_bytes + entry.begin, entry).pieces(room):
            if self.ended.is_set():
                break
            made.update(piece)
            with self._lock:
                self.read_bytes += len(piece)
        return made.hexdigest()


def _read(files: Sequence[_File], tell: Tell, needed: int) -> list[tuple[_File, dict[str, str]]]:
    if not files:
        return []
    from concurrent.futures import ThreadPoolExecutor, wait  # noqa: PLC0415  as above

    reading = _Reading(files)
    threads = _threads()
    with ThreadPoolExecutor(threads, "weight-sums") as pool:
        running = {pool.submit(reading.work) for _ in range(threads)}
        try:
            while running:
                tell(min(1.0, reading.read_bytes / max(1, needed)))
                done, running = wait(running, _TELL_SECONDS)
                for one in done:
                    one.result()
        finally:
            reading.ended.set()
    for file in files:
        if _content_of(file.path.stat()) != _content_of(file.status):
            raise changed(file.path)
    return [(file, {name: reading.sums[file.path][name] for name in _in_order(file.header)}) for file in files]


def _threads() -> int:
    """Return how many threads read; on two cores more than one were not faster (tests/bench/weights_results.md)."""
    return max(1, min(_MOST_THREADS, os.cpu_count() or 1))


def _in_order(header: SafetensorsHeader) -> list[str]:
    return sorted(header.tensors, key=lambda name: header.tensors[name].begin)


def _content_of(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _recall(file: _File) -> dict[str, str] | None:
    """Return the kept sums of a file; None where there are none, or they are damaged or of another content."""
    try:
        if file.kept_at.stat().st_size > _MOST_KEPT_BYTES:
            return None
        table = json.loads(file.kept_at.read_bytes())
        sums = table["sums"]
        if table["schema"] != _SCHEMA or table["key"] != file.key or table["proof"] != _proof(file.key, sums):
            return None
        if sums.keys() != file.header.tensors.keys():
            return None
        os.utime(file.kept_at)  # the oldest are deleted first, and this one is in use
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(sums)


def _keep(file: _File, sums: dict[str, str]) -> None:
    """Keep the sums of a file; a cache that cannot be written to costs reading the file again."""
    with suppress(OSError):
        if not file.settled or file.key != _File(file.path, file.header, file.path.stat(), 0).key:
            return
        text = json.dumps({"schema": _SCHEMA, "key": file.key, "proof": _proof(file.key, sums), "sums": sums})
        if len(text) > _MOST_KEPT_BYTES:
            return
        file.kept_at.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file.kept_at, text)
        _forget_oldest(file.kept_at.parent)


def _forget_oldest(folder: Path) -> None:
    kept = [(path.stat().st_mtime_ns, path) for path in folder.iterdir()]
    for _, path in sorted(kept)[:-_MOST_KEPT]:
        path.unlink(missing_ok=True)


def _proof(key: str, sums: Any) -> str:
    """Return a checksum of the kept sums: with a flipped bit in the cache, the right base would seem to be another."""
    import xxhash  # noqa: PLC0415  as above

    return xxhash.xxh3_128(json.dumps([key, sums], sort_keys=True).encode()).hexdigest()
