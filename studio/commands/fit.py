"""`lora-studio fit`: what to change so that a recipe fits a card, and why."""

import argparse
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from studio.commands.card_flags import add_card, device_for, number_between
from studio.commands.options import add_json, add_set
from studio.commands.pace_text import pace_lines
from studio.commands.terminal import DONE, NO, say, size, table, write_json
from studio.core.errors import BadInput
from studio.core.gpu_catalogue import GIB, Gpu
from studio.core.placement.fastest import Placed
from studio.core.placement.fidelity import Effects
from studio.core.placement.planner import AIMS, Plan, Planner
from studio.core.recipe import Recipe
from studio.core.vram.report import VramEstimate, plan_to_dict
from studio.core.vram.setup import Setup, as_it_lies, setup_of
from studio.probe.machine import ram_bytes
from studio.probe.pace import calibrated_estimate, pace_of, pace_to_dict
from studio.probe.quality import audited, layer_effects
from studio.probe.shape import find_shape
from studio.runs.recipe_file import find_recipe, load_recipe

if TYPE_CHECKING:
    from studio.core.fit import Fit, Priced

_MOST_RAM_GIB = 2**20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("fit", help="the best recipe that fits a card, and why")
    parser.add_argument("recipe_word", metavar="RECIPE", help="a recipe's path or name")
    parser.add_argument("--model", metavar="MODEL", help="another model: a folder, a config.json, a .gguf, a hub id")
    add_set(parser)
    add_card(parser)
    parser.add_argument(
        "--for",
        dest="aim",
        choices=AIMS,
        help="fill the card: the fastest settings, those with the most bits, or those that take the least memory",
    )
    parser.add_argument("--ram-gib", metavar="X", help="with --for: main memory in GiB, if it is not this machine's")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Search for changes, or for settings that fill the card; return 0 when something fits and 1 when nothing does.

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

    if args.aim:
        ram = ram_bytes()
        if args.ram_gib is not None:
            ram = int(number_between(args.ram_gib, "--ram-gib", 0.1, _MOST_RAM_GIB) * GIB)
        effects = layer_effects(recipe) if args.aim == "fidelity" and not args.model else None
        return _fill(args, recipe, Planner(recipe, shape, gpu, budget, ram, known, effects))
    if args.ram_gib is not None:
        raise BadInput("--ram-gib says what may wait in main memory: add --for speed, fidelity or room")
    from studio.core.fit import fit  # noqa: PLC0415  6 ms that `--for` does not pay

    found = fit(recipe, shape, gpu, budget, known, ram_bytes=ram_bytes())
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


def _fill(args: argparse.Namespace, recipe: Recipe, planner: Planner) -> int:
    """Print the settings for an aim, what each part of the memory bought, and what would be next best."""
    plan, quality = planner.plan(args.aim), _quality(recipe, args.aim, planner.effects)
    if args.json:
        write_json(
            {"fits": plan is not None, "for": args.aim, **_plan_document(plan, recipe, planner), "quality": quality}
        )
    elif plan is None:
        say(f"nothing fits {size(planner.budget_bytes)}, not even the leanest settings; fit without --for says more")
    else:
        _print_plan(plan, args.aim, recipe, planner)
        say(f"quality: {quality}")
    return NO if plan is None else DONE


def _plan_document(plan: Plan | None, recipe: Recipe, planner: Planner) -> dict[str, Any]:
    if plan is None:
        return {"recipe": {}, "bought": [], "runners_up": []}
    chosen, gpu = plan.chosen, planner.gpu
    of_chosen = plan_to_dict(
        chosen.estimate, planner.shape, chosen.setup, gpu=gpu, budget_bytes=planner.budget_bytes
    ) | pace_to_dict(pace_of(chosen.on(recipe), planner.shape, chosen.setup, gpu))
    return {
        "recipe": chosen.settings,
        "bought": [{"words": one.words, "bytes": one.bytes, "speed_factor": one.factor} for one in plan.bought],
        "runners_up": [
            {
                "recipe": one.settings,
                "high_bytes": one.estimate.device.high,
                "host_bytes": one.estimate.host.total,
                "speed_factor": one.score / chosen.score,
            }
            for one in plan.runners_up
        ],
        "plan": of_chosen,
    }


def _print_plan(plan: Plan, aim: str, recipe: Recipe, planner: Planner) -> None:
    chosen, gpu = plan.chosen, planner.gpu
    device, host = chosen.estimate.device, chosen.estimate.host.total
    waits = f", and {size(host)} of main memory" if host else ""
    room = f"{size(planner.budget_bytes)} on {gpu.name or 'the card'}"
    say(f"for {aim}: {size(device.expected)} ({size(device.low)} to {size(device.high)}) of {room}{waits}")
    rows = [["bought", "memory", "speed"], ["the leanest settings", size(plan.leanest.estimate.device.high), ""]]
    signed = ((one, "-" if one.bytes < 0 else "+") for one in plan.bought)
    rows += [[one.words, f"{sign}{size(abs(one.bytes))}", f"x{one.factor:.2f}"] for one, sign in signed]
    say(table(rows))
    say(f"try: {_words(chosen, recipe)}")
    for other in plan.runners_up:
        speed, high = other.score / chosen.score, other.estimate.device.high
        say(f"or, at {speed:.2f} of its speed, up to {size(high)}: {_words(other, recipe)}")
    if chosen.setup.streamed:
        say("no card has run a streamed base yet: such a run proves itself at its start, and stops where it cannot")
    for line in pace_lines(pace_of(chosen.on(recipe), planner.shape, chosen.setup, gpu), chosen.setup):
        say(line)


def _quality(recipe: Recipe, aim: str, effects: Effects | None) -> str:
    """Return what 4 bits cost on this model and data, where a race has measured it, and in which layers."""
    by_layer = f"what 4 bits cost was measured layer by layer ({effects.source})" if effects else ""
    raced = audited(recipe).get("qlora")
    if raced is None:
        verb = "audit base" if aim == "fidelity" else "audit race"
        return by_layer or f"not measured on this model and data, so that bits alone count; `{verb}` measures"
    by_race = f"QLoRA ended {raced.more.value:+.3f} nats a token above LoRA in a race on this model and data"
    return "; ".join(filter(None, (by_layer, by_race)))


def _words(placed: Placed, recipe: Recipe) -> str:
    """Return what is to be set in a recipe, which may be nothing."""
    placed_in = placed.on(recipe)
    changed = ((path, placed_in.get(path)) for path in placed.settings if placed_in.get(path) != recipe.get(path))
    words = (f"{path}={_word(value)}" for path, value in changed)
    return " ".join(f"--set {shlex.quote(word)}" for word in words) or "the recipe as it is"


def _document(found: "Fit") -> dict[str, Any]:
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


def _print(found: "Fit", gpu: Gpu, budget_bytes: int) -> None:
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
        waits = f", and {size(host)} of main memory" if (host := found.fix.estimate.host.total) else ""
        say(f"with these changes it takes {range_} of {size(budget_bytes)} on {name}{waits}")
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


def _settings(item: "Priced") -> tuple[tuple[str, Any], ...]:
    return item.change.settings


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(one if isinstance(one, str) else "=".join(map(str, one)) for one in value)
    return str(value)


def _factor(item: "Priced") -> str:
    low, high = (f"{value:.2f}".rstrip("0").rstrip(".") for value in item.time)
    return f"x{low}" if low == high else f"x{low} to x{high}"
