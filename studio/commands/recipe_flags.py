"""Short flags for the fields of a recipe that people change most, made from what is declared of the fields."""

import argparse
from typing import Any

from studio.core.layer_count import LayerCount
from studio.core.recipe import FIELDS, SECTIONS
from studio.core.recipe_field import Field
from studio.core.value_kinds import Choice, Number, Switch

_FLAGS = {FIELDS[path].flag: FIELDS[path] for _, paths in SECTIONS for path in paths if FIELDS[path].flag}
_OF_THE_VERB = ("model", "data")
"""Flags that each verb adds itself: not every verb has them, and `--model` of some takes more kinds of file."""


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add every short flag but `--model` and `--data`."""
    for flag, field in _FLAGS.items():
        if flag not in _OF_THE_VERB:
            parser.add_argument(f"--{flag}", help=_help(field), **_form(field))
    of_all = argparse.BooleanOptionalAction
    parser.add_argument("--grad-checkpointing", action=of_all, help="The same as --recompute all, or none.")


def settings_of(args: argparse.Namespace, *, without: tuple[str, ...] = ()) -> list[str]:
    """Return the `--set` words, then a `path=value` word for each flag that was given: the last word on a field wins.

    Args:
        args: The parsed arguments.
        without: Flags that mean something else in this verb.
    """
    given = (
        (field.path, getattr(args, flag.replace("-", "_"), None))
        for flag, field in _FLAGS.items()
        if flag not in without
    )
    words = [f"{path}={value}" for path, value in given if value is not None]
    if (again := getattr(args, "grad_checkpointing", None)) is not None:
        words.insert(0, f"train.recompute={'all' if again else 'none'}")
    return [*args.set, *words]


def _form(field: Field) -> dict[str, Any]:
    """Return the parser's arguments for a flag. What it takes as text, such as a number, is checked with the recipe."""
    if isinstance(field.kind, Choice):
        return {"choices": field.kind.words}
    if isinstance(field.kind, Switch):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(field.kind, LayerCount):
        return {"metavar": f"{{{','.join(field.kind.words)},N}}"}
    return {"metavar": "N" if isinstance(field.kind, Number) else "NAMES"}


def _help(field: Field) -> str:
    limits = f" {field.kind.allowed}." if isinstance(field.kind, Number) else ""
    return f"{field.help}{limits}".replace("%", "%%")
