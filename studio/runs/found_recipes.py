"""Which recipes there are to open: files of the user's and of other tools, those of training runs, the shipped ones."""

import re
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
OF_OTHER_TOOLS = (".yaml", ".yml", ".json", ".py", ".ipynb")
"""Suffixes of what `lora-studio import` reads."""
_THEIRS = re.compile(
    r"""^\s*["']?(base_model|model_name_or_path)["']?\s*:|\b(FastLanguageModel|(SFT|DPO|ORPO)(Trainer|Config))\b""",
    re.MULTILINE,
)
"""What a configuration of axolotl, LLaMA-Factory or TRL names, or a script that calls TRL or Unsloth."""
_MOST_FILES = 200
_MOST_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FoundRecipe:
    """A recipe that can be opened.

    Attributes:
        name: What it is called in a list.
        path: The file.
        kind: `file` of the user's, configuration of another tool to `import`, recipe of a `run`, or `shipped` with the
            program.
        changed_at: Unix seconds: when the file was written, or the run was started.
        run: What the list of runs knows, of a run.
    """

    name: str
    path: Path
    kind: Literal["file", "import", "run", "shipped"]
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
        folders: Where to look for files of the user's; what holds neither a field of a recipe nor what other tools name
            is passed over.
    """
    shipped = shipped_recipes()
    passed = {path.resolve() for path in shipped.values()}
    paths = {path.resolve(): path for folder in folders for path in files_in(folder)}
    files = [found_file(path) for real, path in paths.items() if real not in passed and _can_be_opened(path)]
    runs = [
        FoundRecipe(info.name, info.paths.recipe, "run", info.started_at or _changed_at(info.paths.recipe), info)
        for info in list_runs(runs_root)
        if info.job in (None, TRAIN) and info.paths.recipe.is_file()
    ]
    recent = sorted((*files, *runs), key=lambda found: (-found.changed_at, found.name))
    return [*recent, *(FoundRecipe(name, path, "shipped") for name, path in shipped.items())]


def files_begun(word: str) -> list[FoundRecipe]:
    """Return the TOML files that a typed path begins, or that lie in the folder which it names, and other tools' files.

    By name.
    """
    if not any(mark in word for mark in "/\\~") or "\0" in word:
        return []
    try:
        path = Path(word).expanduser()
        folder, begun = (path, "") if path.is_dir() else (path.parent, path.name)
    except (OSError, RuntimeError):  # a name too long, no such home
        return []
    found = [found for found in files_in(folder) if found.name.startswith(begun)]
    return [found_file(path) for path in found if path.suffix == _SUFFIX or _can_be_opened(path)]


def files_in(folder: Path) -> list[Path]:
    """Return at most 200 files of a folder that may hold a recipe, by name; none where it cannot be read."""
    suffixes = (_SUFFIX, *OF_OTHER_TOOLS)
    try:
        found = (path for path in folder.iterdir() if path.suffix in suffixes and not path.name.startswith("."))
        return sorted(islice(found, _MOST_FILES))
    except OSError:
        return []


def _can_be_opened(path: Path) -> bool:
    """Return whether a file has what a recipe or another tool's configuration has and other files have not."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8-sig", "replace")
    except OSError:
        return False
    return holds_recipe(text) if path.suffix == _SUFFIX else bool(_THEIRS.search(text))


def holds_recipe(text: str) -> bool:
    """Return whether a TOML text has a table of a recipe, which other files have not, or sets a field of one."""
    try:
        tables = {name: value for name, value in tomllib.loads(text).items() if isinstance(value, dict)}
    except (ValueError, RecursionError):
        return any(f"[{table}]" in text for table in _OWN_TABLES)
    return any(
        table in _OWN_TABLES or f"{table}.{name}" in FIELDS for table, fields in tables.items() for name in fields
    )


def found_file(path: Path) -> FoundRecipe:
    """Return a file of the user's, by its suffix a recipe or another tool's configuration."""
    return FoundRecipe(path.name, path, "import" if path.suffix in OF_OTHER_TOOLS else "file", _changed_at(path))


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
