"""What the program holds on this machine's disk, what freeing it costs, and freeing it.

Looking changes nothing. Links are never followed: what another disk holds under a link is left. Runs are freed by name
alone, and nothing that a living job may use is freed.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.runs.data_cache import data_cache, unused_entries
from studio.runs.home import cache_root, studio_home
from studio.runs.layout import RunPaths
from studio.runs.scratch import give_back, left_by
from studio.runs.status import Status
from studio.runs.store import RunInfo, contents_of, left_over, list_runs, remove_run
from studio.runs.summary import folder_bytes

CACHES, LEFTOVERS, CALIBRATIONS, EMBEDDED, RUN = "caches", "leftovers", "calibrations", "embedded", "run"
CHECKPOINTS = "checkpoints"
KINDS = {
    CACHES: "what is made again where it is needed",
    LEFTOVERS: "what killed jobs have left",
    CHECKPOINTS: "what finished trainings can be extended from",
    EMBEDDED: "the embedded model, where it was fetched",
    CALIBRATIONS: "what runs of this machine taught the estimate",
}
"""What can be freed by kind; only the first two are freed without being named."""
UNASKED = (CACHES, LEFTOVERS)
_CACHES = {
    "data": ("rows and tokens of large data files", "the next run on a file reads and tokenises it anew"),
    "models": ("the embedded model in 16 bits", "half a minute, before it is next used"),
    "tools": ("llama.cpp's converter and library", "a download, before the next export to GGUF"),
    "weight-sums": ("checksums of base models", "the next start on a base reads all of it once"),
    "hub": ("what the hub said of data sets", "asked again where they are next used"),
}
_CALIBRATIONS = {
    "calibration.json": "what runs took beside their plans",
    "quality.json": "how LoRA and QLoRA came out in races",
}
_ABANDONED_SECONDS = 3600.0
"""A file that is being written is renamed within seconds: an older one belongs to a process that was killed."""


@dataclass(frozen=True, slots=True)
class Held:
    """Something that lies on the disk.

    Attributes:
        kind: One of `KINDS`, or `run`.
        what: What it is, in words.
        paths: Where it lies.
        size_bytes: What its files take.
        cost: What freeing it costs; empty where it costs nothing.
        kept: Why it is not freed now; empty where it can be.
        run: The run that it is, or that left it; None for what is of no run.
    """

    kind: str
    what: str
    paths: tuple[Path, ...]
    size_bytes: int
    cost: str = ""
    kept: str = ""
    run: RunPaths | None = None


def held(root: Path) -> list[Held]:
    """Return what the program holds besides runs.

    Args:
        root: The folder of runs.
    """
    infos = list_runs(root)
    live = [info.name for info in infos if info.status.live]
    busy = f"{plain(live[0], one_line=True)} is live and may use it" if live else ""
    found = [*_caches(busy), *_leftovers(root), *_checkpoints(infos), *_fetched(busy), *_calibrations(busy)]
    return [one for one in found if one.size_bytes or one.kind == LEFTOVERS]


def held_run(paths: RunPaths) -> Held:
    """Return a run as something that is freed when it is named."""
    size_bytes = folder_bytes(paths.root) + sum(map(folder_bytes, _of_run(paths)))
    return Held(RUN, f"the run {paths.name}: {contents_of(paths)}", (paths.root,), size_bytes, "it is gone", run=paths)


def free(one: Held) -> int:
    """Delete it, and return the bytes that this freed.

    Raises:
        BadInput: It is in use, or the disk refuses.
    """
    if one.kept:
        raise BadInput(f"{one.what} was left: {one.kept}.")
    if one.kind == RUN and one.run:
        remove_run(one.run)
        return one.size_bytes
    if one.kind == LEFTOVERS and one.run and (scratch := left_by(one.run)):
        give_back(scratch)
    for path in one.paths:
        _delete(path)
    rest = sum(map(_size, one.paths))
    if rest >= one.size_bytes and rest:
        raise BadInput(f"{one.what} was left: the disk or its rights refuse it.")
    return one.size_bytes - rest


def _caches(busy: str) -> Iterator[Held]:
    for path in _inside(cache_root()):
        what, cost = _CACHES.get(path.name, (f"other: {plain(path.name, one_line=True)}", ""))
        kept = "a link to elsewhere" if path.is_symlink() else busy
        parts = tuple(unused_entries()) if path == data_cache() and not path.is_symlink() else (path,)
        yield Held(CACHES, what, parts, sum(map(_size, parts)), cost, kept)


def _leftovers(root: Path) -> Iterator[Held]:
    """Yield what killed merges and exports left, runs that were removed by half, and files that were never renamed."""
    for left in left_over(root):
        what = f"half-made output of {plain(left.run.name, one_line=True)}"
        cost = "the run cannot go on from it"
        yield Held(LEFTOVERS, what, left.folders, left.size_bytes, cost, run=left.run)
    for path in _inside(root):
        if path.name.startswith(".") and path.name.endswith(".removed") and not path.is_symlink():
            yield Held(LEFTOVERS, "a run that was removed by half", (path,), _size(path))
    for path in _inside(studio_home()):
        if path.name.startswith(".") and path.name.endswith(".part") and _is_old(path):
            yield Held(LEFTOVERS, "a file that was never finished", (path,), _size(path))


def _checkpoints(infos: list[RunInfo]) -> Iterator[Held]:
    for info in infos:
        folder = info.paths.checkpoints
        if info.status is Status.finished and folder.is_dir() and not folder.is_symlink():
            what = f"checkpoints of the finished run {plain(info.name, one_line=True)}"
            cost = "it can no longer be extended, nor what it was at earlier steps be merged"
            yield Held(CHECKPOINTS, what, (folder,), _size(folder), cost)


def _fetched(busy: str) -> Iterator[Held]:
    folder = studio_home() / "models"
    if folder.is_dir():
        kept = "a link to elsewhere" if folder.is_symlink() else busy
        yield Held(
            EMBEDDED, "the embedded model", (folder,), _size(folder), "93 MB to download for the next demo", kept
        )


def _calibrations(busy: str) -> Iterator[Held]:
    for name, what in _CALIBRATIONS.items():
        path = studio_home() / name
        if path.is_file():
            yield Held(CALIBRATIONS, what, (path,), _size(path), "plans are as uncertain as on the first day", busy)


def _of_run(paths: RunPaths) -> list[Path]:
    with suppress(StudioError, OSError, ValueError):
        if scratch := left_by(paths):
            return scratch.folders
    return []


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; 0 for a link and for what is gone."""
    if path.is_symlink():
        return 0
    try:
        return folder_bytes(path) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def _is_old(path: Path) -> bool:
    try:
        return not path.is_symlink() and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
    except OSError:
        return False


def _delete(path: Path) -> None:
    if path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
