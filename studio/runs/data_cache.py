"""What was made of data files and would be slow to make again: a folder for each entry, in `cache/data`.

An entry appears whole, by a rename, and never changes. Its sizes and checksums stand in it and are compared when it is
used: what a kill, a full disk or a fault of the disk left of one counts as missing. So nothing waits for the disk to
flush it. Entries may be removed at any time; the program removes those that were used longest ago.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.runs.home import cache_root

MOST_BYTES = 20 * 10**9
"""Most that all entries take together, besides the newest one."""
_DISK_SHARE = 0.25
"""Most of what is free on the disk, with what the entries take themselves."""
_FACTS = "facts.json"
_SCRATCH = ".part"
_ABANDONED_SECONDS = 3600.0
"""A scratch folder in which nothing was written for so long belongs to a process that was killed."""
_BLOCK_BYTES = 2**20

Tell = Callable[[int, int], None]
"""Gets (bytes done, bytes in all); may raise to end it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sound entry.

    Attributes:
        folder: Where its files lie.
        facts: What its maker wrote about it, as JSON.
    """

    folder: Path
    facts: Mapping[str, Any]


def data_cache() -> Path:
    """Return the folder of all entries; it need not exist yet."""
    return cache_root() / "data"


def find_entry(key: str, tell: Tell | None = None) -> Entry | None:
    """Return the entry of this key, read through and compared with its checksums; None where it is missing or unsound.

    Args:
        key: What it was made of: a word for its kind, and a checksum.
        tell: Told the progress.
    """
    folder = data_cache() / key
    try:
        found, _, text = (folder / _FACTS).read_bytes().partition(b"\n")
        if found.decode("ascii") != sum_of_bytes(text):
            return None
        table = json.loads(text)
        sizes = {name: size for name, (size, _) in table["files"].items()}
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        done, total = 0, sum(sizes.values())
        for name, (size, known) in table["files"].items():
            if sum_of(folder / name, _shifted(tell, done, total)) != known:
                return None
            done += size
        os.utime(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Entry(folder, table["facts"])


def scratch_entry(key: str, expected_bytes: int) -> Path:
    """Return a new folder in which an entry is made; whoever makes it removes it unless it becomes one.

    Args:
        key: Of the entry.
        expected_bytes: How large it will be, about; so much is made room for.

    Raises:
        OSError: The disk or the folder refuses.
    """
    root = data_cache()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make_room(root, expected_bytes, keep=key)
    scratch = root / f".{key}.{os.urandom(4).hex()}{_SCRATCH}"
    scratch.mkdir(mode=0o700)
    return scratch


def keep_entry(key: str, scratch: Path, facts: Mapping[str, Any]) -> Entry:
    """Return what is in a scratch folder as the entry of this key; another sound one of that key may have come first.

    Raises:
        OSError: The disk or the folder refuses.
    """
    files = {path.name: (path.stat().st_size, sum_of(path)) for path in sorted(scratch.iterdir())}
    text = json.dumps({"files": files, "facts": facts}).encode()
    (scratch / _FACTS).write_bytes(sum_of_bytes(text).encode() + b"\n" + text)
    final = data_cache() / key
    try:
        scratch.rename(final)
    except OSError:
        if found := find_entry(key):
            remove_folder(scratch)
            return found
        # An unsound one is in the way.
        remove_folder(final)
        scratch.rename(final)
    return Entry(final, facts)


def sum_of(path: Path, tell: Tell | None = None) -> str:
    """Return the checksum of a file's content: 32 characters of XXH3.

    Raises:
        OSError: It cannot be read.
    """
    import xxhash  # noqa: PLC0415  not needed for the first frame

    found, total, done = xxhash.xxh3_128(), path.stat().st_size, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
            done += len(block)
            if tell:
                tell(min(done, total), total)
    return found.hexdigest()


def kept_bytes() -> int:
    """Return how many bytes the entries take, unfinished ones included."""
    return sum(size for _, _, size in _entries(data_cache()))


def unused_entries() -> list[Path]:
    """Return the folders of all entries, without those that are being made."""
    now = time.time()
    made = (folder for folder, used, _ in _entries(data_cache()) if _is_left(folder, used, now))
    return sorted(made)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it; one that is gone already, or in use on Windows, is left."""
    shutil.rmtree(folder, ignore_errors=True)


def sum_of_bytes(data: bytes) -> str:
    """Return the same checksum of bytes."""
    import xxhash  # noqa: PLC0415  as above

    return xxhash.xxh3_128(data).hexdigest()


def _shifted(tell: Tell | None, done: int, total: int) -> Tell | None:
    return (lambda here, _: tell(done + here, total)) if tell else None


def _make_room(root: Path, expected_bytes: int, keep: str) -> None:
    """Remove abandoned scratch folders, and the entries used longest ago until a new one has room.

    An open file stays readable until it is closed, so that a run does not notice; Windows leaves it in its place.
    """
    entries = sorted(_entries(root), key=lambda entry: entry[1])
    now = time.time()
    for folder, used, _ in entries:
        if folder.name.endswith(_SCRATCH) and _is_left(folder, used, now):
            remove_folder(folder)
    whole = [entry for entry in entries if not entry[0].name.startswith(".") and entry[0].name != keep]
    held = sum(size for _, _, size in whole)
    most = min(MOST_BYTES, int(_DISK_SHARE * (shutil.disk_usage(root).free + held)))
    for folder, _, size in whole:
        if held + expected_bytes <= most:
            return
        remove_folder(folder)
        held -= size


def _is_left(folder: Path, used: float, now: float) -> bool:
    """Whether nobody is making it: it is whole, or nothing was written in it for long."""
    return not folder.name.endswith(_SCRATCH) or now - used > _ABANDONED_SECONDS


def _entries(root: Path) -> Iterator[tuple[Path, float, int]]:
    """Yield (folder, time of its last use or writing, bytes) of each entry and scratch folder."""
    with suppress(OSError):
        for folder in root.iterdir():
            with suppress(OSError):
                inside = [path.stat() for path in folder.iterdir()]
                own = folder.stat().st_mtime
                written = max((status.st_mtime for status in inside), default=own)
                used = max(own, written) if folder.name.endswith(_SCRATCH) else own
                yield folder, used, sum(status.st_size for status in inside)
