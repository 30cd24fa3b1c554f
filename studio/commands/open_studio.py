"""`lora-studio` without a verb: the full-screen studio, where there is a terminal that can show it."""

import argparse
from pathlib import Path

from studio.commands.options import root_of
from studio.commands.terminal import complain, why_no_studio
from studio.core.recipe import Recipe
from studio.runs.home import is_first_visit
from studio.runs.last_recipe import RecipeSource, recall_last_recipe, source_of_users
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import find_recipe, load_recipe, shipped_recipes

FIRST = "demo"


def run(args: argparse.Namespace) -> int:
    """Open the studio; where it cannot be shown say why, and list the runs as plain text.

    Raises:
        BadInput: The recipe cannot be used.
    """
    root = root_of(args)
    if reason := why_no_studio():
        from studio.commands.runs_list import list_all  # noqa: PLC0415  the studio itself does not need it

        complain(f"lora-studio: {reason}: here are the runs. Everything works without a screen: lora-studio --help")
        return list_all(argparse.Namespace(runs_dir=root, json=False))
    if args.recipe:
        path = find_recipe(args.recipe)
        return open_studio(load_recipe(path), root, source=source_of_users(path))
    return open_on_last(root, setup=is_first_visit(root))


def open_on_last(root: Path, *, setup: bool) -> int:
    """Open the studio on the recipe that was turned last, else on the shipped demo.

    Args:
        root: Where runs live.
        setup: Begin with the guided set-up.
    """
    last, note = recall_last_recipe()
    recipe, source = (last.recipe, last.source) if last else (first_recipe(), None)
    return open_studio(recipe, root, setup=setup, source=source, note=note)


def open_studio(
    recipe: Recipe,
    root: Path,
    *,
    open_run: RunPaths | None = None,
    launch: bool = False,
    setup: bool = False,
    source: RecipeSource | None = None,
    note: str = "",
) -> int:
    """Open the studio on a recipe; the screens are imported here and nowhere else.

    Args:
        recipe: What it opens on.
        root: Where runs live.
        open_run: A run to look at first.
        launch: Start the recipe at once.
        setup: Begin with the guided set-up.
        source: The user's file that the recipe came from.
        note: A message on the recipe to show at the start; empty for none.
    """
    from studio.tui.app import run_studio  # noqa: PLC0415  0.3 s that no other verb should pay

    watched = open_run.root if open_run else None
    return run_studio(recipe, runs_root=root, open_run=watched, launch=launch, setup=setup, source=source, note=note)


def first_recipe() -> Recipe:
    """Return the shipped demo recipe; where it is not installed, the defaults.

    Raises:
        BadInput: The shipped file is damaged.
    """
    return load_recipe(shipped_recipes()[FIRST]) if FIRST in shipped_recipes() else Recipe()
