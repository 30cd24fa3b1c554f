"""`lora-studio fit`: what to change so that a recipe fits a card, and why."""

import argparse
from typing import Any

from studio.commands.options import add_json, add_set
from studio.commands.plan import add_card, card_for
from studio.commands.terminal import DONE, NO, say, size, table, write_json
from studio.core.errors import BadInput
from studio.core.fit import Change, Fit, fit
from studio.core.gpu_catalogue import Gpu
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import setup_of
from studio.probe.shape import find_shape
from studio.runs.recipe_file import find_recipe, load_recipe


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("fit", help="the best recipe that fits a card, and why")
    parser.add_argument("recipe_word", metavar="RECIPE", help="a recipe's path or name")
    parser.add_argument("--model", metavar="MODEL", help="another model: a folder, a config.json, a .gguf, a hub id")
    add_set(parser)
    add_card(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Search, print, and return 0 when something fits, 1 when nothing does.

    Raises:
        BadInput: The recipe or the model cannot be used, or no card is known.
    """
    recipe = load_recipe(find_recipe(args.recipe_word), args.set)
    shape = find_shape(args.model or recipe.model.base, "" if args.model else recipe.model.revision)
    card = card_for(args, recipe)
    if card.gpu is None or card.budget_bytes is None:
        raise BadInput("no NVIDIA card answers on this machine: name one with --gpu NAME or --vram-gib X")
    found = fit(recipe, shape, card.gpu, card.budget_bytes)
    if args.json:
        setup = setup_of(found.recipe, bf16=card.gpu.bf16)
        plan = plan_to_dict(found.estimate, shape, setup, gpu=card.gpu, budget_bytes=card.budget_bytes)
        write_json({"fits": found.fits, **_document(found), "plan": plan})
    else:
        _print(found, card.gpu, card.budget_bytes)
    return DONE if found.fits else NO


def _document(found: Fit) -> dict[str, Any]:
    return {
        "recipe": found.recipe.to_dict(),
        "changes": [
            {
                "settings": {
                    path: list(value) if isinstance(value, tuple) else value for path, value in change.settings
                },
                "saves_bytes": change.saves_bytes,
                "time_factor": list(change.time),
                "why": change.why,
            }
            for change in found.changes
        ],
        "largest": found.largest,
        "cards": [{"name": gpu.name, "total_bytes": gpu.total_bytes} for gpu in found.cards],
    }


def _print(found: Fit, gpu: Gpu, budget_bytes: int) -> None:
    name = gpu.name or "the card"
    if found.changes:
        head = ["change", "saves", "time", "why"]
        say(table([head, *([_settings(c), size(c.saves_bytes), _factor(c), c.why] for c in found.changes)]))
    device = found.estimate.device
    range_ = f"{size(device.expected)} ({size(device.low)} to {size(device.high)})"
    if not found.fits:
        say(f"nothing fits: the least is {range_}, and {name} has {size(budget_bytes)} for it")
    elif found.changes:
        say(f"with these changes it takes {range_} of {size(budget_bytes)} on {name}")
        say("try: " + " ".join(f"--set {path}={_word(value)}" for c in found.changes for path, value in c.settings))
    else:
        say(f"it fits as it is: {range_} of {size(budget_bytes)} on {name}")
    if found.fits:
        say(
            "largest that still fit, each alone: "
            + ", ".join(f"{path} {value}" for path, value in found.largest.items())
        )
    if found.cards:
        say("smallest cards for it: " + ", ".join(f"{card.name} ({size(card.total_bytes)})" for card in found.cards))


def _settings(change: Change) -> str:
    return " ".join(f"{path}={_word(value)}" for path, value in change.settings)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _factor(change: Change) -> str:
    low, high = change.time
    return f"x{low:g} to x{high:g}"
