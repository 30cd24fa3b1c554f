"""`lora-studio merge`: an adapter merged into its base model, in a process of its own."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.commands.follow import conclude, follow
from studio.commands.options import add_json, add_runs_dir, root_of
from studio.commands.terminal import complain, say
from studio.core.errors import BadInput
from studio.core.export_formats import whole_formats
from studio.core.recipe import Recipe, choices_of
from studio.core.text import plain
from studio.launch.start import start
from studio.probe.adapter_folder import best_of, list_checkpoints, run_of_adapter
from studio.probe.models import word_anywhere
from studio.runs.chain import beside
from studio.runs.job import read_job
from studio.runs.layout import ADAPTER_CONFIG, RunPaths
from studio.runs.requests import ONTO, MergeRequest, Weighted
from studio.runs.status import Status
from studio.runs.store import find_run
from studio.runs.watch import RunWatch

_SIDES = (("base + adapter", "separate"), ("merged", "merged"))
_NOTHING_WON = (
    "note: this adapter was trained on the 16-bit base, not on 4 bits: dequantized weights would only add their error. "
    "--onto original takes the base that it was trained on"
)
_FOUR_BITS = {"4bit", "4-bit", "nf4", "fp4", "int4", "quantized", "quantised"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "merge",
        help="merge an adapter into its base model",
        description="Write a model folder that holds base and adapter as one, in 16 or 32 bit.",
    )
    parser.add_argument("adapter", metavar="RUN|ADAPTER_DIR", help="a run that has an adapter, or a PEFT folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new model folder; must not hold anything yet")
    parser.add_argument("--base", default="", help="the base model (default: the one that it was trained on)")
    parser.add_argument(
        "--onto",
        default="original",
        metavar="WHAT",
        help="original (default): the 16-bit base, best for use and for quantising later. dequantized: the base as 4 "
        "bits made it in a QLoRA run; closest to the model of that run (KL .0006 against .377 on one adapter), but "
        "with a higher task loss there, and lost if quantised again",
    )
    parser.add_argument(
        "--weight", type=float, default=1.0, metavar="W", help="multiply what was trained by this (default 1)"
    )
    parser.add_argument(
        "--adapter",
        dest="further",
        action="append",
        default=[],
        metavar="RUN|DIR=W",
        help="add another adapter of the same base with this weight (=W may be left out: 1); may be repeated",
    )
    parser.add_argument(
        "--checkpoint",
        default="",
        metavar="STEP",
        help="a checkpoint of the run instead of its last adapter: its step, or: best (lowest held-out loss)",
    )
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        type=str.lower,
        choices=whole_formats(),
        metavar="FORMAT",
        help="then export the merged model to this format, in a run of its own and a folder beside it; may be "
        "repeated; see export --help",
    )
    parser.add_argument("--dtype", default="auto", choices=choices_of("model.dtype"), help="type of the merged weights")
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Merge, follow, conclude.

    Raises:
        BadInput: The adapter, the base or the output folder cannot be used; no run folder was made.
        StudioError: The worker cannot be started.
    """
    to = sys.stderr if args.json else sys.stdout
    request = merge_request(args.adapter, root_of(args), out=args.out, base=args.base, dtype=args.dtype)
    request = replace(
        request,
        onto=_onto(args.onto),
        weight=args.weight,
        more=tuple(_further(word, root_of(args)) for word in args.further),
        checkpoint=_checkpoint(args.checkpoint, request),
        then=tuple(dict.fromkeys(args.export)),
    )
    if request.onto == "dequantized" and request.run and _trained_in_16_bits(RunPaths(Path(request.run))):
        complain(_NOTHING_WON)
    paths = start(request, root_of(args), module=args.modules.get("merge"))
    say(f"run {paths.name} in {plain(str(paths.root), one_line=True)}", to=to)
    watch = RunWatch(paths)
    end = follow(watch, to=to, stops_on_interrupt=True)
    code = conclude(watch, end, as_json=args.json)
    if watch.history.finished is not None and end.status is Status.finished:
        for line in checked_lines(watch.history.finished.result):
            say(line, to=to)
        for form in request.then:
            where = plain(str(beside(Path(request.out), form)), one_line=True)
            say(f"{form} follows, in a run of its own: {where}", to=to)
    return code


def checked_lines(report: dict[str, Any]) -> list[str]:
    """Return what the checks of a merge found, one line for each finding."""
    lines = []
    if isinstance(found := report.get("closeness"), dict):
        lines.append(
            f"checked against base + adapter on {found['tokens']} tokens: KL {found['mean_kl']:.2g} nats a token, "
            f"same top token {found['same_top_token']:.1%}"
        )
    if report.get("recomputed_tensors"):
        again = f"{report['recomputed_tensors']} made again by peft"
        lines.append(f"all {report['tensors']} tensors read back, {again}: every bit equal")
    for one in report.get("side_by_side") or []:
        lines.append(f"asked: {plain(one['prompt'], one_line=True, limit=120)}")
        lines += [f"  {name:<15}{plain(one[key], one_line=True, limit=200)}" for name, key in _SIDES]
    return lines


