"""`lora-studio clean`: what the program holds on the disk, and freeing of it what was asked for."""

import argparse
import sys
from pathlib import Path
from typing import Any

from studio.commands.options import add_json, add_runs_dir, root_of
from studio.commands.terminal import DONE, NO, agreed, complain, say, size, table, write_json
from studio.core.errors import BadInput
from studio.core.text import plain
from studio.runs.held import KINDS, UNASKED, Held, free, held, held_run
from studio.runs.home import cache_root, studio_home
from studio.runs.store import find_run, list_runs
from studio.runs.summary import folder_bytes


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "clean",
        help="what the program holds on the disk, and how to free it",
        description="Without --delete nothing is changed. Without names, --delete frees what is made again by itself "
        "and what killed jobs have left. Runs, with their adapters, are freed by their names alone.",
    )
    parser.add_argument("what", metavar="WHAT", nargs="*", help=f"{', '.join(KINDS)}, or the name of a run")
    parser.add_argument("--delete", action="store_true", help="free it; asks first in a terminal")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Show what is held, or free what was asked for; 1 where something could not be freed or was not agreed to.

    Raises:
        BadInput: A word is neither a kind nor a run.
    """
    root = root_of(args)
    chosen = _chosen(args, root)
    if args.delete:
        chosen = [one for one in chosen if args.what or one.kind in UNASKED]
        return _free(args, chosen)
    if args.json:
        write_json(_document(chosen, root, {}, {}))
    else:
        _show(chosen, root, named=bool(args.what))
    return DONE


def _chosen(args: argparse.Namespace, root: Path) -> list[Held]:
    """Return what the words mean, in their order; all but the runs without words."""
    found = held(root)
    if not args.what:
        return found
    chosen: list[Held] = []
    for word in dict.fromkeys(args.what):
        if word in KINDS:
            chosen += [one for one in found if one.kind == word]
        else:
            try:
                chosen.append(held_run(find_run(root, word)))
            except BadInput as error:
                raise BadInput(f"{error} Kinds are {', '.join(KINDS)}.") from error
    return chosen


def _free(args: argparse.Namespace, chosen: list[Held]) -> int:
    asks = not (args.yes or args.json) and sys.stdin.isatty() and sys.stderr.isatty()
    free_now = [one for one in chosen if not one.kept]
    if asks and free_now:
        complain(_table(free_now))
        total = size(sum(one.size_bytes for one in free_now))
        if not agreed(f"Delete this, {total}? It cannot be undone. [y/N] "):
            complain("nothing was deleted")
            return NO
    freed: dict[int, int] = {}
    failed: dict[int, str] = {}
    for place, one in enumerate(chosen):
        try:
            freed[place] = free(one)
        except BadInput as error:
            failed[place] = str(error)
    if args.json:
        write_json(_document(chosen, root_of(args), freed, failed))
    else:
        for place, one in enumerate(chosen):
            say(failed.get(place) or f"freed {size(freed[place])}: {one.what}")
        say(f"{size(sum(freed.values()))} freed" if chosen else "there is nothing to free")
    return NO if failed else DONE


def _show(chosen: list[Held], root: Path, *, named: bool) -> None:
    if not chosen:
        say("nothing is held" if named else "nothing is held but runs and settings")
    else:
        say(_table(chosen))
        for one in chosen:
            if one.kept:
                say(f"{one.what}: {one.kept}")
    if named:
        return
    runs = list_runs(root)
    say()
    if runs:
        total = sum(folder_bytes(info.paths.root) for info in runs)
        many = f"{len(runs)} runs with their adapters take" if len(runs) > 1 else "one run with its adapter takes"
        say(f"{many} {size(total)} in {plain(str(root), one_line=True)};")
        say("one is freed by its name: lora-studio runs rm RUN")
    say(f"in {plain(str(cache_root()), one_line=True)} and {plain(str(studio_home()), one_line=True)}")
    say("models of the hub lie in the cache that all programs of Hugging Face share: hf cache --help")
    if any(one.kind in UNASKED and not one.kept for one in chosen):
        say(
            f"free {' and '.join(UNASKED)}: lora-studio clean --delete; or name them: lora-studio clean caches --delete"
        )


def _table(chosen: list[Held]) -> str:
    rows = [[one.kind, size(one.size_bytes), one.what, one.cost or "nothing"] for one in chosen]
    return table([["kind", "size", "what", "freeing it costs"], *rows])


def _document(chosen: list[Held], root: Path, freed: dict[int, int], failed: dict[int, str]) -> dict[str, Any]:
    return {
        "held_bytes": sum(one.size_bytes for one in chosen) - sum(freed.values()),
        "freed_bytes": sum(freed.values()),
        "runs": len(list_runs(root)),
        "items": [
            {
                "kind": one.kind,
                "what": one.what,
                "paths": [str(path) for path in one.paths],
                "size_bytes": one.size_bytes,
                "cost": one.cost,
                "freed": place in freed,
                "kept": failed.get(place) or one.kept,
            }
            for place, one in enumerate(chosen)
        ],
    }
