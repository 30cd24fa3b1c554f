"""Short flags for the fields of a recipe that people change most; numbers and help come from the knobs."""

import argparse

from studio.core.knobs import KNOBS
from studio.core.recipe import choices_of

_CHOICES = {
    "method": "method",
    "optimizer": "train.optimizer",
    "attention": "train.attention",
    "loss": "train.loss",
    "dtype": "model.dtype",
}
_SWITCHES = {"grad_checkpointing": "train.grad_checkpointing", "double_quant": "model.double_quant"}
_NUMBERS = {knob.flag: path for path, knob in KNOBS.items() if knob.flag}
_WORDS = {"targets": "adapter.targets", "model": "model.base", "data": "data.path"}
_FLAGS = {**_CHOICES, **_SWITCHES, **_NUMBERS, **_WORDS}


def flag_of(path: str) -> str:
    """Return the short flag of a field as it is typed, without the leading dashes; empty where it has none."""
    return next((flag.replace("_", "-") for flag, field in _FLAGS.items() if field == path), "")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add every short flag but `--model` and `--data`, which not every verb has."""
    for flag, path in _CHOICES.items():
        parser.add_argument(f"--{flag}", choices=choices_of(path))
    for flag, path in _NUMBERS.items():
        knob = KNOBS[path]
        parser.add_argument(f"--{flag}", metavar="N", help=f"{knob.help} {knob.allowed}.".replace("%", "%%"))
    parser.add_argument("--targets", metavar="NAMES", help="all-linear, or names joined by commas")
    for flag in _SWITCHES:
        parser.add_argument(f"--{flag.replace('_', '-')}", action=argparse.BooleanOptionalAction)


def settings_of(args: argparse.Namespace, *, without: tuple[str, ...] = ()) -> list[str]:
    """Return the `--set` words, followed by a `path=value` word for each flag that was given (so flags win).

    Args:
        args: The parsed arguments.
        without: Flags that mean something else in this verb.
    """
    given = ((path, getattr(args, flag, None)) for flag, path in _FLAGS.items() if flag not in without)
    return [*args.set, *(f"{path}={value}" for path, value in given if value is not None)]
