"""`lora-studio data show`: the rows as the model will read them, token by token, and what they add up to."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from studio.commands.options import add_json, add_set
from studio.commands.terminal import (
    BAD_INPUT,
    DONE,
    NO,
    can_encode,
    complain,
    is_rich,
    say,
    width_of_terminal,
    write_json,
)
from studio.core.errors import BadInput
from studio.core.left_out import left_out_in_words
from studio.core.recipe import Recipe, choices_of
from studio.core.recipe_parse import apply_settings
from studio.core.text import every_character, plain
from studio.probe.data.places import absolute_word
from studio.probe.models import word_anywhere
from studio.runs.piped import Loading, NotAnswered
from studio.runs.recipe_file import load_recipe
from studio.runs.show import MODULE, NoRow, Opened, RowShown, ShownExample, ShowProcess, ShowRequest, Summary

_ROWS_SHOWN, _ROWS_IN_JSON = 3, 100
_LEARNT, _SPECIAL, _LOST, _OFF = "\x1b[1;32m", "\x1b[36m", "\x1b[2;31m", "\x1b[0m"
_BAR_CELLS = 40
_Kind = TypeVar("_Kind")


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "show",
        help="show rows token by token, and what is learnt of them",
        description="Show rows as the model will read them: the chat template's text token by token, with what is "
        "learnt marked. Below them: lengths against the row length, the share that is learnt, what is left out and "
        "why, and rows that repeat others. Exit 0: rows can be trained on; 1: none can, or the file must be corrected; "
        "2: the file, the model or the row cannot be had.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="a data file, or: embedded; a recipe (.toml) brings its own settings"
    )
    parser.add_argument("--model", help="whose tokenizer and chat template are used (needed unless FILE is a recipe)")
    parser.add_argument("--row", type=_number, metavar="N", help="only this row, by its number in the file")
    parser.add_argument(
        "--rows",
        type=_number,
        metavar="N",
        help=f"the first N rows (default: {_ROWS_SHOWN}, with --json {_ROWS_IN_JSON})",
    )
    parser.add_argument("--format", choices=choices_of("data.format"), help="what the file must be")
    parser.add_argument("--seq", type=_number, metavar="N", help="the row length in tokens (train.seq_len)")
    add_set(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Show rows.

    Raises:
        BadInput: The arguments name no model, or a setting cannot be used.
        StudioError: The process cannot be started.
    """
    # A file by itself is shown as what it holds; what a recipe or a setting asks for stands.
    asked = args.file.endswith(".toml") or any(word.partition("=")[0] == "train.objective" for word in args.set)
    request = ShowRequest(_recipe(args), pairs=not asked)
    with ShowProcess(request, module=args.modules.get("show", MODULE)) as process:
        return _Show(process, args).run()


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.file.endswith(".toml"):
        recipe = load_recipe(Path(args.file).expanduser())
    else:
        recipe = Recipe().with_("data.path", absolute_word(args.file)).with_("eval.rows", 0).with_("eval.samples", 0)
        if not args.model:
            raise BadInput("no model is named: tokens and chat template are a model's. Name it with --model.")
    for field, value in (("model.base", args.model), ("data.format", args.format), ("train.seq_len", args.seq)):
        if value is not None:
            recipe = recipe.with_(field, word_anywhere(value) if field == "model.base" else value)
    return apply_settings(recipe, args.set)


