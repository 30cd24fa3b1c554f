"""`lora-studio runs`: the verbs on runs that exist."""

import argparse
import importlib

from studio.commands.options import add_json, add_restarts, add_run, add_runs_dir
from studio.core.schedule import TAILS

_VERBS = {
    "list": ("all runs, newest first", "runs_list", "list_all"),
    "show": ("one run: recipe, numbers, files", "runs_view", "show"),
    "attach": ("follow a live run; Ctrl-C leaves it alone", "runs_control", "attach"),
    "stop": ("ask a run to save and stop", "runs_control", "stop_run"),
    "pause": ("let a run wait after its current step", "runs_control", "pause"),
    "resume": ("continue a paused, stopped, failed or crashed run", "runs_control", "resume_run"),
    "extend": ("let a finished, stopped or crashed training train longer", "runs_control", "extend_run"),
    "rm": ("delete runs with their checkpoints and adapters", "runs_control", "remove"),
    "note": ("write a few words on a run, or show them", "runs_control", "note"),
    "queue": ("the runs that wait for a card: list, move, cancel, resume", "runs_queue", "queue"),
    "compare": ("what differs between runs, and what came of it", "runs_view", "compare"),
}

QUEUE_VERBS = {
    "list": "the runs that wait, in order, and what each waits for",
    "move": "give a waiting run another place",
    "cancel": "take runs out of the queue; their folders stay",
    "resume": "let runs wait again whose processes have ended, as after a reboot",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verbs."""
    runs = subparsers.add_parser("runs", help="list, follow, stop, continue and compare runs")
    verbs = runs.add_subparsers(dest="runs_verb", metavar="VERB", required=True)
    for verb, (help_text, _, _) in _VERBS.items():
        parser = verbs.add_parser(verb, help=help_text, description=help_text)
        if verb in ("rm", "compare"):
            add_run(parser, "+")
        elif verb == "queue":
            _add_queue(parser)
            continue
        elif verb != "list":
            add_run(parser)
        if verb == "stop":
            parser.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long to wait for it")
            parser.add_argument("--force", action="store_true", help="end the process when the wait is over")
        if verb == "rm":
            parser.add_argument("--yes", action="store_true", help="do not ask (without a terminal nothing is asked)")
        if verb == "resume":
            parser.add_argument("--detach", action="store_true", help="return as soon as the worker runs")
            where = parser.add_mutually_exclusive_group()
            where.add_argument(
                "--from-start",
                action="store_true",
                help="train from the first step again where every checkpoint is damaged or gone",
            )
            where.add_argument(
                "--checkpoint",
                type=int,
                metavar="STEP",
                help="go back to the checkpoint of this step, also in a finished run; later ones are renamed",
            )
            parser.add_argument("--queue", action="store_true", help="wait in the queue until its card is free")
            add_restarts(parser)
        if verb == "extend":
            _add_extend(parser)
        if verb == "note":
            parser.add_argument("text", nargs="?", help='the words; "" takes the note away; none shows it')
        add_json(parser)
        add_runs_dir(parser)


def _add_extend(parser: argparse.ArgumentParser) -> None:
    longer = parser.add_mutually_exclusive_group(required=True)
    longer.add_argument("--steps", type=int, default=0, metavar="N", help="how many further optimizer steps")
    longer.add_argument("--epochs", type=float, default=0.0, metavar="N", help="how many further passes over the rows")
    parser.add_argument(
        "--schedule",
        choices=list(TAILS),
        help="how the learning rate goes on beyond the plan: "
        + "; ".join(f"{tail}: it {words}" for tail, words in TAILS.items())
        + ". Without it: constant where the recipe's schedule is, else rewarm",
    )
    parser.add_argument("--detach", action="store_true", help="return as soon as the worker runs")
    parser.add_argument("--queue", action="store_true", help="wait in the queue until its card is free")


def _add_queue(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="queue_verb", metavar="VERB", required=True)
    for verb, help_text in QUEUE_VERBS.items():
        own = verbs.add_parser(verb, help=help_text, description=help_text)
        if verb in ("move", "cancel"):
            add_run(own, "+" if verb == "cancel" else None)
        if verb == "move":
            own.add_argument("to", metavar="PLACE", help="first, last, or a number from 1")
        add_json(own)
        add_runs_dir(own)


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        StudioError: The run is not there, or not in a state for it.
    """
    _, module, function = _VERBS[args.runs_verb]
    return int(getattr(importlib.import_module(f"studio.commands.{module}"), function)(args))
