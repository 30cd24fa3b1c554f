"""The verbs that look into runs: show, compare."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from studio.commands.follow import loss_ends, tell_failure
from studio.commands.loss_plot import loss_plot
from studio.commands.options import root_of, run_of
from studio.commands.terminal import DONE, duration, is_rich, number, say, size, table, width_of_terminal, write_json
from studio.core.errors import BadInput
from studio.core.left_out import left_out_in_words
from studio.core.preferences import preferred_in_words
from studio.core.recipe import FIELDS, Recipe, field_text
from studio.core.text import plain
from studio.runs.job import job_table, read_job
from studio.runs.layout import RunPaths
from studio.runs.status import run_status
from studio.runs.store import find_run
from studio.runs.summary import command_of, differing_fields, figures_of, folder_bytes, summary_of
from studio.runs.watch import read_history


def show(args: argparse.Namespace) -> int:
    """Show one run.

    Raises:
        BadInput: There is no such run.
    """
    paths = run_of(args)
    history = read_history(paths)
    summary = summary_of(paths, history, run_status(paths))
    recipe = _recipe_table(paths)
    if args.json:
        evals = [{"step": event.step, "loss": _finite(event.loss), **figures_of(event)} for event in history.evals]
        samples = [asdict(event) for event in history.samples]
        write_json(summary | {"recipe": recipe, "evals": evals, "samples": samples, "files": _files(paths)})
        return DONE
    for key, text in _facts(summary).items():
        say(f"{key:<10} {text}")
    for tried in summary["next"]:
        say(f"{'try next':<10} {plain(tried['words'], one_line=True, limit=400)}")
    if command := command_of(paths, summary["next"]):
        say(f"{'with':<10} {plain(command, one_line=True)}")
    for name, size_bytes in _files(paths).items():
        say(f"{'file':<10} {name} ({size(size_bytes)})")
    for message in summary["warnings"]:
        say(f"{'warning':<10} {plain(message, one_line=True, limit=300)}")
    plot = loss_plot(history, width=width_of_terminal(), rich=is_rich(sys.stdout))
    if plot:
        print(plot, flush=True)
    if summary["failure"]:
        tell_failure(paths, summary)
    return DONE


def compare(args: argparse.Namespace) -> int:
    """Show where recipes differ and how the runs came out.

    Raises:
        BadInput: A run is not there, or fewer than two are named.
    """
    runs = [find_run(root_of(args), word) for word in args.run]
    if len(set(runs)) < 2:
        raise BadInput(f"found {len(set(runs))} run to compare; wanted two or more different ones.")
    outcomes = [_outcome(paths) for paths in runs]
    differences = differing_fields([_recipe(paths) for paths in runs])
    if args.json:
        stored = {path: list(map(FIELDS[path].kind.stored, values)) for path, values in differences.items()}
        write_json({"runs": outcomes, "recipe_differences": stored})
        return DONE
    rows = [[path, *(field_text(path, value) for value in values)] for path, values in differences.items()]
    say(table([["recipe", *(paths.name for paths in runs)], *(rows or [["no difference", *["" for _ in runs]]])]))
    say()
    say(table([["outcome", *(paths.name for paths in runs)], *_outcome_rows(outcomes)]))
    return DONE


def _outcome(paths: RunPaths) -> dict[str, Any]:
    summary = summary_of(paths, read_history(paths), run_status(paths))
    return summary | {"adapter_bytes": folder_bytes(paths.adapter) if paths.adapter.is_dir() else None}


def _outcome_rows(outcomes: list[dict[str, Any]]) -> list[list[str]]:
    def row(label: str, told: Any) -> list[str]:
        return [label, *(told(outcome) for outcome in outcomes)]

    return [
        row("status", lambda found: found["status"]),
        row("steps", lambda found: f"{found['steps']}/{found['total_steps'] or '?'}"),
        *_loss_rows(outcomes),
        row("tokens/s", lambda found: number(found["tokens_per_second"], ",.0f")),
        row("peak memory", lambda found: size(found["peak_bytes"])),
        row("time", lambda found: duration(found["seconds"])),
        row("adapter", lambda found: size(found["adapter_bytes"])),
    ]


def _loss_rows(outcomes: list[dict[str, Any]]) -> list[list[str]]:
    """Return the losses, those of each objective in rows of their own: they are different quantities."""
    objectives = dict.fromkeys(found["objective"] for found in outcomes if found["objective"])
    rows = []
    for objective in objectives or (None,):
        of_it = f" ({objective})" if len(objectives) > 1 else ""
        same = [found if objective in (None, found["objective"]) else None for found in outcomes]
        for label, key in (("training loss", "train_loss"), ("held-out loss", "eval_loss")):
            rows.append([label + of_it, *(loss_ends(found[key]) if found else "-" for found in same)])
    if any(found["pairs"] for found in outcomes):
        last = [((found["pairs"] or {}).get("last_evaluation") or {}) for found in outcomes]
        for label, key in (("held-out accuracy", "accuracy"), ("held-out margin", "margin")):
            rows.append([label, *(number(figures.get(key), ".3f") for figures in last)])
    return rows


def _facts(summary: dict[str, Any]) -> dict[str, str]:
    """Return what is known of a run, by name. A job that trains nothing has no steps and no losses."""
    trains = summary["job"] in (None, "train")
    known = {
        "training": (summary["train_loss"]["last"], f"loss {loss_ends(summary['train_loss'])}"),
        "held out": (summary["eval_loss"]["last"], f"loss {loss_ends(summary['eval_loss'])}"),
        "gain": (summary["gain"], (summary["gain"] or {}).get("words", "")),
        **_pair_facts(summary["pairs"]),
        "speed": (summary["tokens_per_second"], f"{number(summary['tokens_per_second'], ',.0f')} tokens/s"),
        "memory": (summary["peak_bytes"], f"peak {size(summary['peak_bytes'])}"),
        "saved": (summary["checkpoints"] or None, _checkpoints(summary["checkpoints"])),
        "restarts": (summary["guard"], _restarts(summary["guard"])),
        "shrunk": (summary["shrunk"] or None, shrunk_in_words(summary["shrunk"])),
        "rows": (summary["left_out"] or None, left_out_in_words(summary["left_out"])),
        "adapter": (trains or None, summary["adapter"] or "none"),
        "output": (summary["out"], str(summary["out"])),
    }
    steps = f"{summary['steps']} of {summary['total_steps'] or '?'} in " if trains else ""
    facts = {
        "run": summary["run"],
        "folder": summary["path"],
        "status": f"{summary['status']}{f': {why}' if (why := _waits(summary)) else ''}",
        "job": " ".join(str(summary[key]) for key in ("job", "method", "model", "device") if summary[key]),
        "steps" if trains else "time": f"{steps}{duration(summary['seconds'])}",
        **{key: text for key, (value, text) in known.items() if value is not None},
    }
    return {key: plain(text, one_line=True, limit=400) for key, text in facts.items()}


def shrunk_in_words(shrunk: Sequence[Mapping[str, Any]]) -> str:
    """Return what a run was made smaller by, as memory was refused, with the steps; empty where it never was."""
    return "; ".join(f"after step {one['step']}: {one['words']}" for one in shrunk)


def _checkpoints(kept: Sequence[Mapping[str, Any]]) -> str:
    steps = ", ".join(f"{one['step']}{' (lowest held-out loss)' if one['best'] else ''}" for one in kept)
    return f"checkpoints of steps {steps}"


def _restarts(guard: Mapping[str, Any] | None) -> str:
    return f"{guard['used']} of {guard['times']} used" if guard else ""


def _waits(summary: dict[str, Any]) -> str:
    """Return what a live run waits for; empty for one that works."""
    silent = summary["silent_seconds"]
    silence = f"nothing was heard of it for {duration(silent)}" if silent else ""
    guard = summary["guard"]
    return (guard["words"] if guard else "") or summary["queued"] or summary["paused_for"] or silence


def _pair_facts(pairs: dict[str, Any] | None) -> dict[str, tuple[Any, str]]:
    """Return the figures of pairs of answers, in words: the last step's, the first and the last evaluation's."""
    named = {"pairs": "last_step", "before": "first_evaluation", "after": "last_evaluation"}
    told = {label: preferred_in_words((pairs or {}).get(key) or {}) for label, key in named.items()}
    where = {"pairs": "at the last step", "before": "held out, at first", "after": "held out, at last"}
    return {label: (words or None, f"{where[label]}: {words}") for label, words in told.items()}


def _files(paths: RunPaths) -> dict[str, int]:
    read = (paths.recipe, paths.plan, paths.identity, paths.held_out, paths.reference)
    places = (*read, paths.events, paths.output, paths.report, paths.checkpoints, paths.adapter)
    return {
        place.name: folder_bytes(place) if place.is_dir() else place.stat().st_size
        for place in places
        if place.exists()
    }


def _recipe(paths: RunPaths) -> Recipe | None:
    try:
        return read_job(paths, Recipe)
    except BadInput:
        return None


def _recipe_table(paths: RunPaths) -> dict[str, Any] | None:
    """Return what a run was asked to do, ready for JSON; None where its `recipe.toml` is damaged."""
    try:
        return job_table(paths)
    except BadInput:
        return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
