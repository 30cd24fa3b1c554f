"""The questions around saving and opening a recipe."""

from collections.abc import Callable
from pathlib import Path

from textual.app import App
from textual.content import Content

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.runs.last_recipe import RecipeSource, source_of
from studio.runs.recipe_file import shipped_recipes
from studio.tui.recipe_files import open_recipe, save_recipe, source_of_word, target_of
from studio.tui.screens.ask_line import AskLine
from studio.tui.screens.confirm import Confirm

_LONGEST_NAME = 60


def ask_to_save(app: App[None], recipe: Recipe, saved: Callable[[RecipeSource], None]) -> None:
    """Ask for a file, save the recipe there and tell which it was; a file that is there already takes a yes."""

    def save(path: Path) -> None:
        if _save(app, recipe, path):
            saved(source_of(path))

    def take(word: str | None) -> None:
        if word is None:
            return
        path = target_of(word)
        if path.exists():
            question = Content(f"{plain(str(path), one_line=True)} is there already. Write over it?")
            app.push_screen(Confirm(question, "write over it"), lambda yes: save(path) if yes else None)
        else:
            save(path)

    name = f"{plain(recipe.name, one_line=True, limit=_LONGEST_NAME)}.toml"
    app.push_screen(AskLine("Save the recipe as", name, check=target_of), take)


def ask_to_open(app: App[None], opened: Callable[[Recipe, RecipeSource | None], None]) -> None:
    """Ask for a recipe's file or name and hand the recipe on, with the file where it is the user's."""

    def take(word: str | None) -> None:
        if word is not None:
            opened(open_recipe(word), source_of_word(word))

    hint = f"A file, or a shipped recipe: {', '.join(shipped_recipes())}"
    app.push_screen(AskLine("Open which recipe?", "", hint=hint, check=open_recipe), take)


def _save(app: App[None], recipe: Recipe, path: Path) -> bool:
    try:
        save_recipe(recipe, path)
    except StudioError as error:
        app.notify(plain(str(error)), severity="error", markup=False)
        return False
    app.notify(f"Saved as {plain(str(path), one_line=True)}.", markup=False)
    return True
