"""`lora-studio` without a verb: the full-screen studio, where there is a terminal that can show it."""

import argparse
from pathlib import Path

from studio.commands.options import root_of
from studio.commands.terminal import complain, why_no_studio
from studio.core.recipe import Recipe
from studio.runs.home import is_first_visit
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
        from studio.commands.runs_list import list_all  # noqa: PLC0415  not for the screen

        complain(f"lora-studio: {reason}: here are the runs. Everything works without a screen: lora-studio --help")
        return list_all(argparse.Namespace(runs_dir=root, json=False))
    return open_studio(first_recipe(args.recipe), root, setup=not args.recipe and is_first_visit(root))


def open_studio(
    recipe: Recipe, root: Path, *, open_run: RunPaths | None = None, launch: bool = False, setup: bool = False
) -> int:
    """Open the studio on a recipe; the screens are imported here and nowhere else.

    Args:
        recipe: What it opens on.
        root: Where runs live.
        open_run: A run to look at first.
        launch: Start the recipe at once.
        setup: Begin with the guided set-up.
    """
    from studio.tui.spare_memory import importing  # noqa: PLC0415  as the next

    with importing():
        from studio.tui.app import run_studio  # noqa: PLC0415  0.3 s that no other verb should pay

    watched = open_run.root if open_run else None
    return run_studio(recipe, runs_root=root, open_run=watched, launch=launch, setup=setup)


def first_recipe(word: str | None) -> Recipe:
    """Return the recipe that was asked for, else the shipped demo, else the defaults.

    Raises:
        BadInput: What was asked for cannot be used.
    """
    if word:
        return load_recipe(find_recipe(word))
    return load_recipe(shipped_recipes()[FIRST]) if FIRST in shipped_recipes() else Recipe()
