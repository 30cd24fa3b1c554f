"""`lora-studio train`: train a recipe's adapter and follow the run in plain lines."""

import argparse
import sys

from studio.commands.follow import conclude, follow
from studio.commands.options import add_json, add_restarts, add_runs_dir, add_set, root_of
from studio.commands.recipe_flags import add_recipe_flags, settings_of
from studio.commands.terminal import DONE, WaitLine, asked, say, write_json
from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.launch.kinds import Checked
from studio.launch.queued import at_work
from studio.launch.start import start
from studio.runs.recipe_file import find_recipe, load_recipe
from studio.runs.status import run_status
from studio.runs.summary import summary_of
from studio.runs.watch import RunWatch


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "train",
        help="train a recipe's adapter",
        description="Check a recipe, train it in a process of its own and follow it. Ctrl-C asks the run to stop and "
        "save. A second Ctrl-C returns at once, and the run stops by itself. Exit 0: there is an adapter; 1: the run "
        "failed; 2: bad input.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    parser.add_argument("--model", metavar="MODEL", help="a hub id, a folder, or: embedded")
    parser.add_argument("--data", metavar="FILE", help="a file or folder of rows, owner/name of the hub, or: embedded")
    add_recipe_flags(parser)
    parser.add_argument("--queue", action="store_true", help="wait in the queue until the card is free")
    add_restarts(parser)
    parser.add_argument("--detach", action="store_true", help="return as soon as the worker runs")
    add_set(parser)
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Train, follow, conclude.

    Raises:
        BadInput: The recipe, the model or the data cannot be used; no run folder was made.
        StudioError: The worker cannot be started.
    """
    to = sys.stderr if args.json else sys.stdout
    recipe = load_recipe(find_recipe(args.recipe), settings_of(args))
    told: list[str] = []  # `follow` does not say these again

    def checked(report: Checked[Recipe]) -> None:
        tell_checked(report)
        told.extend(report.notes)

    def queued(report: Checked[Recipe]) -> bool:
        return args.queue or _wait_for_card(report, may_ask=not args.json)

    with WaitLine("reading the data", sys.stderr) as reading:
        paths = start(
            recipe,
            root_of(args),
            module=args.modules.get("train"),
            on_checked=checked,
            queue=queued,
            restarts=args.restarts,
            progress=reading,
        )
    say(f"run {paths.name} in {plain(str(paths.root), one_line=True)}", to=to)
    watch = RunWatch(paths)
    if args.detach:
        summary = summary_of(paths, watch.catch_up(), run_status(paths))
        say(f"follow it with: lora-studio runs attach {paths.name}", to=to)
        if args.json:
            write_json(summary)
        return DONE
    end = follow(watch, to=to, stops_on_interrupt=True, told=told)
    return conclude(watch, end, as_json=args.json)


def _wait_for_card(report: Checked[Recipe], *, may_ask: bool) -> bool:
    """Return whether the run shall wait for its card; a person at a terminal is asked where the card is busy.

    A script is told, and its run starts at once: it cannot answer.

    Raises:
        StudioError: The person wants neither.
    """
    busy = [plain(paths.name, one_line=True) for paths in at_work(report.place)]
    if not busy:
        return False
    say(f"note: at work on this card: {', '.join(busy)}. --queue waits until it is free.", to=sys.stderr)
    if not (may_ask and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    answer = asked("[q]ueue, [s]tart anyway or [c]ancel? [q] ")
    if answer.startswith("c"):
        raise StudioError("cancelled: no run was made.")
    return not answer.startswith("s")


def tell_checked(report: Checked[Recipe]) -> None:
    """Say on stderr what was noticed before the start."""
    for note in report.notes:
        say(f"note: {note}", to=sys.stderr)
