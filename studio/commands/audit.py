"""`lora-studio audit`: measure what 4 bits cost a base, an adapter or a training, in a process of its own."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any, TextIO

from studio.commands.follow import End, exit_code, follow, tell_failure
from studio.commands.options import add_device, add_json, add_run, add_runs_dir, add_set, root_of, run_of
from studio.commands.recipe_flags import add_recipe_flags, settings_of
from studio.commands.terminal import duration, say, table, write_json
from studio.core.audit_text import DAMAGED, advice_lines, note_lines, rows_of, shown_answers, tables_of, title_of
from studio.core.errors import BadInput
from studio.core.recipe import choices_of
from studio.core.text import plain
from studio.launch.start import start
from studio.probe.audit import audit_fields, audit_of_run, copy_report, data_path, read_report
from studio.probe.models import word_anywhere
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import find_recipe, load_recipe
from studio.runs.requests import AuditRequest
from studio.runs.status import Status
from studio.runs.summary import summary_of
from studio.runs.watch import RunWatch

_DEFAULT = AuditRequest("base")
_FORMS, _KEPT = ",".join(_DEFAULT.forms), ",".join(map(str, _DEFAULT.kept))
_LANES = ",".join(_DEFAULT.lanes)
_SHOWN_PROMPTS = 3


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "audit",
        help="measure what 4 bits cost your model, adapter or training",
        description="Measure, on rows of your own data that were not trained on, what 4 bits cost. Every figure has a "
        "95 % interval. "
        "The model is walked block by block, so it need not fit anywhere as a whole.",
    )
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    base = kinds.add_parser("base", help="a base in 16 bit against its roundings, before any training")
    base.add_argument("--model", required=True, metavar="MODEL", help="a hub id, a folder, or: embedded")
    base.add_argument(
        "--data", required=True, metavar="FILE", help="a file or folder of rows, owner/name of the hub, or: embedded"
    )
    base.add_argument("--forms", default=_FORMS, metavar="NAMES", help=f"roundings (default: {_FORMS})")
    base.add_argument(
        "--keep",
        default=_KEPT,
        metavar="N,N",
        help="measure plans with the N worst blocks in 16 bit; 0: none",
    )
    base.add_argument(
        "--precision",
        default="",
        metavar="TABLE",
        help="measure the base as this model.precision holds it, too, such as layers.0-3=16bit,down_proj=int8",
    )
    base.add_argument("--format", default="auto", choices=choices_of("data.format"), help="how the data are read")
    base.add_argument("--seed", default=str(_DEFAULT.seed), metavar="N", help="chooses rows where the file has more")
    run = kinds.add_parser("run", help="an adapter on every base that it can be put on or merged into")
    add_run(run)
    run.add_argument("--base", metavar="MODEL", help="the 16-bit base (default: the one that it was trained on)")
    run.add_argument(
        "--data", metavar="FILE", help="measure on these rows, not on those held out; rows trained on are left out"
    )
    run.add_argument(
        "--merged",
        action="append",
        default=[],
        metavar="DIR",
        help="a merged model to measure as well; may be repeated",
    )
    run.add_argument(
        "--gguf", action="append", default=[], metavar="FILE", help="a GGUF file to measure as well; may be repeated"
    )
    run.add_argument("--no-speed", action="store_true", help="do not measure how many tokens a second each form serves")
    run.add_argument(
        "--answers", metavar="N", help="held-out prompts that base, tuned and merged model answer (default: 0)"
    )
    run.add_argument("--answer-tokens", metavar="N", help="longest answer (default: from the held-out answers)")
    run.add_argument(
        "--check-regex",
        metavar="PATTERN",
        help="a good answer holds a match; where the pattern has a group, the group must find the same in the held-out "
        "answer",
    )
    run.add_argument("--lm-eval", metavar="TASKS", help="tasks of lm-eval, where it is installed, or task files; a,b")
    run.add_argument("--lm-eval-limit", metavar="N", help="most documents of each such task (default: all)")
    base.add_argument("--rows", metavar="N", help=f"most rows of the file (default: {_DEFAULT.rows})")
    run.add_argument("--rows", metavar="N", help="most rows (default: all that the run held out; never more)")
    for kind in (base, run):
        kind.add_argument("--seq", metavar="N", help="longest row, tokens")
        kind.add_argument("--text", metavar="FILE", help="a neutral text (default: a built-in one)")
    add_device(base, "the")  # it is about no run whose card it could take
    add_device(run)
    race = kinds.add_parser("race", help="LoRA and QLoRA trained from one recipe, seed and data")
    race.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    race.add_argument("--model", metavar="MODEL", help="a hub id, a folder, or: embedded")
    race.add_argument("--data", metavar="FILE", help="a file or folder of rows, owner/name of the hub, or: embedded")
    race.add_argument(
        "--lanes",
        default=_LANES,
        metavar="NAMES",
        help=f"two or more of lora, qlora, qlora+loftq, qlora+mixed (with model.precision); default: {_LANES}",
    )
    add_recipe_flags(race)
    add_set(race)
    show = kinds.add_parser("show", help="the report of an audit again, and its files where they are wanted")
    add_run(show)
    show.add_argument("--out", metavar="DIR", help="copy report.md, report.json and the pictures to this folder")
    for kind in (base, run, race, show):
        add_json(kind)
        add_runs_dir(kind)


def run(args: argparse.Namespace) -> int:
    """Measure, follow, show the report.

    Raises:
        BadInput: Something that is named cannot be used; no run folder was made.
        StudioError: The worker cannot be started.
    """
    to = sys.stderr if args.json else sys.stdout
    if args.what == "show":
        return _show(args, to)
    makers = {"base": _base, "run": _run, "race": _race}
    paths = start(makers[args.what](args), root_of(args), module=args.modules.get("audit"))
    say(f"run {paths.name} in {plain(str(paths.root), one_line=True)}", to=to)
    watch = RunWatch(paths)
    return _conclude(watch, follow(watch, to=to, stops_on_interrupt=True), as_json=args.json)


def _show(args: argparse.Namespace, to: TextIO) -> int:
    """Show the report of an audit that has ended, and copy its files."""
    paths = run_of(args)
    report = read_report(paths)
    if report is None:
        name = plain(paths.name, one_line=True)
        raise BadInput(f"the run {name} has no audit's report; see: lora-studio runs show {name}")
    try:
        tell_report(report, to)
    except DAMAGED as error:
        raise BadInput(
            f"the report of {plain(paths.name, one_line=True)} is damaged: {type(error).__name__}."
        ) from error
    files = [str(path) for path in copy_report(paths, Path(args.out).expanduser())] if args.out else []
    for file in files:
        say(f"written: {file}", to=to)
    if args.json:
        write_json({"run": paths.name, "path": str(paths.root), **rows_of(report), "report": report, "files": files})
    return 0


def tell_report(report: Mapping[str, Any], to: TextIO) -> None:
    """Show a report's tables and what it advises."""
    say(f"\n{title_of(report)}", to=to)
    for heading, cells in tables_of(report):
        say(f"\n{heading}", to=to)
        say(table(cells), to=to)
    if notes := note_lines(report):
        say("\nNotes", to=to)
    for line in notes:
        say(f"- {line}", to=to)
    _tell_answers(report, to)
    say(to=to)
    for line in advice_lines(report):
        say(line, to=to)


