"""From the word in `data.path` to the files that are read: a file, a folder of files, or a data set of the hub.

A word is a path, `embedded`, or `owner/name` of the hub. A folder or a data set of the hub may have its configuration
and its split behind it (`folder#small:test`), and the latter its revision too (`owner/name#small@v2:test`); what the
word does not say, the recipe may.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.chosen_files import (
    CARD,
    DEFAULT,
    NOTHING_SAID,
    Layout,
    Wanted,
    choose,
    kind_of_name,
    layout_of_card,
)
from studio.probe.data.meant import DataFiles, HubWord
from studio.probe.data.opened import WANTED, Progress
from studio.probe.data.reading import AS_IT_IS, Reading
from studio.probe.data.shipped import EMBEDDED, shipped_data

MOST_FILES = 200_000
"""Most files and folders that are looked at in a folder: some seconds, and less than 100 MB of names."""
_MOST_STATE_BYTES = 2**24
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_HUB = re.compile(
    r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:#([\w.-]{1,200}))?(?:@([\w./-]{1,200}))?(?::([\w.-]{1,200}))?",
    re.ASCII,
)
_PART = re.compile(r"(.+?)(?:#([\w.-]{1,200}))?(?::([\w.-]{1,200}))?", re.ASCII)


def hub_word(word: str, how: Reading = AS_IT_IS) -> HubWord | None:
    """Return what a word names on the hub; None where it means something on this computer.

    A word that ends as files of rows do is a path, whether or not there is such a file.
    """
    found = _HUB.fullmatch(word)
    if not found or "--" in word or ".." in word or kind_of_name(found[1]) or _exists(Path(word)) or _folder_of(word):
        return None
    wanted = Wanted(found[2] or how.config, found[4] or how.split, how.prefer)
    return HubWord(found[1], found[3] or how.revision, wanted)


def find_files(path: Path, how: Reading = AS_IT_IS, *, progress: Progress | None = None, ask: bool = True) -> DataFiles:
    """Return the files that a word means; those of the hub are downloaded, or taken from its cache.

    Args:
        path: The word.
        how: Which configuration, split and revision are read.
        ask: Whether the hub may be asked; if not, what lies in the cache must do.
        progress: Told (done, total) in bytes while files are downloaded; may raise to end it.

    Raises:
        BadInput: There is nothing that could be read; says what was found, and what is wanted.
    """
    word = str(path)
    if word == EMBEDDED:
        path = shipped_data()
    elif there := hub_word(str(path), how):
        from studio.probe.data.hub_data import fetched  # noqa: PLC0415  only data of the hub need it

        return fetched(path, there, progress, ask=ask)
    elif (found := _folder_of(str(path))) and not _exists(path):
        return replace(_in_folder(found.folder, found.read_as(how)), path=path)
    if path.is_dir():
        return _in_folder(path, how)
    _require_file(path)
    for field, value in (("config", how.config), ("split", how.split), ("revision", how.revision)):
        if value:
            raise BadInput(
                f"{plain(str(path), one_line=True)} is one file, which has no {field}; leave data.{field} empty."
            )
    return DataFiles(path, word, (path,), (), path.stat().st_size)


def known_bytes(word: str, how: Reading = AS_IT_IS) -> int | None:
    """Return how many bytes a word's files have on the disk, without asking the hub; None where they are not all here.

    What cannot be read has none: reading it will say what is wrong.
    """
    try:
        return find_files(Path(word) if word == EMBEDDED else Path(word).expanduser(), how, ask=False).size_bytes
    except (BadInput, OSError, RuntimeError, ValueError):
        return None if hub_word(word, how) else 0


def same_place(one: str, other: str) -> bool:
    """Return whether two words mean one data set of the hub, or one folder or file, whatever their splits."""
    first, second = (hub_word(word) for word in (one, other))
    if first or second:
        return first is not None and second is not None and first.repo == second.repo
    paths = [
        found.folder if (found := _folder_of(word)) and not _exists(Path(word)) else Path(word) for word in (one, other)
    ]
    return paths[0].expanduser().absolute() == paths[1].expanduser().absolute()


def full_word(word: str, how: Reading) -> str:
    """Return a word that by itself means what it means read in this way: with configuration, revision and split."""
    if there := hub_word(word, how):
        return there.exact(there.wanted.config, there.wanted.split, there.revision)
    here = Path(word)
    found = _folder_of(word) if not _exists(here) else _FolderWord(here, "", "") if here.is_dir() else None
    if found:
        as_said = found.read_as(how)
        return _word_of(found.folder, as_said.config, as_said.split)
    return word


def absolute_word(word: str) -> str:
    """Return a word that means the same in any folder: a path made absolute, anything else as it is."""
    if word == EMBEDDED or hub_word(word):
        return word
    return str(Path(word).expanduser().absolute())


@dataclass(frozen=True, slots=True)
class _FolderWord:
    """A folder on this computer with the configuration and the split that its word says; empty for none."""

    folder: Path
    config: str
    split: str

    def read_as(self, how: Reading) -> Reading:
        """Return how it is read: what the word does not say, the recipe may."""
        return replace(how, config=self.config or how.config, split=self.split or how.split)


def _folder_of(word: str) -> _FolderWord | None:
    """Return what a word such as `folder:test` says; None where there is no such folder, or nothing behind it."""
    found = _PART.fullmatch(word)
    if not found or not (found[2] or found[3]):
        return None
    folder = Path(found[1])
    try:
        return _FolderWord(folder, found[2] or "", found[3] or "") if folder.is_dir() else None
    except (OSError, ValueError):
        return None


def _word_of(folder: Path, config: str, split: str) -> str:
    return str(folder) + (f"#{config}" if config else "") + (f":{split}" if split else "")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _in_folder(folder: Path, how: Reading) -> DataFiles:
    shown = plain(str(folder), one_line=True)
    if how.revision:
        raise BadInput(f"{shown} is a folder, which has no revisions; leave data.revision empty.")
    there = dict(_inside(folder, shown))
    chosen = choose(
        _listed_by_state(there, shown),
        _layout(there),
        Wanted(how.config, how.split, how.prefer),
        f"The folder {shown}",
        strict=True,
    )
    files = tuple(there[name] for name in chosen.names)
    for path in files:
        if not os.access(path, os.R_OK):
            raise BadInput(f"{plain(str(path), one_line=True)} may not be read: permission denied.")
    sizes = [path.stat().st_size for path in files]
    if not sum(sizes):
        raise BadInput(f"The folder {shown} holds only empty files. {WANTED}")
    word = _word_of(folder, chosen.config, chosen.split)
    return DataFiles(folder, word, files, chosen.names, sum(sizes), chosen.notes)


def _inside(folder: Path, shown: str) -> Iterator[tuple[str, Path]]:
    """Yield every file in a folder and in the folders in it, with its path from there; links are followed once."""
    seen: set[tuple[int, int]] = set()
    waiting = [(folder, "")]
    looked_at = 0
    while waiting:
        place, before = waiting.pop()
        here = place.stat()
        if (here.st_dev, here.st_ino) in seen:
            continue
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(place) as entries:
            for entry in entries:
                looked_at += 1
                if looked_at > MOST_FILES:
                    raise BadInput(
                        f"The folder {shown} holds more than {MOST_FILES:,} files and folders. Write its rows into a "
                        "few JSON Lines files, and name a folder of these."
                    )
                if entry.name.startswith("."):
                    continue
                try:
                    if entry.is_dir():
                        waiting.append((Path(entry.path), f"{before}{entry.name}/"))
                    elif entry.is_file():
                        yield f"{before}{entry.name}", Path(entry.path)
                except OSError:  # a link that leads nowhere or in a circle
                    continue


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of `datasets`."""
    try:
        return (folder / _SPLITS).is_file() or (folder / _STATE).is_file()
    except OSError:
        return False


