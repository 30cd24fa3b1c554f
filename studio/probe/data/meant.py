"""What a word in `data.path` means: files on this computer, or a data set of the hub."""

from dataclasses import dataclass
from pathlib import Path

from studio.probe.data.chosen_files import Wanted


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The files that a word means.

    Attributes:
        path: What was asked for.
        word: The word that means these files and no others: with its split and commit, where there are several.
        files: The files, in the order in which they are read.
        names: What messages call each; empty for a file that is read alone.
        size_bytes: Their size on the disk.
        notes: What the user should know of which files are read.
        commit: Of a data set of the hub, the commit that they are of.
    """

    path: Path
    word: str
    files: tuple[Path, ...]
    names: tuple[str, ...]
    size_bytes: int
    notes: tuple[str, ...] = ()
    commit: str = ""


@dataclass(frozen=True, slots=True)
class HubWord:
    """A data set of the hub, as a word and a recipe name it."""

    repo: str
    revision: str
    wanted: Wanted

    def exact(self, config: str, split: str, commit: str) -> str:
        """Return the word for one configuration, split and commit of it; empty where there is only one."""
        parts = zip("#@:", (config, commit, split), strict=True)
        return self.repo + "".join(f"{mark}{part}" for mark, part in parts if part)
