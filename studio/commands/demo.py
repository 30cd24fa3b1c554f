"""`lora-studio demo`: the whole way on the embedded model and data, on a screen or in plain lines."""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any, TextIO

from studio.commands.follow import End, conclude, exit_code, follow, tell_failure, tell_success
from studio.commands.merge import request_for
from studio.commands.open_studio import first_recipe, open_studio
from studio.commands.options import add_json, add_runs_dir, module_of, root_of
from studio.commands.terminal import DONE, say, size, why_no_studio, width_of_terminal, write_json
from studio.commands.train import tell_checked
from studio.core.errors import StudioError
from studio.core.text import plain
from studio.probe.start import start_merge, start_training
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.status import Status
from studio.runs.summary import folder_bytes, summary_of
from studio.runs.watch import RunWatch


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "demo",
        help="the embedded model and data, end to end",
        description="Train the embedded model on the embedded data with QLoRA, show held-out answers before and after, "
        "save the adapter and merge it into the 16-bit base. In a terminal this opens the studio on it.",
    )
    parser.add_argument("--no-tui", action="store_true", help="plain lines, even in a terminal")
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Show the whole way.

    Raises:
        StudioError: A part of it cannot be started.
    """
    recipe = first_recipe(None)  # the shipped one, also where a file of this name lies in the current folder
    if not (args.no_tui or args.json or why_no_studio()):
        return open_studio(recipe, root_of(args), launch=True)
    to = sys.stderr if args.json else sys.stdout
    paths = start_training(recipe, root_of(args), module=module_of(args, "train"), on_checked=tell_checked)
    say(f"run {paths.name} in {plain(str(paths.root), one_line=True)}", to=to)
    watch = RunWatch(paths)
    end = follow(watch, to=to, stops_on_interrupt=True)
    if end.left or end.status is not Status.finished:
        return conclude(watch, end, as_json=args.json)
    summary = summary_of(paths, watch.history, end.status)
    tell_success(watch, summary, to)
    answers = before_and_after(watch.history)
    _tell_answers(answers, to)
    merged, merge_summary, code = _merge(paths, args, to)
    if args.json:
        write_json(summary | {"samples": answers, "merged": merged, "merge": merge_summary})
    elif code == DONE:
        _tell_places(paths, str(merged), to)
    return code


def before_and_after(history: History) -> list[dict[str, str]]:
    """Return each held-out prompt with the answer in the data and the model's first and last answer."""
    answers: dict[int, dict[str, str]] = {}
    for event in history.samples:
        first = {"prompt": event.prompt, "expected": event.expected, "before": event.answer}
        answers.setdefault(event.index, first)["after"] = event.answer
    return [answers[index] for index in sorted(answers)]


def _merge(paths: RunPaths, args: argparse.Namespace, to: TextIO) -> tuple[str | None, dict[str, Any], int]:
    """Merge into the 16-bit base beside the adapter, and look whether a model lies there."""
    out = paths.root / "merged"
    merge_paths = start_merge(request_for(paths, str(out)), root_of(args), module=module_of(args, "merge"))
    watch = RunWatch(merge_paths)
    end = follow(watch, to=to, stops_on_interrupt=True)
    summary = summary_of(merge_paths, watch.history, end.status)
    code = exit_code(summary, End(end.status, left=False))
    if end.status in (Status.failed, Status.crashed):
        tell_failure(merge_paths, summary)
    if code == DONE and not _is_model(out):
        raise StudioError(f"the merge said that it was done, but {plain(str(out), one_line=True)} holds no model.")
    return (str(out) if code == DONE else None), summary, code


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _tell_answers(answers: list[dict[str, str]], to: TextIO) -> None:
    column = (width_of_terminal() - 3) // 2
    for answer in answers:
        say(to=to)
        say(f"held-out: {plain(answer['prompt'], one_line=True, limit=4 * column)}", to=to)
        left = _wrapped("before: ", answer["before"], column)
        right = _wrapped("after: ", answer["after"], column)
        for row in range(max(len(left), len(right))):
            before = left[row] if row < len(left) else ""
            after = right[row] if row < len(right) else ""
            say(f"{before:<{column}} | {after}".rstrip(), to=to)
        say(f"in the data: {plain(answer['expected'], one_line=True, limit=4 * column)}", to=to)


def _wrapped(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(label + plain(text, one_line=True, limit=600), width) or [label]


def _tell_places(paths: RunPaths, merged: str, to: TextIO) -> None:
    say(to=to)
    say("everything lies here:", to=to)
    for label, place in (("run", paths.root), ("adapter", paths.adapter), ("merged model", Path(merged))):
        say(f"  {label:<13} {plain(str(place), one_line=True)} ({size(folder_bytes(place))})", to=to)
    say(f"look at it again with: lora-studio runs show {paths.name}", to=to)
