"""Saving and opening recipes from the screen."""

from pathlib import Path

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.last_recipe import RecipeSource, source_of_users
from studio.runs.recipe_file import dump_recipe, find_recipe, load_recipe

_SUFFIX = ".toml"


def target_of(word: str) -> Path:
    """Return the file that a typed word means; without a suffix it gets `.toml`.

    Raises:
        BadInput: It names no file.
    """
    if not word.strip() or "\0" in word:
        raise BadInput("found no file name; wanted one such as my-recipe.toml.")
    try:
        path = Path(word.strip()).expanduser()
    except RuntimeError:
        raise BadInput(f"there is no home folder for {plain(word, one_line=True, limit=200)}.") from None
    if not path.suffix and not path.is_dir():
        path = path.with_name(path.name + _SUFFIX)
    if path.is_dir():
        raise BadInput(f"{plain(str(path), one_line=True, limit=200)} is a folder; wanted a file in it.")
    return path


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe so that it is there whole or not at all.

    Raises:
        BadInput: The folder is not there or refuses.
    """
    try:
        write_whole(path, dump_recipe(recipe))
    except OSError as error:
        shown = plain(str(path), one_line=True, limit=200)
        raise BadInput(f"the recipe {shown} cannot be written: {error.strerror or error}.") from error


def open_recipe(word: str) -> Recipe:
    """Return the recipe in a file, or the shipped one of that name.

    Raises:
        BadInput: There is none, or it is damaged.
    """
    return load_recipe(find_recipe(word.strip()))


def source_of_word(word: str) -> RecipeSource | None:
    """Return the user's file that a word means; None for a shipped recipe.

    Raises:
        BadInput: There is none.
    """
    return source_of_users(find_recipe(word.strip()))
