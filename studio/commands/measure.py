"""`lora-studio measure`: a training step traced without a card, or run on one; the estimate stands beside it."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from studio.commands.card_flags import add_card, device_for
from studio.commands.follow import End, exit_code, follow, tell_failure
from studio.commands.options import add_json, add_runs_dir, add_set, root_of
from studio.commands.recipe_flags import add_recipe_flags, settings_of
from studio.commands.terminal import DONE, NO, duration, say, size, table, write_json
from studio.core.errors import BadInput
from studio.core.gpu_catalogue import Gpu
from studio.core.measured import COMPONENTS, measured_plan
from studio.core.placement.auto import settled, with_fewest
from studio.core.recipe import Recipe
from studio.core.recipe_parse import apply_settings
from studio.core.shape import ModelShape
from studio.core.text import plain
from studio.core.trainable import check_adapted
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.precision_check import check_precision
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import Setup, setup_of
from studio.launch.start import start
from studio.probe.measure import read_measurement
from studio.probe.pace import pace_of, pace_to_dict
from studio.probe.plan import PlanDevice
from studio.probe.shape import find_shape
from studio.runs.recipe_file import find_recipe, load_recipe, resolve_paths
from studio.runs.requests import MeasureRequest
from studio.runs.status import Status
from studio.runs.summary import summary_of
from studio.runs.watch import RunWatch

_RATHER_WHOLE = 10.0
"""Differences of this many per cent and more are shown without decimals."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "measure",
        help="trace a recipe's training step, or run it on a card: memory by stage and component",
        description="Trace the real training step of a recipe without weights and without a card, or on a CUDA machine "
        "run three steps of it on the longest rows. The estimate of `plan` stands beside it.",
    )
    parser.add_argument(
        "recipe_word", metavar="RECIPE", nargs="?", help="a recipe's path or name; none takes the defaults"
    )
    parser.add_argument("--model", metavar="MODEL", help="a folder, a config.json, a .gguf, a hub id, or: embedded")
    parser.add_argument("--data", metavar="FILE", help="rows that it will learn from")
    add_recipe_flags(parser)
    add_set(parser)
    parser.add_argument("--engine", choices=("studio", "hf"), default="studio", help="only this program's own step")
    parser.add_argument("--trace", action="store_true", help="trace also where there is a card")
    add_card(parser)
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, follow, show; return 0 when it fits or no card is known, 1 when it may not fit or the job failed.

    Raises:
        BadInput: The recipe, the model or the card cannot be used; no run folder was made.
        StudioError: The worker cannot be started.
    """
    to = sys.stderr if args.json else sys.stdout
    if args.engine == "hf":
        raise BadInput("measure traces this program's own step: leave --engine out, or use plan for the stock loop")
    recipe = _recipe(args)
    device = device_for(args, recipe)
    shape, budget = find_shape(recipe.model.base, recipe.model.revision), device.budget_bytes(recipe)
    setup = with_fewest(
        setup_of(recipe, device.gpu), shape.layers, budget, lambda tried: estimate_vram(shape, tried, device.gpu)
    )
    recipe = settled(recipe, setup)
    data_known = bool(args.recipe_word) or recipe.data.words != Recipe().data.words
    plan = _plan(recipe, shape, setup, device, data_known=data_known)
    request = _request(args, recipe, setup, device.gpu)
    paths = start(request, root_of(args), module=args.modules.get("measure"), plan=plan)
    say(f"run {paths.name} in {plain(str(paths.root), one_line=True)}", to=to)
    watch = RunWatch(paths)
    return _conclude(watch, follow(watch, to=to, stops_on_interrupt=True), plan, as_json=args.json)


def _recipe(args: argparse.Namespace) -> Recipe:
    settings = settings_of(args)
    if args.recipe_word:
        return load_recipe(find_recipe(args.recipe_word), settings)
    recipe = apply_settings(Recipe().with_("train.accumulation", 1), settings)
    return resolve_paths(recipe, (Path.cwd(),))


def _plan(recipe: Recipe, shape: ModelShape, setup: Setup, device: PlanDevice, *, data_known: bool) -> dict[str, Any]:
    """Return the estimate, or why there is none.

    Raises:
        BadInput: The model has no such targets.
    """
    check_adapted(shape, setup.adapted)
    check_precision(shape, setup)
    estimate = estimate_vram(shape, setup, device.gpu)
    pace = pace_of(recipe, shape, setup, device.gpu, data_known=data_known)
    plan = plan_to_dict(estimate, shape, setup, gpu=device.gpu, budget_bytes=device.budget_bytes(recipe))
    return {**plan, **pace_to_dict(pace)}


def _request(args: argparse.Namespace, recipe: Recipe, setup: Setup, gpu: Gpu | None) -> MeasureRequest:
    # A named card is not this machine's, so the step cannot run on it and is traced instead.
    named = bool(args.gpu or args.vram_gib)
    request = MeasureRequest(
        recipe,
        how="trace" if args.trace or named else "auto",
        device=setup.device,
        dtype=setup.dtype,
    )
    return request if gpu is None else replace(request, capability=gpu.compute_capability)


def _conclude(watch: RunWatch, end: End, plan: Mapping[str, Any], *, as_json: bool) -> int:
    summary = summary_of(watch.paths, watch.history, end.status)
    report = read_measurement(watch.paths) if end.status is Status.finished else None
    to = sys.stderr if as_json else sys.stdout
    if end.left:
        say(f"the run lives on; look again with: lora-studio runs attach {watch.paths.name}", to=to)
    elif end.status in (Status.failed, Status.crashed):
        tell_failure(watch.paths, summary)
    if report is None:
        if as_json:
            keys = ("run", "path", "status", "seconds", "warnings", "failure")
            write_json({key: summary[key] for key in keys})
        return NO if end.status is Status.finished else exit_code(summary, end)
    document = measured_plan(plan, report)
    if as_json:
        write_json({**document, "run": watch.paths.name})
    else:
        tell_measurement(document, to)
    return NO if document["fits"] is False else DONE


def tell_measurement(document: Mapping[str, Any], to: TextIO) -> None:
    """Show a table of stages and components, the estimate beside it, and what is not known."""
    traced = document["source"] == "trace"
    seen = "traced" if traced else f"measured on {plain(str((document['card'] or {}).get('name')), one_line=True)}"
    setup = document.get("setup") or {}
    pair = "" if setup.get("objective", "sft") == "sft" else "2 x "
    say(
        f"{seen} in {duration(document['seconds'])}: {setup.get('method', '')} rank {setup.get('rank', '?')}, "
        f"{document['trainable_parameters'] / 1e6:.1f} M trained; "
        f"{setup.get('micro_batch', '?')} x {pair}{setup.get('seq_len', '?')} tokens",
        to=to,
    )
    say(table(stage_rows(document)), to=to)
    say(f"peak in stage {document['stage']}: {size(document['peak_bytes'])} of tensors{_beside(document)}", to=to)
    if document["device_bytes"] is not None and setup.get("device") != "cpu":
        word = "the card would show about" if traced else "the card showed"
        say(f"{word} {size(document['device_bytes'])}, the allocator {size(document['reserved_bytes'])}", to=to)
    if document["verdict"] is not None:
        gpu = document.get("gpu") or {}
        name = plain(str(gpu.get("name") or "the card"), one_line=True)
        say(f"{document['verdict']}: {name} has {size(document['budget_bytes'])} for it", to=to)
    for line in document["unknown"]:
        say(f"not known: {line}", to=to)


def stage_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of stages (rows) and components (columns), with the estimate's peak of every stage."""
    by_stage = document["components_by_stage"]
    shown = [name for name in COMPONENTS if any(parts.get(name) for parts in by_stage.values())]
    estimated = (document["estimate"] or {}).get("stages", {})
    rows = [["stage", *shown, "in all", "estimate", "difference"]]
    for stage, total in document["stages"].items():
        expected = estimated.get(stage)
        parts = [size(by_stage[stage].get(name, 0)) for name in shown]
        rows.append([stage, *parts, size(total), size(expected), _difference(expected, total)])
    return rows


def _beside(document: Mapping[str, Any]) -> str:
    estimate = document["estimate"]
    if not estimate:
        return ""
    difference = _difference(estimate["peak_bytes"], document["peak_bytes"])
    return f"; the estimate is {size(estimate['peak_bytes'])} ({difference})"


def _difference(expected: int | None, seen: int) -> str:
    if expected is None or not seen:
        return "-"
    share = 100 * (expected / seen - 1)
    return f"{share:+.0f} %" if abs(share) >= _RATHER_WHOLE else f"{share:+.2f} %"
