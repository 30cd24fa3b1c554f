"""`lora-studio export`: an adapter or a merged model in another format, in a process of its own."""

import argparse
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from studio.commands.follow import conclude, follow
from studio.commands.merge import merge_request
from studio.commands.options import add_json, add_runs_dir, root_of
from studio.commands.terminal import say
from studio.core.errors import BadInput
from studio.core.export_formats import FORMATS, export_checks, formats_help
from studio.core.text import plain
from studio.launch.start import start
from studio.probe.model_folder import CONFIG
from studio.runs.job import read_job
from studio.runs.layout import ADAPTER_CONFIG
from studio.runs.requests import ONTO, ExportRequest, MergeRequest
from studio.runs.store import find_run, runs_in
from studio.runs.watch import RunWatch


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write an adapter or a merged model in another format",
        description="Write an adapter with a card, or a whole model for llama.cpp and Ollama (GGUF) or in 4 or 8 bits "
        "(bitsandbytes), and measure what that costs. An adapter is merged into its 16-bit base first.",
    )
    parser.add_argument(
        "model", metavar="RUN|ADAPTER_DIR|MERGED_DIR", help="a training or merge run, a PEFT folder, or a merged model"
    )
    parser.add_argument(
        "--format",
        required=True,
        type=str.lower,
        choices=tuple(FORMATS),
        help=formats_help().replace("%", "%%"),
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder; for GGUF formats also the name of one .gguf file"
    )
    parser.add_argument("--base", default="", help="the base model (default: the one that it was trained on)")
    parser.add_argument(
        "--onto",
        default="",
        choices=ONTO,
        help="what an adapter is merged into first (original); see merge --help",
    )
    parser.add_argument(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="upload the result to this hub repository as well (made private if new), with the hub's own login",
    )
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Export, follow, conclude.

    Raises:
        BadInput: The model or the output folder cannot be used; no run folder was made.
        StudioError: The worker cannot be started.
    """
    to = sys.stderr if args.json else sys.stdout
    request = export_request(args.model, root_of(args), out=args.out, form=args.format, base=args.base)
    request = replace(request, onto=args.onto or request.onto, push=args.push)
    paths = start(request, root_of(args), module=args.modules.get("export"))
    say(f"run {paths.name} in {plain(str(paths.root), one_line=True)}", to=to)
    watch = RunWatch(paths)
    end = follow(watch, to=to, stops_on_interrupt=True)
    code = conclude(watch, end, as_json=args.json)
    finished = watch.history.finished
    for line in export_checks(finished.result) if finished and not args.json else []:
        say(line)
    return code


def export_request(word: str, root: Path, *, out: str, form: str, base: str = "") -> ExportRequest:
    """Return the request to export what a word names.

    Raises:
        BadInput: It names nothing that can be exported to this format.
    """
    target = str(Path(out).expanduser().absolute())
    merged = merged_model(word, root)
    if merged is not None and FORMATS[form].of_adapter:
        run = merged.run if isinstance(merged, MergeRequest) else ""
        which = f": {plain(Path(run).name, one_line=True)}" if run else " that was merged"
        raise BadInput(
            f"{plain(word, one_line=True)} is a merged model, and {form} is a format of adapters: name the run or the "
            f"PEFT folder{which}."
        )
    if isinstance(merged, MergeRequest):
        return ExportRequest(merged.out, target, form, merged.run, onto=merged.onto)
    if merged is not None:
        return ExportRequest(str(merged), target, form, _training_of(merged, root))
    adapter = merge_request(word, root, out=out, base=base)
    return ExportRequest(adapter.adapter, target, form, adapter.run, adapter.base, adapter.revision)


def _training_of(merged: Path, root: Path) -> str:
    """Return the training run whose adapter a merge put into this folder; empty where no run in `root` did."""
    for paths in runs_in(root):
        with suppress(BadInput):  # a damaged folder tells nothing of this one
            if (merge := read_job(paths, MergeRequest)) and Path(merge.out) == merged and merge.run:
                return merge.run
    return ""


def merged_model(word: str, root: Path) -> MergeRequest | Path | None:
    """Return the merged model that a word names: a model folder, else a merge run's request; None for an adapter."""
    folder = Path(word).expanduser().absolute()
    if "\0" not in word and (folder / CONFIG).is_file():
        return folder
    if "\0" not in word and (folder / ADAPTER_CONFIG).is_file():
        return None
    return read_job(find_run(root, word), MergeRequest)
