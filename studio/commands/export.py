"""`lora-studio export`: a merged model in fewer bits, or an adapter with its card, in a process of its own."""

import argparse
import sys
from pathlib import Path

from studio.commands.follow import conclude, follow
from studio.commands.merge import merge_request
from studio.commands.options import add_json, add_runs_dir, module_of, root_of
from studio.commands.terminal import say
from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.export import start_export
from studio.runs.job import EXPORT_FORMATS, ExportRequest, MergeRequest, read_job
from studio.runs.store import find_run
from studio.runs.watch import RunWatch


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write an adapter with its card, or a merged model in 4 or 8 bits",
        description="Write an adapter with a card, or quantise a merged 16-bit model and measure what that costs.",
    )
    parser.add_argument(
        "model", metavar="MERGE_RUN|MERGED_DIR", help="a finished merge or a merged model; for peft a run or an adapter"
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=EXPORT_FORMATS,
        help="peft: the adapter with a card; nf4, int8: 4 or 8 bits, through bitsandbytes",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the new model folder; must not hold anything yet")
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Export, follow, conclude.

    Raises:
        BadInput: The model or the output folder cannot be used; no run folder was made.
        StudioError: The worker cannot be started.
    """
    to = sys.stderr if args.json else sys.stdout
    request = export_request(args.model, root_of(args), out=args.out, form=args.format)
    paths = start_export(request, root_of(args), module=module_of(args, "export"))
    say(f"run {paths.name} in {plain(str(paths.root), one_line=True)}", to=to)
    watch = RunWatch(paths)
    end = follow(watch, to=to, stops_on_interrupt=True)
    return conclude(watch, end, as_json=args.json)


def export_request(word: str, root: Path, *, out: str, form: str) -> ExportRequest:
    """Return the export of what a word names.

    Raises:
        BadInput: It names nothing that can be exported so.
    """
    target = str(Path(out).expanduser().absolute())
    if form != "peft":
        return ExportRequest(str(merged_folder(word, root)), target, form)
    adapter = merge_request(word, root, out=out)
    return ExportRequest(adapter.adapter, target, form, adapter.run)


def merged_folder(word: str, root: Path) -> Path:
    """Return the merged model that a word names: a model folder, else a merge run's output.

    Raises:
        BadInput: It is neither.
    """
    folder = Path(word).expanduser().absolute()
    if "\0" not in word and (folder / "config.json").is_file():
        return folder
    paths = find_run(root, word)
    job = read_job(paths)
    if not isinstance(job, MergeRequest):
        name = plain(paths.name, one_line=True)
        raise BadInput(
            f"the run {name} is no merge. Merge first: lora-studio merge {name} --out DIR, then export that."
        )
    return Path(job.out)
