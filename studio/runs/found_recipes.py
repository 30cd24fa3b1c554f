"""Which recipes there are to open: files of the user's, those of training runs, and the shipped ones."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from studio.core.recipe import FIELDS
from studio.runs.recipe_file import shipped_recipes
from studio.runs.store import RunInfo, list_runs

TRAIN = "train"
_OWN_TABLES = ("model", "adapter", "train")
_SUFFIX = ".toml"
_MOST_FILES = 200
_MOST_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FoundRecipe:
    """A recipe that can be opened.

    Attributes:
        name: What it is called in a list.
        path: The file.
        kind: `file` of the user's, recipe of a `run`, or `shipped` with the program.
        changed_at: Unix seconds: when the file was written, or the run was started.
        run: What the list of runs knows, of a run.
    """

    name: str
    path: Path
    kind: Literal["file", "run", "shipped"]
    changed_at: float = 0.0
    run: RunInfo | None = None

    @property
    def searched(self) -> str:
        """The words by which it is found, in small letters."""
        run = (self.run.method, self.run.model, self.run.note, self.run.status) if self.run else ()
        return " ".join(str(word) for word in (self.name, self.kind, *run) if word).lower()


def found_recipes(runs_root: Path, folders: Iterable[Path]) -> list[FoundRecipe]:
    """Return the user's files and the training runs, the most recent first, and then the shipped recipes by name.

    Args:
        runs_root: Where runs live.
        folders: Where to look for files of the user's; files that hold no field of a recipe are passed over.
    """
    shipped = shipped_recipes()
    passed = {path.resolve() for path in shipped.values()}
    paths = {path.resolve(): path for folder in folders for path in files_in(folder)}
    files = [_file(path) for real, path in paths.items() if real not in passed and holds_recipe(path)]
    runs = [
        FoundRecipe(info.name, info.paths.recipe, "run", info.started_at or _changed_at(info.paths.recipe), info)
        for info in list_runs(runs_root)
        if info.job in (None, TRAIN) and info.paths.recipe.is_file()
    ]
    recent = sorted((*files, *runs), key=lambda found: (-found.changed_at, found.name))
    return [*recent, *(FoundRecipe(name, path, "shipped") for name, path in shipped.items())]


def files_begun(word: str) -> list[FoundRecipe]:
    """Return the TOML files that a typed path begins, or that lie in the folder which it names, by name."""
    if not any(mark in word for mark in "/\\~") or "\0" in word:
        return []
    try:
        path = Path(word).expanduser()
        folder, begun = (path, "") if path.is_dir() else (path.parent, path.name)
    except (OSError, RuntimeError):  # a name too long, no such home
        return []
    return [_file(found) for found in files_in(folder) if found.name.startswith(begun)]


def files_in(folder: Path) -> list[Path]:
    """Return at most 200 TOML files of a folder, by name; none where it cannot be read."""
    try:
        found = (path for path in folder.iterdir() if path.suffix == _SUFFIX and not path.name.startswith("."))
        return sorted(islice(found, _MOST_FILES))
    except OSError:
        return []


def holds_recipe(path: Path) -> bool:
    """Return whether a TOML file has a table of a recipe, which other files have not, or sets a field of one."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return False
    try:
        tables = {name: value for name, value in tomllib.loads(text).items() if isinstance(value, dict)}
    except (ValueError, RecursionError):
        return any(f"[{table}]" in text for table in _OWN_TABLES)
    return any(
        table in _OWN_TABLES or f"{table}.{name}" in FIELDS for table, fields in tables.items() for name in fields
    )


def _file(path: Path) -> FoundRecipe:
    return FoundRecipe(path.name, path, "file", _changed_at(path))


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
