"""`lora-studio recipes`: the recipes that come with the program, and the reference of every field."""

import argparse
from pathlib import Path
from typing import Any

from studio.commands.options import add_json
from studio.commands.terminal import DONE, say, table, write_json
from studio.core.recipe import FIELDS, SECTIONS, choices_of
from studio.core.recipe_field import Field
from studio.core.value_kinds import Switch
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


def field_rows() -> list[dict[str, Any]]:
    """Return section, path, flag, default, allowed values, help and cost of every field, in the screens' order."""
    return [_field_row(FIELDS[path]) for _, paths in SECTIONS for path in paths]


def field_reference() -> str:
    """Return one Markdown table a section."""
    lines: list[str] = []
    section = ""
    for row in field_rows():
        if row["section"] != section:
            section = row["section"]
            lines += [
                "",
                f"**{section}**",
                "",
                "| field | default | allowed | what it does, what it costs |",
                "|---|---|---|---|",
            ]
        name = f"`{row['path']}`" + (f" `--{row['flag']}`" if row["flag"] else "")
        lines.append(
            f"| {name} | {_default_text(row['default'])} | {row['allowed']} | {row['help']} {row['cost']}".rstrip()
            + " |"
        )
    return "\n".join(lines[1:])


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
    """Return the first line of a file's head comment, which says what the recipe is for; empty without one."""
    first = path.read_text("utf-8").lstrip().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _field_row(field: Field) -> dict[str, Any]:
    return {
        "section": field.heading,
        "path": field.path,
        "flag": field.flag,
        "default": field.kind.stored(field.default),
        "allowed": _allowed(field),
        "help": field.help,
        "cost": field.cost,
    }


def _allowed(field: Field) -> str:
    if isinstance(field.kind, Switch):
        return ", ".join(("true", "false", *field.kind.words))
    return ", ".join(choices_of(field.path)) or field.kind.allowed


def _default_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value in ("", [], {}):
        return "empty"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
