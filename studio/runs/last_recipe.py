"""The recipe that was changed last in the studio, kept from one visit to the next. Knows no screen."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.recipe import FIELDS, Recipe
from studio.core.recipe_parse import recipe_from_dict
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.home import studio_home
from studio.runs.recipe_file import resolve_paths, shipped_recipes

_FILE = "last_recipe.json"
_MOST_BYTES = 256 * 1024
_MOST_READ = 2**20


@dataclass(frozen=True, slots=True)
class RecipeSource:
    """The file that a recipe was read from or written to last.

    Attributes:
        path: Where it lies.
        digest: 128-bit xxh3 of what it held then, in hexadecimal; empty where it could not be read.
    """

    path: str
    digest: str


@dataclass(frozen=True, slots=True)
class LastRecipe:
    """A recipe as the user left it.

    Attributes:
        recipe: The recipe.
        source: The user's file that it was opened from; None where it was opened from none.
    """

    recipe: Recipe
    source: RecipeSource | None = None


def source_of(path: Path) -> RecipeSource:
    """Return a recipe's file as it is now."""
    absolute = path.absolute()
    import xxhash  # noqa: PLC0415  not needed for the first frame

    try:
        with absolute.open("rb") as file:
            return RecipeSource(str(absolute), xxhash.xxh3_128(file.read(_MOST_READ)).hexdigest())
    except (OSError, ValueError):
        return RecipeSource(str(absolute), "")


def source_of_users(path: Path) -> RecipeSource | None:
    """Return a recipe's file as it is now; None for a shipped one, which changes with the program."""
    return None if path in shipped_recipes().values() else source_of(path)


def sound_part(recipe: Recipe, sound: Recipe) -> Recipe:
    """Return a recipe without problems: each field with a problem gets its value of a sound recipe.

    Where that is not enough, because fields contradict each other, all fields of their tables do.
    """
    for whole_table in (False, True):
        named = {problem.path.rpartition(".")[0] if whole_table else problem.path for problem in recipe.problems()}
        for path in FIELDS:
            if path in named or (whole_table and path.rpartition(".")[0] in named):
                recipe = recipe.with_(path, sound.get(path))
    return sound if recipe.problems() else recipe


def keep_last_recipe(last: LastRecipe, home: Path | None = None) -> None:
    """Keep a recipe for the next visit, readable by its owner only; its paths become absolute.

    Raises:
        BadInput: It is too long to be kept.
        OSError: It cannot be written; what was kept before is still there.
    """
    table: dict[str, Any] = {"recipe": resolve_paths(last.recipe, (Path.cwd(),)).to_dict()}
    if last.source is not None:
        table["file"], table["digest"] = last.source.path, last.source.digest
    text = json.dumps(table, indent=1) + "\n"
    if len(text) > _MOST_BYTES:
        raise BadInput(f"a recipe of {len(text)} bytes is too long to be kept for the next visit.")
    folder = home or studio_home()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _FILE, text)


def recall_last_recipe(home: Path | None = None) -> tuple[LastRecipe | None, str]:
    """Return the recipe of the last visit, and what to tell the user of it; at the first visit None and nothing."""
    path = (home or studio_home()) / _FILE
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, _lost(error.strerror or str(error))
    if len(content) > _MOST_BYTES:
        return None, _lost("the file that keeps it is too long")
    try:
        table = json.loads(content)
        recipe = recipe_from_dict(table["recipe"])
    except (BadInput, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, _lost("the file that keeps it is damaged")
    source = _source(table)
    return LastRecipe(recipe, source), _what_changed(source)


def _lost(why: str) -> str:
    return f"The recipe that you turned last cannot be brought back: {plain(why, one_line=True)}. This is the demo's."


def _source(table: dict[str, Any]) -> RecipeSource | None:
    path, digest = table.get("file"), table.get("digest")
    return RecipeSource(path, digest) if isinstance(path, str) and isinstance(digest, str) and path else None


def _what_changed(source: RecipeSource | None) -> str:
    """Return what has happened to the recipe's file since; empty where it is unchanged."""
    if source is None or "\0" in source.path:
        return ""
    now, shown = source_of(Path(source.path)), plain(source.path, one_line=True)
    if now.digest == source.digest:
        return ""
    what = "has changed since your last visit" if now.digest else "is not there any more"
    opens = f" O opens the file, lora-studio --recipe {shown} begins with it." if now.digest else ""
    return f"The file {shown} {what}. This is the recipe as you left it here.{opens}"
