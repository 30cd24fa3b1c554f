"""Saving and opening recipes: the questions, and the file that is written."""

from collections.abc import Callable
from pathlib import Path

from textual.app import App
from textual.content import Content

from studio.core.errors import BadInput, StudioError
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.last_recipe import RecipeSource, source_of
from studio.runs.recipe_file import dump_recipe
from studio.tui.screens.dialogs import AskLine, Confirm, ask

_LONGEST_NAME = 60


def ask_to_save(app: App[None], recipe: Recipe, saved: Callable[[RecipeSource], None]) -> None:
    """Ask for a file, save the recipe there and pass the file to `saved`. Writing over a file takes a yes."""

    def save(path: Path) -> None:
        if _save(app, recipe, path):
            saved(source_of(path))

    def take(word: str) -> None:
        path = target_of(word)
        if path.exists():
            question = Content(f"{plain(str(path), one_line=True)} is there already. Write over it?")
            app.push_screen(Confirm(question, "write over it"), lambda yes: save(path) if yes else None)
        else:
            save(path)

    name = f"{plain(recipe.name, one_line=True, limit=_LONGEST_NAME)}.toml"
    ask(app, AskLine("Save the recipe as", name, check=target_of), take)


def ask_to_open(
    app: App[None],
    recipe: Recipe,
    runs_root: Path,
    source: RecipeSource | None,
    opened: Callable[[Recipe, RecipeSource | None], None],
) -> None:
    """Let the user choose a recipe and hand it on, with its file where that is the user's.

    Args:
        app: Shows the list.
        recipe: The one on the screen, with which others are compared.
        runs_root: Where runs live.
        source: The file that the recipe on the screen came from: its folder is looked at, too.
        opened: Takes what was chosen.
    """
    from studio.runs.found_recipes import found_recipes  # noqa: PLC0415  not needed for the first frame
    from studio.tui.screens.open import OpenScreen  # noqa: PLC0415  as above

    places = [Path.cwd(), Path.cwd() / "recipes", *([Path(source.path).parent] if source else [])]

    app.push_screen(OpenScreen(recipe, lambda: found_recipes(runs_root, places), opened))


def _save(app: App[None], recipe: Recipe, path: Path) -> bool:
    try:
        save_recipe(recipe, path)
    except StudioError as error:
        app.notify(plain(str(error)), severity="error", markup=False)
        return False
    app.notify(f"Saved as {plain(str(path), one_line=True)}.", markup=False)
    return True


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
