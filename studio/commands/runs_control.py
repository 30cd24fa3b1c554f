"""The verbs that do something to a run: attach, stop, pause, resume, extend, rm."""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from studio.commands.follow import End, conclude, event_line, follow
from studio.commands.options import root_of, run_of
from studio.commands.terminal import DONE, NO, agreed, complain, duration, number, say, write_json
from studio.core.errors import BadInput
from studio.core.events import Paused
from studio.core.text import plain
from studio.probe.space import check_space
from studio.runs.control import request, requested, withdraw
from studio.runs.job import TRAIN, kind_of_run
from studio.runs.layout import RunPaths
from studio.runs.log_parts import log_tail
from studio.runs.note import read_note, write_note
from studio.runs.status import Status, run_status
from studio.runs.store import contents_of, find_run, remove_run
from studio.runs.summary import summary_of
from studio.runs.supervise import stop
from studio.runs.watch import RunWatch

_POLL_SECONDS = 0.1


def attach(args: argparse.Namespace) -> int:
    """Follow a run from where it is; Ctrl-C leaves it alone.

    Raises:
        BadInput: There is no such run.
    """
    return _follow_on(run_of(args), as_json=args.json, stops_on_interrupt=False)


def stop_run(args: argparse.Namespace) -> int:
    """Ask a run to stop, and wait until it has; with `--force` its process is ended after the wait.

    Stopping a run that has ended already is no error: the user gets what was wanted.

    Raises:
        BadInput: There is no such run.
    """
    paths = run_of(args)
    before = run_status(paths)
    if not before.live:
        _answer(args, paths, before, f"nothing to stop: the run is {before} already")
        return DONE
    if args.force:
        status = stop(paths, grace_seconds=max(0.0, args.wait))
    else:
        stop(paths)
        end = time.monotonic() + args.wait
        while (status := run_status(paths)).live and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
    if status.live:
        _answer(args, paths, status, "still at work: it stops after its current step. Wait, or end it with --force")
        return NO
    _answer(args, paths, status, str(status))
    return DONE


def pause(args: argparse.Namespace) -> int:
    """Let a live run wait after its current step.

    Raises:
        BadInput: There is no such run, it has ended, or it is not a training.
    """
    paths = run_of(args)
    status = run_status(paths)
    if not status.live:
        raise BadInput(f"the run {plain(paths.name, one_line=True)} is {status}: only a live run can be paused.")
    kind = TRAIN
    with suppress(BadInput):  # a damaged recipe.toml keeps no live run from pausing
        kind = kind_of_run(paths)
    if kind != TRAIN:
        name = plain(paths.name, one_line=True)
        raise BadInput(
            f"the run {name} is of the kind {kind}: only training pauses. Stop it with lora-studio runs stop {name}, "
            f"and go on with lora-studio runs resume {name}."
        )
    request(paths, "pause")
    _answer(
        args, paths, status, f"pauses after its current step; continue it with: lora-studio runs resume {paths.name}"
    )
    return DONE


def resume_run(args: argparse.Namespace) -> int:
    """Continue a run: a paused run goes on, and a run whose worker has ended gets a new worker.

    Raises:
        BadInput: There is no such run, there is nothing to continue, no checkpoint is whole, or base, data or recipe
            are not those that the run began with.
        StudioError: The worker cannot be started.
    """
    paths = run_of(args)
    if args.checkpoint is None and run_status(paths).live and requested(paths, "pause"):
        withdraw(paths, "pause")
        _answer(args, paths, run_status(paths), "goes on")
        return DONE
    # A pause with a reason was not asked for: the disk refuses to be written to, and the worker tries again by itself.
    waits = log_tail(paths.events).last(Paused)
    if run_status(paths) is Status.paused and waits is not None and waits.reason:
        _answer(
            args, paths, Status.paused, f"{plain(waits.reason, one_line=True)}: it goes on by itself when there is room"
        )
        return NO
    from studio.launch.start import resume as start_again  # noqa: PLC0415  0.1 s that other verbs need not pay

    def again(**given: Any) -> None:
        start_again(paths, from_start=args.from_start, step=args.checkpoint, restarts=args.restarts, **given)

    return _go_on(args, paths, again)


