"""`lora-studio plan`: how much memory a recipe takes, before it runs."""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from studio.commands.card_flags import add_card, device_for, number_between
from studio.commands.gpus import notes_on
from studio.commands.options import add_json, add_set
from studio.commands.pace_text import pace_lines
from studio.commands.recipe_flags import add_recipe_flags, settings_of
from studio.commands.terminal import DONE, NO, say, size, table, write_json
from studio.core.errors import BadInput
from studio.core.gpu_catalogue import Gpu
from studio.core.placement.auto import with_fewest
from studio.core.preferences import rate_note
from studio.core.recipe import Loss, Recipe, choices_of, number_of
from studio.core.recipe_parse import apply_settings
from studio.core.shape import ModelShape
from studio.core.stock.estimate import estimate_stock, refined
from studio.core.stock.modules import FusedKernels
from studio.core.stock.setup import StockSetup, as_it_lies_here, stock_setup
from studio.core.text import plain
from studio.core.trainable import check_adapted
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.precision_check import check_precision
from studio.core.vram.report import VramEstimate, plan_to_dict
from studio.core.vram.setup import Setup, as_it_lies, setup_of
from studio.probe.data.places import find_files, hub_word
from studio.probe.data.reading import Reading
from studio.probe.known_models import known_names
from studio.probe.model_folder import CONFIG
from studio.probe.pace import Pace, calibrated, pace_of, pace_to_dict, process_of
from studio.probe.plan import PlanDevice
from studio.probe.shape import find_shape
from studio.runs.recipe_file import find_recipe, load_recipe, shipped_recipes