class _NotShownError(Exception):
    """What was asked for cannot be shown."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Show:
    """One call: asks the process row by row and tells what it answers."""

    def __init__(self, process: ShowProcess, args: argparse.Namespace) -> None:
        self._process, self._args = process, args
        self._opened = Opened()
        self._summary = Summary()

    def run(self) -> int:
        """Show the rows and what they add up to, and return the exit code."""
        try:
            self._heard(Opened)
            rows = self._rows()
            while not self._summary.seq_len or not self._summary.whole:
                self._heard(Summary)
        except _NotShownError as failed:
            complain(plain(str(failed)))
            return failed.code
        fatal = any(one["fatal"] for one in self._opened.findings)
        if self._args.json:
            write_json(document_of(self._opened, rows, self._summary, ok=bool(self._summary.examples) and not fatal))
        else:
            self._tell(rows)
        return DONE if self._summary.examples and not fatal else NO

    def _rows(self) -> list[RowShown]:
        if self._args.row is not None:
            self._process.ask_number(self._args.row)
            return [self._heard(RowShown)]
        wanted = self._args.rows or (_ROWS_IN_JSON if self._args.json else _ROWS_SHOWN)
        rows = []
        for place in range(min(wanted, self._opened.rows)):
            self._process.ask_place(place)
            rows.append(self._heard(RowShown))
        return rows

    def _heard(self, kind: type[_Kind]) -> _Kind:
        """Return the next event of a kind, and keep or tell the others that come before it."""
        for event in self._process.events(until=(kind, NoRow, NotAnswered)):
            if isinstance(event, Loading) and event.detail.startswith(("unpacking", "getting")):
                complain(event.detail)
            elif isinstance(event, Opened):
                self._opened = event
            elif isinstance(event, Summary):
                self._summary = event
            elif isinstance(event, NoRow):
                raise _NotShownError(event.message, BAD_INPUT)
            elif isinstance(event, NotAnswered):
                advice = f" {event.advice}" if event.advice else ""
                raise _NotShownError(f"{event.message}{advice}", BAD_INPUT if event.bad_input else NO)
            if isinstance(event, kind):
                return event
        raise _NotShownError("the look at the data has ended early.", NO)

    def _tell(self, rows: list[RowShown]) -> None:
        opened = self._opened
        say(f"{plain(opened.path, one_line=True)}: {opened.described}")
        for note in (*opened.notes, *self._summary.said):
            say(f"note: {plain(note, one_line=True)}")
        # What must be corrected comes first: it decides the exit code.
        for finding in sorted(opened.findings, key=lambda one: not one["fatal"])[:20]:
            place = f" {finding['field']}" if finding["field"] else ""
            say(f"{'error' if finding['fatal'] else 'note'}: row {finding['row']}{place}: {finding['message']}")
        for row in rows:
            say()
            _tell_row(row)
        say()
        for line in summary_lines(self._summary, width_of_terminal(), blocks=can_encode(sys.stdout)):
            say(line)


def _tell_row(row: RowShown) -> None:
    for one in row.examples:
        part = f", {one.part}" if one.part else ""
        say(f"row {row.number}{part}: {one.length:,} tokens, {one.learnt:,} learnt{_told_of(row, one)}")
        text = marked_text(one, colours=is_rich(sys.stdout))
        print(
            text if can_encode(sys.stdout) else text.replace("▸", ">>").replace("◂", "<<").replace("⏎", "\\n"),
            flush=True,
        )
    if row.left_out:
        say(f"row {row.number} is left out: {row.why}")


def _told_of(row: RowShown, one: ShownExample) -> str:
    said = ["held out"] if row.held_out else []
    if one.kept < one.length:
        said.append(f"the last {one.length - one.kept:,} are cut")
    if len(one.ids) < one.length:
        said.append(f"the first {len(one.ids):,} are shown")
    return "".join(f"; {words}" for words in said)


def marked_text(example: ShownExample, *, colours: bool) -> str:
    """Return an example's text with what is learnt between two arrows, and harmless to a terminal.

    Args:
        example: The example.
        colours: Whether what is learnt, special tokens and what is cut have a colour too.
    """
    learnt = {place for begin, end in example.trained for place in range(begin, min(end, len(example.tokens)))}
    special = set(example.special)
    made = []
    for place, token in enumerate(example.tokens):
        if place == example.kept:
            made.append("\n--- the row is cut here ---\n")
        kept = place < example.kept
        before, after = place in learnt and place - 1 not in learnt, place in learnt and place + 1 not in learnt
        shown = every_character(token).replace("⏎", "⏎\n")
        if colours and shown:
            colour = _LOST if not kept else _LEARNT if place in learnt else _SPECIAL if place in special else ""
            shown = f"{colour}{shown}{_OFF}" if colour else shown
        made.append(f"{'▸' if before else ''}{shown}{'◂' if after else ''}")
    return "".join(made)


def summary_lines(summary: Summary, width: int, *, blocks: bool) -> list[str]:
    """Return what the rows add up to, in lines.

    Args:
        summary: Of all rows.
        width: Columns of the terminal.
        blocks: Whether bars may be made of blocks.
    """
    lines = []
    if summary.lengths:
        spread = ", ".join(f"{key} {value:,.0f}" for key, value in summary.lengths.items())
        lines.append(f"tokens per example: {spread}".replace("total", "in all"))
        most = max(summary.counts, default=0)
        for low, high, count in zip(summary.edges, summary.edges[1:], summary.counts, strict=False):
            if not count:
                continue
            cells = -(-count * min(_BAR_CELLS, width - 30) // max(1, most))
            mark = "  cut" if low > summary.seq_len else ""
            lines.append(f"  {low:>8,} - {high - 1:>8,} {('█' if blocks else '#') * cells} {count:,}{mark}")
    lines.append(
        f"cut at {summary.seq_len:,} tokens: {summary.cut:,} of {summary.made:,} examples; {summary.cut_tokens:,} "
        f"tokens are lost, {summary.cut_learnt:,} of them would be learnt"
        if summary.cut
        else f"cut at {summary.seq_len:,} tokens: none of {summary.made:,} examples"
    )
    if (share := summary.trained_share) is not None and summary.learnt:
        lines.append(
            f"learnt: {share:.1%} of the tokens, {summary.learnt['median']:,.0f} per example (median; "
            f"{summary.learnt['min']:,.0f} to {summary.learnt['max']:,.0f})"
        )
    lines.append(left_out_in_words(summary.left_out) or "no row is left out")
    compared = "" if summary.compared == summary.rows else f" among the first {summary.compared:,}"
    lines.append(f"rows that repeat an earlier one: {summary.repeats:,}, nearly so: {summary.near:,}{compared}")
    for row, other, share in summary.pairs[:5]:
        lines.append(f"  row {row} is as row {other}{'' if share == 1 else f' ({share:.0%} alike)'}")
    held = f", {summary.held_out_examples:,} held out" if summary.held_out_examples else ""
    steps = "1 step" if summary.steps == 1 else f"{summary.steps:,} steps"
    lines.append(f"an epoch: {summary.train_tokens:,} tokens in {steps}{held}")
    return lines


def document_of(opened: Opened, rows: list[RowShown], summary: Summary, *, ok: bool) -> dict[str, Any]:
    """Return the document of `--json`."""
    added = asdict(summary)
    shown = ("seq_len", "examples", "held_out_examples", "made", "lengths", "learnt", "cut", "cut_tokens", "cut_learnt")
    more = ("tokens", "loss_tokens", "left_out", "train_tokens", "steps")
    return {
        "file": opened.path,
        "ok": ok,
        "format": opened.format,
        "template": opened.template,
        "usable_rows": opened.rows,
        "held_out_rows": opened.held_out,
        "rows": [entry for row in rows for entry in _entries(row)],
        "trained_share": summary.trained_share,
        **{key: added[key] for key in (*shown, *more)},
        "histogram": {"edges": list(summary.edges), "counts": list(summary.counts)},
        "duplicates": {
            "exact": summary.repeats,
            "near": summary.near,
            "compared_rows": summary.compared,
            "pairs": [list(pair) for pair in summary.pairs],
        },
        "findings": [dict(one) for one in opened.findings],
        "counts": dict(opened.finding_counts),
        "notes": [*opened.notes, *summary.said],
    }


def _entries(row: RowShown) -> list[dict[str, Any]]:
    told = {
        "row": row.number,
        "held_out": row.held_out,
        "left_out": row.left_out,
        "why": row.why,
        "repeat_of": row.repeat_of,
    }
    if not row.examples:
        return [told | {"part": "", "text": "", "tokens": [], "ids": [], "trained": [], "trained_tokens": []}]
    return [
        told
        | {
            "part": one.part,
            "text": one.text,
            "tokens": list(one.tokens),
            "ids": list(one.ids),
            "trained": [list(pair) for pair in one.trained_text],
            "trained_tokens": [list(pair) for pair in one.trained],
            "special_tokens": list(one.special),
            "length": one.length,
            "kept": one.kept,
            "learnt": one.learnt,
        }
        for one in row.examples
    ]


def _number(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted a whole number above 0")
    return int(text)
