"""A data set of the Hugging Face hub: its files in the client's cache, downloaded where they are missing.

`huggingface_hub` fetches, resumes and caches the files; which of them a configuration and split mean follows from the
card and the names, as in `datasets`, and our own readers read them. What the hub listed is noted beside the cache, so
that without a connection it is still known which files belong together and whether all of them are there. No code of a
data set is run: one that needs its own script is read from the copy in Parquet that the hub makes of it.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.probe.data.chosen_files import (
    CARD,
    DEFAULT,
    NOTHING_SAID,
    Chosen,
    Layout,
    choose,
    kind_of_name,
    layout_of_card,
)
from studio.probe.data.meant import DataFiles, HubWord
from studio.probe.data.opened import Progress
from studio.probe.hub_transfer import byte_counter, download_on
from studio.runs.atomic import write_whole
from studio.runs.home import cache_root

_ASK_SECONDS = 15.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RESUMED_BYTES = 32 * 2**20
"""Smaller files are downloaded again after an interruption, as the client does it."""
_CONVERTED = "refs/convert/parquet"
"""The branch in which the hub keeps its own copy of a data set in Parquet, a folder for each split."""
_COPIED = re.compile(r"[^/]+/[^/]+/\d{4,}\.parquet")
_MOST_FILES = 200_000
_MOST_NOTE_BYTES = 64 * 2**20
_KEPT_COMMITS = 5
_PAGES = "https://huggingface.co/datasets/"


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a data set at one commit.

    Attributes:
        commit: The commit.
        sizes: Bytes of each file by its path.
        note: Where the hub could not be asked, why, and that an earlier look is used; else empty.
    """

    commit: str
    sizes: Mapping[str, int]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a data set that are meant, here or not yet.

    Attributes:
        listing: All files of the commit.
        chosen: Those that are meant.
        paths: Where each of them lies in the cache; None for one that is not there.
    """

    listing: Listing
    chosen: Chosen
    paths: tuple[Path | None, ...]

    @property
    def missing_bytes(self) -> int:
        """What is to be downloaded."""
        pairs = zip(self.chosen.names, self.paths, strict=True)
        return sum(self.listing.sizes.get(name, 0) for name, path in pairs if path is None)


def fetched(path: Path, word: HubWord, progress: Progress | None = None, *, ask: bool = True) -> DataFiles:
    """Return the files of a data set, downloaded where they are not in the cache; what is there of one is kept.

    Args:
        path: The word as it was given.
        word: What it names.
        progress: Told (done, total) in bytes; may raise to end the download, which goes on from there the next time.
        ask: Whether the hub may be asked; if not, nothing is downloaded.

    Raises:
        BadInput: There is no such data set, configuration or split, it is gated, it cannot be reached, the disk has no
            room, or nothing in it can be read.
    """
    found = find(word, ask=ask)
    if found.missing_bytes and not ask:
        raise BadInput(f"The data set {word.repo} is not whole on this computer.")
    if found.missing_bytes:
        _require_room(word.repo, found.missing_bytes)
    paths: list[Path] = []
    done, total = 0, sum(found.listing.sizes.get(name, 0) for name in found.chosen.names)
    for name, there in zip(found.chosen.names, found.paths, strict=True):
        paths.append(there or _download(word, found.listing, name, before=done, total=total, progress=progress))
        done += found.listing.sizes.get(name, 0)
    notes = (*filter(None, (found.listing.note,)), *found.chosen.notes)
    size_bytes = sum(path.stat().st_size for path in paths)
    chosen, commit = found.chosen, found.listing.commit
    exact = word.exact(chosen.config, chosen.split, commit)
    return DataFiles(path, exact, tuple(paths), chosen.names, size_bytes, notes, commit)


def find(word: HubWord, *, ask: bool = True) -> Found:
    """Return which files of a data set are meant and which of them are in the cache; downloads its card at most.

    Args:
        word: What is named.
        ask: Whether the hub may be asked; if not, what is known of it from before must do.

    Raises:
        BadInput: As `fetched`; without asking, also that it was never looked at.
    """
    listing = _listing(word, word.revision, ask=ask)
    if _COMMIT.fullmatch(word.revision) and _is_copy(listing):  # of which a run has noted the commit
        return _converted(word, listing)
    shown = f"The data set {word.repo}"
    try:
        chosen = choose(listing.sizes, _layout(word, listing, ask=ask), word.wanted, shown, strict=False)
    except BadInput:
        script = f"{word.repo.rpartition('/')[2]}.py" in listing.sizes
        readable = any(kind_of_name(name) not in ("", "text") for name in listing.sizes)
        if word.revision or (readable and not script):
            raise
        with suppress(BadInput):
            return _converted(word, _listing(word, _CONVERTED, ask=ask))
        if script:
            raise BadInput(
                f"{shown} is made by a script of its own, which is not run here, and the hub has no copy of it in "
                f"Parquet. Look for another data set, or download what the script reads: {_PAGES}{word.repo}"
            ) from None
        raise
    return _found(word, listing, chosen)


def _found(word: HubWord, listing: Listing, chosen: Chosen) -> Found:
    """Return what is meant, and what of it is here.

    Raises:
        BadInput: Some of it is not, and the hub cannot be asked.
    """
    found = Found(listing, chosen, _cached(word.repo, listing.commit, chosen.names))
    missing = [name for name, path in zip(chosen.names, found.paths, strict=True) if path is None]
    if missing and listing.note:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(
            f"{plain(missing[0], one_line=True)}{more} of the data set {word.repo} is not in the cache, and "
            f"{listing.note}. Try again with a connection."
        )
    return found


def _is_copy(listing: Listing) -> bool:
    """Return whether files are those of the hub's own copy in Parquet."""
    rows = [name for name in listing.sizes if kind_of_name(name) not in ("", "text")]
    return bool(rows) and CARD not in listing.sizes and all(map(_COPIED.fullmatch, rows))