def extend_run(args: argparse.Namespace) -> int:
    """Let a training that has ended train longer, and follow it; what will be done is told before it starts.

    Raises:
        BadInput: There is no such run, it lives, it is no training, or nothing is left of it to go on from.
        StudioError: The worker cannot be started.
    """
    from studio.launch.start import extend  # noqa: PLC0415  as above
    from studio.runs.extension import Wish  # noqa: PLC0415  as above

    wish = Wish(args.steps, args.epochs, args.schedule)
    paths = run_of(args)

    def tell(words: str) -> None:
        say(f"{paths.name}: {words}", to=sys.stderr if args.json else sys.stdout)

    return _go_on(args, paths, lambda **given: extend(paths, wish, told=tell, **given))


def _go_on(args: argparse.Namespace, paths: RunPaths, start_again: Callable[..., object]) -> int:
    """Start the worker of a run that has ended, and follow it unless it was detached."""
    check_space(paths.root)
    watch = RunWatch(paths)
    watch.catch_up()  # so that nothing from before the resume is told again
    start_again(module=args.modules.get(kind_of_run(paths)), queue=args.queue)
    if args.detach:
        _answer(args, paths, run_status(paths), f"goes on; follow it with: lora-studio runs attach {paths.name}")
        return DONE
    end = follow(watch, to=sys.stderr if args.json else sys.stdout, stops_on_interrupt=True)
    return conclude(watch, end, as_json=args.json)


def remove(args: argparse.Namespace) -> int:
    """Delete runs; all names are looked up before the first is deleted.

    A person at a terminal is asked first, unless `--yes` is given. A script is not asked, because it cannot answer.

    Raises:
        BadInput: A run is not there, or it is live.
    """
    doomed = list(dict.fromkeys(find_run(root_of(args), word) for word in args.run))
    live = [paths.name for paths in doomed if run_status(paths).live]
    if live:
        raise BadInput(f"still live: {plain(', '.join(live), one_line=True)}; stop first what is to be removed.")
    inside = {paths: contents_of(paths) for paths in doomed}  # once a run is deleted, nobody can tell any more
    if not (args.yes or args.json) and sys.stdin.isatty() and sys.stderr.isatty():
        for paths in doomed:
            complain(f"{plain(paths.name, one_line=True)}: {inside[paths]}")
        these = "this run" if len(doomed) == 1 else f"these {len(doomed)} runs"
        if not agreed(f"Delete {these}? This cannot be undone. [y/N] "):
            complain("nothing was removed")
            return NO
    for paths in doomed:
        remove_run(paths)
        if not args.json:
            say(f"removed {paths.name}: {inside[paths]}")
    if args.json:
        write_json({"removed": [paths.name for paths in doomed]})
    return DONE


def note(args: argparse.Namespace) -> int:
    """Show the note on a run, or replace it.

    Raises:
        BadInput: There is no such run, or the note is too long.
    """
    paths = run_of(args)
    if args.text is not None:
        write_note(paths, args.text)
    text = read_note(paths)
    if args.json:
        write_json({"run": paths.name, "note": text})
    else:
        say(text or f"no note on {plain(paths.name, one_line=True)}")
    return DONE


def _follow_on(paths: RunPaths, *, as_json: bool, stops_on_interrupt: bool) -> int:
    to = sys.stderr if as_json else sys.stdout
    watch = RunWatch(paths)
    history = watch.catch_up()
    status = run_status(paths)
    if not status.live:
        watch.catch_up()  # the worker may have written its last lines between the first look and the status
        return conclude(watch, End(status, left=False), as_json=as_json)
    if history.started is not None:
        say(event_line(history.started), to=to)
    if status is Status.queued:
        say(f"queued: {plain(history.phase.detail, one_line=True)}" if history.phase else "queued", to=to)
        return conclude(watch, follow(watch, to=to, stops_on_interrupt=stops_on_interrupt), as_json=as_json)
    train = summary_of(paths, history, status)["train_loss"]
    of = f" of {history.total_steps}" if history.total_steps else ""
    losses = f", loss {number(train['first'])} -> {number(train['last'])}" if train["last"] is not None else ""
    say(f"{status} at step {history.last_step}{of}{losses}, about {duration(history.eta_seconds)} left", to=to)
    end = follow(watch, to=to, stops_on_interrupt=stops_on_interrupt)
    return conclude(watch, end, as_json=as_json)


def _answer(args: argparse.Namespace, paths: RunPaths, status: Status, words: str) -> None:
    if args.json:
        write_json({"run": paths.name, "path": str(paths.root), "status": str(status), "message": words})
    else:
        say(f"{paths.name}: {words}")