def _listed_by_state(there: dict[str, Path], shown: str) -> list[str]:
    """Return the files without those of a `save_to_disk` folder that are no part of it, such as `cache-*.arrow`.

    Raises:
        BadInput: One of its parts is missing.
    """
    listed: dict[str, set[str]] = {}
    for name, path in there.items():
        folder, slash, file = name.rpartition("/")
        if file == _STATE and (names := _names_in_state(path)) is not None:
            listed[folder + slash] = names
    for folder, names in listed.items():
        if missing := next((folder + name for name in sorted(names) if folder + name not in there), None):
            lacks = plain(missing, one_line=True, limit=120)
            raise BadInput(f"The folder {shown} was saved by datasets, and {lacks} of it is missing.")
    kept = []
    for name in there:
        folder, slash, file = name.rpartition("/")
        if not file.endswith(".arrow") or file in listed.get(folder + slash, {file}):
            kept.append(name)
    return kept


def _names_in_state(path: Path) -> set[str] | None:
    """Return the files that a `state.json` of `datasets` names; None where it is another one."""
    try:
        return {str(entry["filename"]) for entry in json.loads(_start(path))["_data_files"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _layout(there: Mapping[str, Path]) -> Layout:
    """Return what a folder says of its files: as `datasets` saves several splits, or in a card."""
    if saved := there.get(_SPLITS):
        try:
            names = json.loads(_start(saved))["splits"]
            return Layout({DEFAULT: {str(name): [f"{name}/*.arrow"] for name in names}})
        except (ValueError, KeyError, TypeError, RecursionError):
            return NOTHING_SAID
    return layout_of_card(_start(there[CARD])) if CARD in there else NOTHING_SAID


def _start(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_STATE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _require_file(path: Path) -> None:
    """Require a file that can be opened and holds something.

    Raises:
        BadInput: There is no such file, it is a device, it is empty, or it may not be read.
    """
    shown = plain(str(path), one_line=True)
    if not path.exists():
        near = (
            f" The folder {plain(str(path.parent), one_line=True)} does not exist either."
            if not path.parent.exists()
            else ""
        )
        raise BadInput(f"The data file {shown} does not exist.{near} {WANTED}")
    if not path.is_file():
        raise BadInput(f"{shown} is not a regular file. {WANTED}")
    if not os.access(path, os.R_OK):
        raise BadInput(f"{shown} may not be read: permission denied.")
    if not path.stat().st_size:
        raise BadInput(f"The data file {shown} is empty. {WANTED}")