def merge_request(word: str, root: Path, *, out: str, base: str = "", dtype: str = "auto") -> MergeRequest:
    """Return the request to merge what a word names: a PEFT folder, else a run with an adapter.

    Raises:
        BadInput: It is neither, or the base is named nowhere.
    """
    target = str(Path(out).expanduser().absolute())
    folder = Path(word).expanduser().absolute()
    if "\0" not in word and (folder / ADAPTER_CONFIG).is_file():
        base = word_anywhere(base or _base_of(folder))
        return MergeRequest(str(folder), base, target, dtype=dtype, run=run_of_adapter(folder))
    paths = find_run(root, word)
    if not paths.adapter.is_dir():
        raise BadInput(
            f"the run {plain(paths.name, one_line=True)} has no adapter: it must be trained or stopped first."
        )
    return request_for(paths, target, base=base, dtype=dtype)


def request_for(paths: RunPaths, out: str, *, base: str = "", dtype: str = "auto") -> MergeRequest:
    """Return the request to merge a training run's adapter.

    Raises:
        BadInput: The run's `recipe.toml` is damaged or of another kind of job.
    """
    job = read_job(paths, Recipe)
    if job is None:
        raise BadInput(f"the run {plain(paths.name, one_line=True)} is no training run: it has no adapter to merge.")
    own = not base
    return MergeRequest(
        adapter=str(paths.adapter.absolute()),
        base=job.model.base if own else word_anywhere(base),
        revision=job.model.revision if own else "",
        out=out,
        dtype=dtype,
        run=str(paths.root.absolute()),
    )


def _trained_in_16_bits(paths: RunPaths) -> bool:
    try:
        job = read_job(paths, Recipe)
    except BadInput:
        return False
    return job is not None and job.method == "lora"


def _further(word: str, root: Path) -> Weighted:
    """Return a further adapter, from `RUN|DIR=WEIGHT`.

    Raises:
        BadInput: The weight is no number, or the adapter is not there.
    """
    name, _, text = word.rpartition("=") if "=" in word else (word, "", "1")
    # Only the place of the adapter is taken from this request: base and output are those of the first adapter.
    adapter = merge_request(name, root, out="-", base="-").adapter
    try:
        return Weighted(adapter, float(text))
    except ValueError:
        shown = plain(text, one_line=True, limit=40)
        raise BadInput(f"the weight {shown} of an adapter: wanted a number such as 0.5.") from None


def _checkpoint(word: str, request: MergeRequest) -> str:
    """Return the folder of the checkpoint that a word means; empty for the adapter that the run ended with.

    Raises:
        BadInput: There is no such checkpoint, it is damaged, or none has a held-out loss to find the best by.
    """
    if not word:
        return ""
    if not request.run:
        raise BadInput("--checkpoint needs a run: an adapter folder alone has no checkpoints.")
    found = list_checkpoints(RunPaths(Path(request.run)))
    damaged = {str(one.step): one.damage for one in found if one.damage}
    if word in damaged:
        raise BadInput(f"the checkpoint of step {word} is damaged: {damaged[word]}. Choose another one.")
    for step, why in damaged.items():
        complain(f"note: the checkpoint of step {step} is damaged and left out: {why}")
    if word == "best":
        chosen = best_of(found)
        if chosen is None:
            raise BadInput("no checkpoint of this run has a held-out loss: name a step, or leave --checkpoint out.")
        return "" if chosen.folder is None else str(chosen.folder)
    whole = [one for one in found if one.folder is not None and not one.damage]
    match = [one for one in whole if str(one.step) == word]
    if not match:
        steps = ", ".join(str(one.step) for one in whole) or "none"
        raise BadInput(f"there is no checkpoint {plain(word, one_line=True, limit=40)}; there are: {steps}, best.")
    return str(match[0].folder)


def _onto(word: str) -> str:
    """Return what to merge into.

    Raises:
        BadInput: It is none of the choices. For 4 bits the message says why not, and what to do instead.
    """
    if word in ONTO:
        return word
    if word.lower() in _FOUR_BITS:
        raise BadInput(
            "merging into 4-bit weights is not done: rounding to 4 bits again would erase most of what was trained "
            "(measured: KL 1.99 to the trained model, 2.05 without any adapter). Merge onto original, then quantise "
            "the merged model."
        )
    raise BadInput(f"--onto {plain(word, one_line=True, limit=40)}: wanted one of {', '.join(ONTO)}.")


def _base_of(adapter: Path) -> str:
    shown = plain(str(adapter / ADAPTER_CONFIG), one_line=True)
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{shown} cannot be read: {plain(str(error), one_line=True)}") from error
    if not isinstance(base, str) or not base:
        raise BadInput(f"{shown} does not say what it was trained on: name the base model with --base.")
    return base