def _converted(word: HubWord, listing: Listing) -> Found:
    """Return the hub's own copy in Parquet: folders of configurations, in each a folder for each split.

    Raises:
        BadInput: It has not what is asked for.
    """
    parts: dict[str, dict[str, list[str]]] = {}
    for name in listing.sizes:
        config, _, rest = name.partition("/")
        split, _, file = rest.partition("/")
        if file.endswith(".parquet"):
            parts.setdefault(config, {}).setdefault(split.removeprefix("partial-"), []).append(name)
    default = DEFAULT if DEFAULT in parts else ""
    chosen = choose(listing.sizes, Layout(parts, default), word.wanted, f"The data set {word.repo}", strict=True)
    partial = any("/partial-" in name for name in chosen.names)
    note = f"the hub's own copy in Parquet is read{', which holds only the first gigabytes' if partial else ''}"
    chosen = replace(chosen, notes=(*chosen.notes, note))
    return _found(word, listing, chosen)


def _listing(word: HubWord, revision: str, *, ask: bool) -> Listing:
    known = _Known.of(word.repo)
    before = known.listing(revision)
    if before is not None and (_COMMIT.fullmatch(revision) or not ask):
        return before
    if not ask:
        if there := _in_cache(word.repo, revision):
            return there
        raise BadInput(f"The data set {word.repo} is not on this computer yet.")
    from huggingface_hub import HfApi  # noqa: PLC0415  0.24 s that only data of the hub pay

    try:
        info = HfApi().dataset_info(word.repo, revision=revision or None, files_metadata=True, timeout=_ASK_SECONDS)
    except Exception as error:  # noqa: BLE001  the transport (requests, httpx, httpx2) differs between versions
        said, why, lasting = _refusal(word, revision, error)
        # What is gone or forbidden is said; with no connection, what was seen before is as good as it can be.
        there = None if lasting else before or _in_cache(word.repo, revision)
        if there is None:
            raise BadInput(said) from None
        note = f"the hub cannot be asked ({why}): commit {there.commit[:8]} from the cache is read"
        return Listing(there.commit, there.sizes, note)
    files = list(info.siblings or [])
    if len(files) > _MOST_FILES:
        raise BadInput(f"The data set {word.repo} has {len(files):,} files; at most {_MOST_FILES:,} are looked at.")
    found = Listing(str(info.sha or revision), {file.rfilename: file.size or 0 for file in files})
    known.keep(revision, found)
    return found