_MOST_GIB = 4096.0
_STOCK = ("kbit_prepare", "head_cast_back", "autocast", "outputs_kept", "transformers", "fused_kernels")
"""Flags that describe the stock loop only."""
_FORMS = (*choices_of("model.quant_type"), "int8")
_EIGHT_BIT = (
    "8-bit weights are counted from bitsandbytes' source and its runs on a CPU: no measurement on a card was found to "
    "compare with, and how many inputs are outliers, multiplied in 16 bit besides, is not known"
)
_MEASURE = "this is a guess from sizes; lora-studio measure (same flags) traces the real model and knows better"
_NO_ROWS = "the rows of {} are not here, or cannot be read: steps, tokens and hours are not told"
_HOUR_MINUTES = 60


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("plan", help="how much memory a recipe takes, before it runs")
    parser.add_argument(
        "recipe_word",
        metavar="RECIPE",
        nargs="?",
        help="a recipe's path or name, or a model (as --model does, with the defaults); none takes the defaults",
    )
    parser.add_argument("--model", metavar="MODEL", help="a folder, a config.json, a .gguf, a hub id, or: embedded")
    parser.add_argument(
        "--data", metavar="FILE", help="rows that it will learn from: steps, tokens and, where a speed is known, hours"
    )
    add_recipe_flags(parser)
    add_set(parser)
    parser.add_argument("--engine", choices=("studio", "hf"), default="studio", help="hf: the stock Trainer and peft")
    parser.add_argument(
        "--quant-type", choices=_FORMS, help="how quantised weights are held; int8 (LLM.int8) with hf alone"
    )
    for flag, text in (
        ("kbit-prepare", "hf: peft's fp32 upcast of everything not quantised (default for qlora)"),
        ("head-cast-back", "hf: whether embedding and head go back to 16 bit after it, as in TRL with bf16"),
        ("autocast", "hf: whether the forward runs under autocast (default: 4-bit weights, but fp16 without bf16)"),
        ("outputs-kept", "hf: whether the loop holds the logits through the backward (default: fp16 without bf16)"),
    ):
        parser.add_argument(f"--{flag}", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument(
        "--fused-kernels",
        choices=get_args(FusedKernels),
        help="hf: liger is the Trainer's use_liger_kernel, its fused loss included; foak fms-acceleration's kernels",
    )
    parser.add_argument("--transformers", metavar="VERSION", help="hf: its version, such as 4.48.1: losses differ")
    add_card(parser)
    parser.add_argument("--gpus", metavar="N", default="1", help="data-parallel replicas; the plan is for each")
    parser.add_argument(
        "--trade",
        action="store_true",
        help="beside it LoRA, QLoRA, a base streamed from main memory, and QLoRA with layers in 16 bit",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Estimate, print, and return 0 when it fits or no card is known, 1 when it may not fit."""
    if args.recipe_word and not args.model and _is_model(args.recipe_word):
        args.model, args.recipe_word = args.recipe_word, None
    recipe = _recipe(args)
    shape = find_shape(args.model or recipe.model.base, "" if args.model else recipe.model.revision)
    device = device_for(args, recipe)
    budget = device.budget_bytes(recipe)
    setup = _setup(args, recipe, device.gpu)
    setup = with_fewest(setup, shape.layers, budget, lambda tried: _estimate(shape, tried, device.gpu)[1])
    setup, estimate = _estimate(shape, setup, device.gpu)
    estimate = calibrated(estimate, setup, device.gpu)
    if setup.quantised and setup.quant_type == "int8":
        estimate = replace(estimate, notes=(*estimate.notes, _EIGHT_BIT))
    if shape.doubts:
        estimate = replace(estimate, notes=(*estimate.notes, _MEASURE))
    if note := rate_note(recipe):
        estimate = replace(estimate, notes=(*estimate.notes, note))
    data_known = bool(args.recipe_word) or recipe.data.words != Recipe().data.words
    pace = pace_of(recipe, shape, setup, device.gpu, data_known=data_known)
    if args.data is not None and pace.steps is None:
        estimate = replace(
            estimate, notes=(*estimate.notes, _NO_ROWS.format(plain(args.data, one_line=True, limit=80)))
        )
    trade = _trade(recipe, shape, device) if args.trade and setup.engine == "studio" else None
    if args.json:
        plan = plan_to_dict(estimate, shape, setup, gpu=device.gpu, budget_bytes=budget)
        beside = {} if trade is None else {"trade": trade[0]}
        write_json({**plan, **pace_to_dict(pace), "card": asdict(device.card) if device.card else None, **beside})
        _warn(device)
    else:
        _print(estimate, shape, setup, device, budget)
        for line in pace_lines(pace, setup):
            say(line)
        if data_known and (short := shorter_rows(pace, setup.seq_len)):
            say(short)
        if trade is not None:
            say(trade[1])
        for note in estimate.notes:
            say(f"note: {note}")
        _warn(device)
    return DONE if budget is None or estimate.verdict(budget) == "fits" else NO


def _trade(recipe: Recipe, shape: ModelShape, device: PlanDevice) -> tuple[list[dict[str, Any]], str]:
    """Return LoRA, QLoRA and what lies between as plain values, and as a table."""
    from studio.commands.trade_text import trade_of, trade_table, trade_to_list  # noqa: PLC0415  10 ms for a flag

    sides = trade_of(recipe, shape, device)
    return trade_to_list(sides), trade_table(sides)


def _estimate(shape: ModelShape, setup: Setup, gpu: Gpu | None) -> tuple[Setup, VramEstimate]:
    """Return the set-up, adjusted to how the base's weights are stored, and what it needs."""
    check_adapted(shape, setup.adapted)
    check_precision(shape, setup)
    if isinstance(setup, StockSetup):
        setup = as_it_lies_here(setup, shape.quantised)
        return setup, refined(estimate_stock(shape, setup, gpu), shape, setup, gpu)
    setup = as_it_lies(setup, shape.quantised)
    return setup, estimate_vram(shape, setup, gpu)


def _is_model(word: str) -> bool:
    """Return whether a word names no recipe here, and a model whose sizes are shipped or that lies in a folder."""
    if word in shipped_recipes() or "\0" in word:
        return False
    path = Path(word)
    return (path / CONFIG).is_file() or (not path.exists() and word.lower() in known_names())


def _recipe(args: argparse.Namespace) -> Recipe:
    settings = settings_of(args, without=("model",))
    if args.data is not None and not hub_word(args.data):
        find_files(Path(args.data).expanduser(), Reading(), ask=False)  # that it is not there must not go unsaid
    if args.recipe_word:
        return load_recipe(find_recipe(args.recipe_word), settings)
    # Without a recipe the plan is of a step of one micro-batch: with more, gradients are alive while the next one runs.
    return apply_settings(Recipe().with_("train.accumulation", 1), settings)


def _setup(args: argparse.Namespace, recipe: Recipe, gpu: Gpu | None) -> Setup:
    setup = _held_as(args, setup_of(recipe, gpu))
    if gpu is not None:  # a named card is planned for, even where this machine has none
        setup = replace(setup, device="cuda")
    wishes = {name: getattr(args, name) for name in _STOCK}
    given = {name: value for name, value in wishes.items() if value is not None}
    if args.engine == "hf":
        loss_said = args.loss is not None or any(word.strip().startswith("train.loss") for word in args.set)
        usual: Loss = "liger" if args.fused_kernels == "liger" else "full"
        setup = stock_setup(setup if loss_said else replace(setup, loss=usual), gpu=gpu, **given)
    elif given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise BadInput(f"{flags} describes the stock loop; add --engine hf, or leave it out")
    replicas = number_between(args.gpus, "--gpus", 1, 1024)
    return replace(setup, gpus=int(replicas))


def _held_as(args: argparse.Namespace, setup: Setup) -> Setup:
    """Return the set-up with the form of quantised weights that was asked for.

    Stock loops know one form that recipes do not: int8.

    Raises:
        BadInput: The form belongs to another method or engine.
    """
    if args.quant_type is None:
        return setup
    if setup.method != "qlora":
        raise BadInput(f"--quant-type {args.quant_type} quantises the base; method lora does not: take --method qlora")
    if args.quant_type == "int8" and args.engine != "hf":
        raise BadInput("--quant-type int8 is for the stock loop: add --engine hf. This studio trains on 4 or 16 bit")
    return replace(setup, quant_type=args.quant_type)


def _warn(device: PlanDevice) -> None:
    if device.refusal:
        say(f"note: a run would not start here: {device.refusal}", to=sys.stderr)


def _print(estimate: VramEstimate, shape: ModelShape, setup: Setup, device: PlanDevice, budget: int | None) -> None:
    engine = "this studio" if setup.engine == "studio" else "the stock Trainer with peft"
    method = f"{setup.method} on {setup.quant_type}" if setup.quant_type == "int8" and setup.quantised else setup.method
    if isinstance(setup, StockSetup) and setup.fused_kernels != "none":
        engine += f" and the kernels of {setup.fused_kernels}"
    at_once = f"{setup.micro_batch} x 2" if setup.paired else setup.micro_batch
    say(
        f"{shape.family}, {shape.parameters / 1e9:.2f} B parameters, {method} rank {setup.rank}: "
        f"{estimate.trainable_parameters / 1e6:.1f} M trained; {at_once} x {setup.seq_len} tokens; {engine}"
    )
    if setup.quantised:
        held = estimate.held
        if setup.quant_type != "int8":
            eight = f" and {held.eight_bit_share:.1%} in 8" if held.eight_bit_share else ""
            say(f"{held.four_bit_share:.1%} of the weights in its layers are held in 4 bits{eight}, routers aside")
        say(f"not quantised: {size(held.kept_16bit_bytes)}, embedding and head among them")
    parts = estimate.components
    rows = [["part", "memory"], *([name, size(getattr(parts, name))] for name in parts.__slots__)]
    say(table(rows))
    say(table([["stage", "peak of tensors"], *([name, size(value)] for name, value in estimate.stages)]))
    tensors, allocator = size(estimate.allocated.expected), size(estimate.reserved.expected)
    say(f"peak in stage {estimate.stage}: tensors {tensors}, allocator {allocator}")
    peak = estimate.device
    if setup.device == "cpu":
        process = process_of(estimate, setup)
        if process:
            say(f"the process will take {size(process.expected)} (range {size(process.low)} to {size(process.high)})")
    else:
        say(f"the card will show {size(peak.expected)} (range {size(peak.low)} to {size(peak.high)})")
    if estimate.host.weights:
        layers = min(setup.streamed, shape.layers)
        of_them = f"{layers} of {shape.layers} layers are streamed"
        say(f"main memory: {size(estimate.host.weights)} of weights wait there; {of_them}, not yet run on a card")
    if budget is not None:
        name = device.gpu.name if device.gpu and device.gpu.name else "the card"
        say(f"{estimate.verdict(budget)}: {name} has {size(budget)} for it")
    for line in notes_on(device.card) if device.card else ():
        say(f"the card: {line}")


def shorter_rows(pace: Pace, seq_len: int) -> str:
    """Return that a shorter length would cut no row that was looked at; empty where it would.

    Args:
        pace: What is known of the run.
        seq_len: The length that is planned, in tokens.
    """
    if pace.longest is None:
        return ""
    _, usual, most = pace.longest
    enough = next((int(stop) for stop in number_of("train.seq_len").stops if stop >= most), seq_len)
    if enough >= seq_len:
        return ""
    return (
        f"length: the longest row has about {usual:.0f} tokens ({most:.0f} at most): --seq {enough} takes less memory "
        "and cuts none"
    )