def _tell_answers(report: Mapping[str, Any], to: TextIO) -> None:
    """Show the first prompts with what each form says; report.md has all of them."""
    every = list(shown_answers(report))
    for one in every[:_SHOWN_PROMPTS]:
        say(f"\n{one.prompt}", to=to)
        for who, text, marks in one.said:
            say(f"  {who}{f' ({marks})' if marks else ''}", to=to)
            say(indent(text, "    "), to=to)
    if len(every) > _SHOWN_PROMPTS:
        say(f"\n{len(every) - _SHOWN_PROMPTS} more prompts are in report.md", to=to)


def _base(args: argparse.Namespace) -> AuditRequest:
    request = AuditRequest(
        "base",
        model=word_anywhere(args.model),
        data=data_path(args.data),
        format=args.format,
        device=args.device,
        precision=args.precision,
    )
    kept = "" if args.keep.strip() == "0" else args.keep
    said = {"forms": args.forms, "kept": kept, "seed": args.seed, **_limits(args)}
    return replace(request, **audit_fields(said))


def _run(args: argparse.Namespace) -> AuditRequest:
    changes = audit_fields(_limits(args))
    if args.base:
        changes |= {"model": word_anywhere(args.base), "revision": ""}
    if args.data:
        changes |= {"data": data_path(args.data), "format": "auto"}
    if args.device != "auto":
        changes["device"] = args.device
    asked = ("answers", "answer_tokens", "check_regex", "lm_eval", "lm_eval_limit")
    changes |= audit_fields({name: value for name in asked if (value := getattr(args, name)) is not None})
    changes |= {"merged": _places(args.merged), "gguf": _places(args.gguf), "speed": not args.no_speed}
    return audit_of_run(run_of(args), **changes)


def _places(words: Sequence[str]) -> tuple[str, ...]:
    """Return absolute paths."""
    return tuple(str(Path(word).expanduser().absolute()) for word in words)


def _race(args: argparse.Namespace) -> AuditRequest:
    recipe = load_recipe(find_recipe(args.recipe), settings_of(args))
    return AuditRequest(
        "race",
        model=recipe.model.base,
        revision=recipe.model.revision,
        recipe=recipe,
        **audit_fields({"lanes": args.lanes}),
    )


def _limits(args: argparse.Namespace) -> dict[str, str]:
    given = {"rows": args.rows, "seq_len": args.seq}
    found = {name: str(value) for name, value in given.items() if value is not None}
    return found | ({"text": str(Path(args.text).expanduser().absolute())} if args.text else {})


def _conclude(watch: RunWatch, end: End, *, as_json: bool) -> int:
    paths: RunPaths = watch.paths
    summary = summary_of(paths, watch.history, end.status)
    report = read_report(paths) if end.status is Status.finished else None
    to = sys.stderr if as_json else sys.stdout
    if end.left:
        say(f"the run lives on; look again with: lora-studio runs attach {paths.name}", to=to)
    elif end.status in (Status.failed, Status.crashed):
        tell_failure(paths, summary)
    elif report is None:
        say(f"{summary['status']}; go on with: lora-studio runs resume {paths.name}", to=to)
    else:
        tell_report(report, to)
        say(f"\n{summary['status']} in {duration(summary['seconds'])}", to=to)
        say(f"report: {plain(str(paths.report_text), one_line=True)}", to=to)
    if as_json:
        keys = ("run", "path", "status", "seconds", "warnings", "failure")
        counted = rows_of(report) if report else {}
        write_json({**{key: summary[key] for key in keys}, **counted, "report": report})
    return exit_code(summary, end)