def _in_cache(repo: str, revision: str) -> Listing | None:
    """Return what lies in the client's cache of a data set that was downloaded by other means; None for nothing."""
    from huggingface_hub import constants  # noqa: PLC0415  as above

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}"
    try:
        named = folder / "refs" / (revision or "main")
        commit = named.read_text().strip() if named.is_file() else revision
        if not commit and not revision:
            commit = max((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime).name
        inside = folder / "snapshots" / commit
        if not _COMMIT.fullmatch(commit) or not inside.is_dir():
            return None
        files = [path for path in inside.rglob("*") if path.is_file()]
        return Listing(commit, {path.relative_to(inside).as_posix(): path.stat().st_size for path in files})
    except (OSError, ValueError):
        return None


def _layout(word: HubWord, listing: Listing, *, ask: bool) -> Layout:
    if CARD not in listing.sizes:
        return NOTHING_SAID
    (path,) = _cached(word.repo, listing.commit, (CARD,))
    if path is None and ask:
        path = _download(word, listing, CARD)
    return layout_of_card(path.read_text("utf-8", "replace")) if path else NOTHING_SAID


def _cached(repo: str, commit: str, names: Sequence[str]) -> tuple[Path | None, ...]:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  as above

    found = (try_to_load_from_cache(repo, name, revision=commit, repo_type="dataset") for name in names)
    return tuple(Path(path) if isinstance(path, str) else None for path in found)


def _download(
    word: HubWord, listing: Listing, name: str, *, before: int = 0, total: int = 0, progress: Progress | None = None
) -> Path:
    """Return a file of the data set, downloaded; what an earlier download left of it is not fetched again."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  as above

    stopped: list[BaseException] = []

    def told(there: int) -> None:
        if progress:
            try:
                progress(min(before + there, total), total)
            except BaseException as error:
                stopped.append(error)
                raise

    try:
        bars: dict[str, Any] = {"tqdm_class": byte_counter(told)}
        told(0)
        if listing.sizes.get(name, 0) >= _RESUMED_BYTES:
            download_on(word.repo, listing.commit, name, bars)
        return Path(hf_hub_download(word.repo, name, repo_type="dataset", revision=listing.commit, **bars))
    except StudioError:
        raise
    except Exception as error:  # noqa: BLE001  as above
        if stopped:  # whatever the client makes of it
            raise stopped[0] from None
        said, why, lasting = _refusal(word, listing.commit, error)
        if lasting:
            raise BadInput(said) from None
        raise BadInput(
            f"{plain(name, one_line=True)} of the data set {word.repo} could not be downloaded ({why}). Try again: "
            "it goes on where it stopped."
        ) from None


def _refusal(word: HubWord, revision: str, error: Exception) -> tuple[str, str, bool]:
    """Return what to tell the user of a refusal of the hub, why in short, and whether it would be the same again."""
    from huggingface_hub import errors  # noqa: PLC0415  as above

    repo = word.repo
    name = f"The data set {repo}" + (f" at revision {plain(revision, one_line=True, limit=80)}" if revision else "")
    match error:
        case errors.GatedRepoError():
            way_out = f"accept its terms at {_PAGES}{repo}, then run: hf auth login"
            return f"{name} is gated: {way_out}.", "it is gated", True
        case errors.RevisionNotFoundError():
            said = f"{name} was not found: the hub has the data set, not this revision. Empty means the newest."
            return said, "it has no such revision", True
        case errors.RepositoryNotFoundError():
            said = (
                f"{name} is not on the hub, or it is private; nor is there such a file or folder here. Check the name; "
                "for private data run: hf auth login."
            )
            return said, "it is not there, or private", True
        case errors.OfflineModeIsEnabled():
            why = "offline mode is on (HF_HUB_OFFLINE)"
        case _:
            why = f"{type(error).__name__}: {plain(str(error), one_line=True, limit=160)}"
    said = (
        f"{name} cannot be found: there is no such file or folder here; it is not in the cache of the hub's client; "
        f"and the hub cannot be asked ({why}). On a machine with a connection run: hf download {repo} "
        "--repo-type dataset --local-dir FOLDER, and give the path of its copy."
    )
    return said, why, False


def _require_room(repo: str, missing_bytes: int) -> None:
    from huggingface_hub import constants  # noqa: PLC0415  as above

    cache = Path(constants.HF_HUB_CACHE)
    try:
        free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    except OSError:
        return
    if missing_bytes > free:
        raise BadInput(
            f"The data set {repo} needs {missing_bytes / 1e9:.1f} GB on the disk of {plain(str(cache), one_line=True)}"
            f", which has {free / 1e9:.1f} GB free. Free some space, or set HF_HOME to a folder on a larger disk."
        )


class _Known:
    """What the hub has listed of a data set before, noted in a file of ours."""

    def __init__(self, path: Path, table: dict[str, Any]) -> None:
        self._path, self._table = path, table

    @classmethod
    def of(cls, repo: str) -> "_Known":
        """Return what is noted of a data set; nothing where the note is missing or damaged."""
        path = cache_root() / "hub" / f"{repo.replace('/', '--')}.json"
        try:
            with path.open("rb") as file:
                table = json.loads(file.read(_MOST_NOTE_BYTES))
            return cls(path, {"revisions": dict(table["revisions"]), "commits": dict(table["commits"])})
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return cls(path, {"revisions": {}, "commits": {}})

    def listing(self, revision: str) -> Listing | None:
        """Return what was listed at a revision when it was last looked at."""
        commit = self._table["revisions"].get(revision, revision)
        sizes = self._table["commits"].get(commit)
        if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
            return None
        return Listing(str(commit), sizes)

    def keep(self, revision: str, listing: Listing) -> None:
        """Note what was listed; a disk that refuses only costs a question the next time."""
        self._table["revisions"][revision] = listing.commit
        commits = self._table["commits"]
        commits.pop(listing.commit, None)
        commits[listing.commit] = dict(listing.sizes)
        for old in list(commits)[:-_KEPT_COMMITS]:
            del commits[old]
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(self._table) + "\n")
