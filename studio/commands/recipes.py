"""`lora-studio recipes`: the recipes that come with the program."""

import argparse
from pathlib import Path
from typing import Any

from studio.commands.field_reference import field_reference, field_rows
from studio.commands.options import add_json
from studio.commands.terminal import DONE, say, table, write_json
from studio.runs.recipe_file import load_recipe, shipped_recipes


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("recipes", help="the recipes that come with the program")
    parser.add_argument("--fields", action="store_true", help="every field of a recipe instead, as Markdown")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """List the shipped recipes, or what can stand in one.

    Raises:
        BadInput: A shipped recipe is damaged.
    """
    if args.fields:
        if args.json:
            write_json(field_rows())
        else:
            say(field_reference())
        return DONE
    found = [_row(name, path) for name, path in shipped_recipes().items()]
    if args.json:
        write_json(found)
    elif not found:
        say("no recipes are installed")
    else:
        rows = [[str(recipe[key]) for key in ("name", "method", "model", "rank", "about")] for recipe in found]
        say(table([["recipe", "method", "model", "rank", "for"], *rows]))
    return DONE


def _row(name: str, path: Path) -> dict[str, Any]:
    recipe = load_recipe(path)
    return {
        "name": name,
        "path": str(path),
        "method": recipe.method,
        "model": recipe.model.base,
        "rank": recipe.adapter.rank,
        "about": _head_comment(path),
    }


def _head_comment(path: Path) -> str:
    """The first line of the file's head comment says what the recipe is for."""
    first = path.read_text("utf-8").lstrip().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
