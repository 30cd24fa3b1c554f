"""Recipes as files: read with all problems named, written so that a person can read and diff them."""

import re
from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED, PLACES, Recipe
from studio.core.recipe_parse import apply_settings, read_table
from studio.core.sources import Source
from studio.core.text import plain

_MOST_BYTES = 2**20
_PACKAGE = Path(__file__).resolve().parents[1]


def load_recipe(path: Path, settings: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `path=value` settings to it.

    A relative data or model path in the file means a place in the file's folder, if it exists there, else in the
    current folder. For a path among the settings the current folder comes first.

    Raises:
        BadInput: There is no such file, it is not UTF-8 or not TOML (the line is shown), or the recipe has problems.
    """
    import tomllib  # noqa: PLC0415  3 ms that plans without a recipe do not pay

    shown = plain(str(path), one_line=True)
    text = _text_of(path, shown)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{shown} is not valid TOML: {_toml_place(str(error), text)}") from error
    except RecursionError as error:
        raise BadInput(f"{shown} is nested too deeply to be a recipe.") from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise BadInput(f"{shown} holds a number that is too long to be read.") from error
    try:
        here, folder = Path.cwd(), path.absolute().parent
        recipe, unknown = read_table(table)
        recipe = apply_settings(resolve_paths(recipe, (folder, here)), settings, also=unknown)
        return resolve_paths(recipe, (here, folder))
    except BadInput as error:
        raise BadInput(f"{shown}: {error}") from error


def resolve_paths(recipe: Recipe, folders: Iterable[Path]) -> Recipe:
    """Make relative data and model paths absolute, by the first folder that has them; a path that none has stays."""
    folders = tuple(folders)
    for field in PLACES:
        recipe = recipe.with_(field, _resolved(recipe.get(field), folders))
    sources = recipe.data.sources
    if isinstance(sources, tuple) and all(isinstance(source, Source) for source in sources):
        placed = (replace(source, path=_resolved(source.path, folders)) for source in sources)
        recipe = recipe.with_("data.sources", tuple(placed))
    return recipe


def _resolved(word: Any, folders: Iterable[Path]) -> Any:
    if not isinstance(word, str) or not word or word == EMBEDDED or "\0" in word:
        return word
    given = Path(word).expanduser() if word.startswith("~") else Path(word)
    found = next((str((folder / given).resolve()) for folder in folders if _exists(folder / given)), word)
    for mark in ":#" if found == word else "":  # a folder of data, and which split or configuration of it
        head, there, part = word.rpartition(mark)
        if there and (inside := _resolved(head, folders)) != head:
            return f"{inside}{mark}{part}"
    return found


def dump_recipe(recipe: Recipe, only: Container[str] | None = None) -> str:
    """Return the recipe as TOML, tables in the order of the fields.

    Args:
        recipe: The recipe.
        only: The fields that are written; None writes all.
    """
    import tomlkit  # noqa: PLC0415  7 ms that reading does not need

    tables = recipe.to_dict() if only is None else _without_others(recipe.to_dict(), only)
    for fields in tables.values():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if isinstance(value, dict):
                fields[name] = _inline(value)
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                # Not as [[tables]]: the fields behind them would be taken for theirs.
                fields[name] = tomlkit.array().multiline(True)
                fields[name].extend(map(_inline, value))
    return tomlkit.dumps(tables)


def _without_others(tables: dict[str, Any], only: Container[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in tables.items():
        if not isinstance(value, dict):
            kept |= {name: value} if name in only else {}
        elif inner := {field: one for field, one in value.items() if f"{name}.{field}" in only}:
            kept[name] = inner
    return kept


def _inline(table: dict[str, Any]) -> Any:
    import tomlkit  # noqa: PLC0415  as above

    made = tomlkit.inline_table()
    made.update(table)
    return made


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the program, by name: packed beside the code, or the checkout's folder."""
    packed = _PACKAGE / "_recipes"
    folder = packed if packed.is_dir() else _PACKAGE.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(word: str) -> Path:
    """Return the file that a word means: a path that exists, else the name of a shipped recipe.

    Raises:
        BadInput: It is neither.
    """
    path = Path(word).expanduser() if word.startswith("~") else Path(word)
    shipped = shipped_recipes()
    if word in shipped and not path.is_file():
        return shipped[word]
    if "\0" not in word and (_exists(path) or "/" in word or word.endswith(".toml")):
        return path
    raise BadInput(
        f"there is no recipe {plain(word, one_line=True)!r}: neither a file here nor one of the shipped recipes "
        f"({', '.join(shipped) or 'none found'})."
    )


def _text_of(path: Path, shown: str) -> str:
    try:
        if path.is_dir():
            raise BadInput(f"{shown} is a folder; a recipe is one TOML file.")
        if path.exists() and not path.is_file():
            raise BadInput(f"{shown} is not a regular file; a recipe is one TOML file.")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise BadInput(f"there is no recipe file {shown}; `lora-studio recipes` lists the shipped ones.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadInput(f"the recipe {shown} cannot be read: {reason}.") from error
    if len(content) > _MOST_BYTES:
        raise BadInput(f"{shown} is larger than 1 MiB: that is no recipe. Data files are named in [data] path.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{shown} is not UTF-8 text: byte 0x{content[error.start]:02x} in line {line}.") from error


def _toml_place(message: str, text: str) -> str:
    """Return the parser's message with the line that it names."""
    found = re.search(r"line (\d+)", message)
    lines = text.splitlines()
    number = int(found[1]) if found else len(lines)
    shown = plain(lines[number - 1], one_line=True, limit=160) if 0 < number <= len(lines) else ""
    return f"{plain(message, one_line=True)}\n  line {number}: {shown}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
