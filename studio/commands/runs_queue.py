"""`lora-studio runs queue`: the runs that wait for a card."""

import argparse
from typing import Any

from studio.commands.options import root_of
from studio.commands.terminal import DONE, NO, complain, say, table, write_json
from studio.core.errors import BadInput
from studio.core.text import plain
from studio.runs.queue import CPU, Queue, Waiting, not_waiting
from studio.runs.store import find_run
from studio.runs.supervise import stop


def queue(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises:
        BadInput: A run is not there, does not wait, or the place is none.
        StudioError: The queue cannot be written.
    """
    return {"list": _list, "move": _move, "cancel": _cancel, "resume": _resume}[args.queue_verb](args)


def _list(args: argparse.Namespace) -> int:
    queue = Queue()
    waiting = queue.waiting()
    documents = [_document(queue, entry, place) for place, entry in enumerate(waiting, start=1)]
    if args.json:
        write_json({"waiting": documents})
    elif not waiting:
        say("no run waits")
    else:
        rows = [["", "run", "waits for", "at work there"]]
        for found in documents:
            lost = "" if found["alive"] else " (its process has ended: lora-studio runs queue resume)"
            rows.append(
                [str(found["place"]), found["run"], ", ".join(found["cards"]) + lost, ", ".join(found["at_work"])]
            )
        say(table(rows))
    return DONE


def _move(args: argparse.Namespace) -> int:
    (entry,) = _named([args.run], args)
    queue = Queue()
    word = args.to.strip().lower()
    number = {"first": 1, "last": len(queue.waiting())}.get(word) or (int(word) if word.isdecimal() else 0)
    if not number:
        raise BadInput(
            f"PLACE: found {plain(args.to, one_line=True, limit=40)!r}; wanted first, last or a number from 1."
        )
    queue.move(entry.run, number - 1)
    return _list(args)


def _cancel(args: argparse.Namespace) -> int:
    """Take runs out; one that has started meanwhile is left alone, and said to have."""
    entries = _named(args.run, args)
    queue = Queue()
    left = []
    for entry in entries:
        if entry.alive:
            stop(entry.run)  # the worker leaves the queue and ends in order
        else:
            queue.remove(entry.run)
        left.append(entry.run.name)
        if not args.json:
            say(f"{plain(entry.run.name, one_line=True)}: taken out of the queue")
    if args.json:
        write_json({"cancelled": left})
    return DONE


def _resume(args: argparse.Namespace) -> int:
    from studio.launch.queued import relaunch_waiting  # noqa: PLC0415  0.1 s that the other verbs need not pay

    started, refused = relaunch_waiting(module=args.modules.get("train"))
    if args.json:
        failed = [{"run": paths.name, "why": why} for paths, why in refused]
        write_json({"resumed": [paths.name for paths in started], "refused": failed})
    else:
        say(f"{len(started)} run(s) wait again" if started else "no run in the queue needs a new process")
        for paths, why in refused:
            complain(f"{plain(paths.name, one_line=True)}: {why}")
    return NO if refused else DONE


def _named(words: list[str], args: argparse.Namespace) -> list[Waiting]:
    waiting = {entry.run.root: entry for entry in Queue().waiting()}
    found = []
    for word in words:
        paths = find_run(root_of(args), word)
        if paths.root not in waiting:
            raise not_waiting(paths)
        found.append(waiting[paths.root])
    return found


def _document(queue: Queue, entry: Waiting, place: int) -> dict[str, Any]:
    busy = dict.fromkeys(paths.name for key in entry.places for paths in queue.at_work(key))
    return {
        "place": place,
        "run": entry.run.name,
        "path": str(entry.run.root),
        "alive": entry.alive,
        "cards": ["the CPU" if key == CPU else key for key in entry.places],
        "at_work": list(busy),
    }
