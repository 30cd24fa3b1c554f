"""`lora-studio fit`: what to change so that a recipe fits a card, and why."""

import argparse
from dataclasses import replace
from typing import Any

from studio.commands.options import add_json, add_set
from studio.commands.plan import add_card, device_for, pace_lines
from studio.commands.terminal import DONE, NO, say, size, table, write_json
from studio.core.errors import BadInput
from studio.core.fit import Fit, Priced, fit
from studio.core.gpu_catalogue import Gpu
from studio.core.vram.report import VramEstimate, plan_to_dict
from studio.core.vram.setup import Setup, as_it_lies, setup_of
from studio.probe.pace import calibrated_estimate, pace_of, pace_to_dict
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
    """Search for changes, print them, and return 0 when something fits and 1 when nothing does.

    Raises:
        BadInput: The recipe or the model cannot be used, or no card is known.
    """
    recipe = load_recipe(find_recipe(args.recipe_word), args.set)
    shape = find_shape(args.model or recipe.model.base, "" if args.model else recipe.model.revision)
    device = device_for(args, recipe)
    gpu, budget = device.gpu, device.budget_bytes(recipe)
    if gpu is None or budget is None:
        raise BadInput("no NVIDIA card answers on this machine: name one with --gpu NAME or --vram-gib X")

    def known(setup: Setup) -> VramEstimate:
        return calibrated_estimate(shape, setup, gpu)

    found = fit(recipe, shape, gpu, budget, known)
    setup = as_it_lies(replace(setup_of(found.fix.recipe, gpu), device="cuda"), shape.quantised)
    pace = pace_of(found.fix.recipe, shape, setup, gpu)
    if args.json:
        plan = plan_to_dict(found.fix.estimate, shape, setup, gpu=gpu, budget_bytes=budget)
        write_json({"fits": found.fix.fits, **_document(found), "plan": {**plan, **pace_to_dict(pace)}})
    else:
        _print(found, gpu, budget)
        for line in pace_lines(pace, setup) if found.fix.fits else ():
            say(line)
        for note in found.fix.estimate.notes:
            say(f"note: {note}")
    return DONE if found.fix.fits else NO


def _document(found: Fit) -> dict[str, Any]:
    return {
        "recipe": found.fix.recipe.to_dict(),
        "changes": [
            {
                "settings": {
                    path: list(value) if isinstance(value, tuple) else value for path, value in _settings(item)
                },
                "words": item.change.words,
                "saves_bytes": item.saves_bytes,
                "time_factor": list(item.time),
                "why": item.change.why,
            }
            for item in found.fix.changes
        ],
        "largest": found.largest,
        "cards": [{"name": gpu.name, "total_bytes": gpu.total_bytes} for gpu in found.cards],
        "most_parameters": found.most_parameters,
    }


def _print(found: Fit, gpu: Gpu, budget_bytes: int) -> None:
    name = gpu.name or "the card"
    if found.fix.changes:
        head = ["change", "saves", "time of a step", "what it costs"]
        say(
            table(
                [
                    head,
                    *(
                        [item.change.words, size(item.saves_bytes), _factor(item), item.change.why]
                        for item in found.fix.changes
                    ),
                ]
            )
        )
    device = found.fix.estimate.device
    range_ = f"{size(device.expected)} ({size(device.low)} to {size(device.high)})"
    if not found.fix.fits:
        say(f"nothing fits: the least is {range_}, and {name} has {size(budget_bytes)} for it")
    elif found.fix.changes:
        say(f"with these changes it takes {range_} of {size(budget_bytes)} on {name}")
        say(
            "try: "
            + " ".join(f"--set {path}={_word(value)}" for item in found.fix.changes for path, value in _settings(item))
        )
    else:
        say(f"it fits as it is: {range_} of {size(budget_bytes)} on {name}")
    if found.fix.fits:
        say(
            "largest that still fit, each alone: "
            + ", ".join(f"{path} {value}" for path, value in found.largest.items())
        )
    if found.most_parameters:
        say(f"a model of up to about {found.most_parameters / 1e9:.1f} B parameters would fit this way")
    if found.cards:
        say("smallest cards for it: " + ", ".join(f"{card.name} ({size(card.total_bytes)})" for card in found.cards))


def _settings(item: Priced) -> tuple[tuple[str, Any], ...]:
    return item.change.settings


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _factor(item: Priced) -> str:
    low, high = (f"{value:.2f}".rstrip("0").rstrip(".") for value in item.time)
    return f"x{low}" if low == high else f"x{low} to x{high}"
