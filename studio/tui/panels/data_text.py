"""The texts of the Data screen: rows as tokens, what they add up to, what is left out; and the worst in a line."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from textwrap import wrap
from typing import TYPE_CHECKING

from textual.content import Content

from studio.core.left_out import reason
from studio.core.recipe import Recipe
from studio.core.text import every_character, plain
from studio.probe.data.lengths import bars_of
from studio.runs.show import Opened, RowShown, ShownExample, Summary
from studio.tui.readable import count
from widgets.token_view import Token

if TYPE_CHECKING:
    from studio.probe.data.sampled import RowsGuess

_MOST_BARS = 12
_NO_CUT = 2**31
_LABEL = 10
_SMALL_SHARE, _MANY_CUT = 0.05, 0.02
EXAMPLE_ROWS = {
    "Conversations": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "Questions and answers": '{"question": "...", "answer": "..."}',
    "Instructions": '{"instruction": "...", "input": "...", "output": "..."}',
    "A better and a worse answer": '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    "Plain text": '{"text": "..."}',
}
"""A row of each kind, as the set-up shows it."""
_Parts = list[str | tuple[str, str]]


def row_tokens(row: RowShown) -> list[Token]:
    """Return what is shown of a row."""
    tokens = [token for example in row.examples for token in _tokens(example, alone=len(row.examples) == 1)]
    if row.left_out:
        tokens.insert(0, Token(f"This row is left out: {plain(row.why, one_line=True)}.", "note"))
    return tokens


def _tokens(example: ShownExample, *, alone: bool) -> Iterator[Token]:
    if not alone:
        yield Token(f"{example.part}: {count(example.length)} tokens, {count(example.learnt)} learnt", "note")
    special = set(example.special)
    learnt = {place for begin, end in example.trained for place in range(begin, min(end, len(example.tokens)))}
    for place, text in enumerate(example.tokens):
        if place == example.kept:
            lost = example.length - example.kept
            yield Token(f"--- cut at {count(example.kept)} tokens; the {count(lost)} below are lost ---", "note")
        look = "special" if place in special else "learnt" if place in learnt else ""
        yield Token(every_character(text), "lost" if place >= example.kept else look, place in learnt)
    if len(example.ids) < example.length:
        yield Token(f"... {count(example.length - len(example.ids))} more tokens are not shown", "note")


def row_head(row: RowShown, only: str, sought: str) -> Content:
    """Return the line above a row: which it is, how long, what is special about it, and which rows are gone through."""
    length, learnt = (sum(getattr(one, name) for one in row.examples) for name in ("length", "learnt"))
    lost = sum(one.length - one.kept for one in row.examples)
    parts: _Parts = [
        (f"row {count(row.number)}", "bold"),
        f"  {count(row.place + 1)} of {count(row.rows)}   ",
        (f"{count(length)} tokens, {count(learnt)} learnt", "bold"),
    ]
    if len(row.examples) > 1:
        parts.append(f" in {len(row.examples)} examples")
    if row.held_out:
        parts.append("   held out")
    if lost:
        parts += ["   ", (f"{count(lost)} cut", "$text-warning")]
    if row.left_out:
        parts += ["   ", ("left out", "$text-error")]
    if row.repeat_of:
        parts += ["   ", (f"says what row {row.repeat_of} says", "$text-warning")]
    if only != "all" or sought:
        says = f" with '{plain(sought, one_line=True, limit=20)}'" if sought else ""
        which = {"all": "rows", "repeats": "rows that repeat others"}.get(only, f"{only} rows")
        parts += ["   ", (f"only {which}{says}", "reverse")]
    return Content.assemble(*parts)


def facts_text(opened: Opened, summary: Summary, cells: int) -> Content:
    """Return what the rows add up to.

    Args:
        opened: The file.
        summary: As far as its rows were added up.
        cells: Room for a line.
    """
    parts: _Parts = []
    if not summary.whole:
        parts.append((f"{count(summary.done)} of {count(summary.rows)} rows added up so far\n\n", "$text-warning"))
    parts += _added_up(opened, summary, cells)
    notes = [*opened.notes, *summary.said]
    if notes:
        parts.append(("\nTo know\n", "bold"))
        parts += [f"- {plain(note, one_line=True)}\n" for note in notes]
    return Content.assemble(*parts)


def glance_text(opened: Opened, summary: Summary, cells: int) -> Content:
    """Return the same without the notes; arguments as there."""
    return Content.assemble(*_added_up(opened, summary, cells))


def guess_text(guess: "RowsGuess", recipe: Recipe, cells: int) -> Content:
    """Return what the beginning of the data tells before its rows are read: from its characters, by no tokenizer."""
    least, usual, most = (
        [guess_row.tokens_per_row(_NO_CUT)[place] for guess_row in _rows_of(guess)] for place in range(3)
    )
    edges, counts = bars_of(usual, _MOST_BARS // 2)
    longest = f"{count(round(max(least)))} to {count(round(max(most)))} tokens, by the characters"
    cut = sum(tokens > recipe.train.seq_len for tokens in usual)
    cut_words = f"about {cut / len(usual):.0%} of the rows" if cut else "none"
    facts = {
        "rows": f"about {count(guess.rows)}",
        "longest": longest,
        "cut at": f"{count(recipe.train.seq_len)} tokens: {cut_words}",
        "held out": f"{count(recipe.eval.rows)} rows" if recipe.eval.rows else "none",
    }
    parts: _Parts = []
    for label, words in facts.items():
        parts += [
            (f"{label:{_LABEL}}", "dim"),
            f"\n{'':{_LABEL}}".join(wrap(words, max(_LABEL, cells - _LABEL - 1))),
            "\n",
        ]
    seen = Summary(seq_len=recipe.train.seq_len, edges=edges, counts=counts)
    return Content.assemble(*parts, "\n", *_histogram(seen, cells, "Tokens of the first rows, by their characters"))


def readable_text() -> Content:
    """Return which files and which columns are read, for somebody who brings data of their own."""
    files = "JSON Lines, JSON, CSV, Parquet, Arrow and text, packed or not; a folder of them; a data set of the hub"
    parts: _Parts = [("What can be read\n", "bold"), f"{files}\n"]
    for kind, row in EXAMPLE_ROWS.items():
        parts += [(f"\n{kind}\n", "$text-primary"), (f"{row}\n", "dim")]
    return Content.assemble(*parts, "\nWhere columns have other names, the next question is which is which.")


def bars_text(edges: tuple[int, ...], counts: tuple[int, ...], cells: int, title: str) -> Content:
    """Return a bar for each range of lengths, as `studio.probe.data.lengths.bars_of` makes them."""
    return Content.assemble(*_histogram(Summary(seq_len=_NO_CUT, edges=edges, counts=counts), cells, title))


def _rows_of(guess: "RowsGuess") -> Iterator["RowsGuess"]:
    """Yield each row that was read as if it were all there is."""
    return (replace(guess, text_bytes=(size,), asked_bytes=()) for size in guess.text_bytes)


def _added_up(opened: Opened, summary: Summary, cells: int) -> _Parts:
    parts: _Parts = []
    for label, words, style in _facts(opened, summary):
        together = words.replace(" %", "\N{NO-BREAK SPACE}%")  # a number and its sign stay on one line
        lines = wrap(together, max(_LABEL, cells - _LABEL - 1))
        parts += [(f"{label:{_LABEL}}", "dim"), (f"\n{'':{_LABEL}}".join(lines), style), "\n"]
    return [*parts, "\n", *_histogram(summary, cells)]


def _facts(opened: Opened, summary: Summary) -> Iterator[tuple[str, str, str]]:
    """Yield label, words and style of each fact."""
    if summary.lengths:
        least, middle, most = (count(summary.lengths[key]) for key in ("min", "median", "max"))
        p95 = count(summary.lengths["p95"])
        yield "length", f"{least} to {most} tokens; half up to {middle}, 95 % up to {p95}", ""
    cut = f"{count(summary.cut)} of {count(summary.made)} examples"
    if summary.cut:
        share = summary.cut_tokens / max(1.0, (summary.lengths or {}).get("total", 1.0))
        lost = f"{count(summary.cut_tokens)} tokens lost ({share:.1%}), {count(summary.cut_learnt)} of them learnt ones"
        yield "cut", f"{cut} at {count(summary.seq_len)}: {lost}", "$text-warning"
    else:
        yield "cut", f"none of {count(summary.made)} examples at {count(summary.seq_len)}", ""
    if summary.learnt and summary.trained_share is not None:
        low, high = (count(summary.learnt[key]) for key in ("min", "max"))
        middle = count(summary.learnt["median"])
        low_share = summary.trained_share < _SMALL_SHARE
        words = f"{summary.trained_share:.0%} of the tokens; {middle} per example ({low} to {high})"
        yield "learnt", words, "$text-warning" if low_share else ""
    left = sum(summary.left_out.values())
    yield "left out", f"{count(left)} rows" if left else "none", "$text-warning" if left else ""
    compared = "" if summary.compared >= summary.done else f" (of the first {count(summary.compared)})"
    repeats = f"{count(summary.repeats)} rows say what another says, {count(summary.near)} nearly{compared}"
    yield "repeats", repeats if summary.repeats or summary.near else "none", ""
    yield "held out", f"{count(opened.held_out)} rows" if opened.held_out else "none", ""
    yield "an epoch", f"{count(summary.train_tokens)} tokens in {_steps(summary.steps)}", ""


def _histogram(summary: Summary, cells: int, title: str = "Tokens per example") -> _Parts:
    bars = _joined(summary)
    if not bars:
        return []
    most, room = max(number for _, _, number in bars), max(4, cells - 30)
    parts: _Parts = [(f"{title}\n", "bold")]
    cut_told = False
    for low, high, number in bars:
        cut = low > summary.seq_len
        if cut and not cut_told:
            parts.append((f"{'':8}--- cut at {count(summary.seq_len)} ---\n", "$text-warning"))
            cut_told = True
        if not number:
            continue
        width = -(-number * room // most)
        parts += [
            (f"{count(low):>7} - {count(high - 1):>7} ", "dim"),
            ("█" * width, "$text-error" if cut else "$text-primary"),
        ]
        parts.append(f" {count(number)}\n")
    return parts


def _joined(summary: Summary) -> list[tuple[int, int, int]]:
    """Return (low, high, examples) of fewer bars; none goes across the row length."""
    edges = summary.edges
    groups = -(-len(summary.counts) // _MOST_BARS) if summary.counts else 1
    made: list[tuple[int, int, int]] = []
    for low, high, number in zip(edges, edges[1:], summary.counts, strict=False):
        full = not made or (made[-1][1] - made[-1][0]) >= groups * (edges[1] - edges[0])
        if full or low == summary.seq_len + 1:
            made.append((low, high, number))
        else:
            made[-1] = made[-1][0], high, made[-1][2] + number
    return made


def left_out_text(opened: Opened, summary: Summary) -> Content:
    """Return which rows are left out and why, and what else was found in rows."""
    parts: _Parts = [("Left out\n", "bold")]
    for kind, number in summary.left_out.items():
        parts.append(f"  {count(number)} {plain(reason(kind), one_line=True)}\n")
    if not summary.left_out:
        parts.append("  none\n")
    if summary.left_out.keys() - opened.left_out.keys():
        parts.append(("  f until it says 'left out', then n, goes through those that became no example\n", "dim"))
    if opened.findings:
        parts.append(("\nRow by row\n", "bold"))
    for one in opened.findings:
        out = one["kind"] in opened.left_out
        style = "$text-error" if one["fatal"] else "$text-warning" if out else ""
        place = f" {one['field']}" if one["field"] else ""
        head = "to correct" if one["fatal"] else "left out" if out else "note"
        parts += [(f"  {head:11}", style), f"row {one['row']}{plain(place, one_line=True)}: "]
        parts.append(f"{plain(one['message'], one_line=True)}\n")
    more = sum(opened.finding_counts.values()) - len(opened.findings)
    if more > 0:
        parts.append((f"  ... {count(more)} more\n", "dim"))
    return Content.assemble(*parts)


def repeats_text(summary: Summary) -> Content:
    """Return which rows say what an earlier one says."""
    if not summary.pairs:
        return Content("No row says what another one says, as far as they were compared.")
    parts: _Parts = [("Rows that say what an earlier one says\n", "bold")]
    for row, other, share in summary.pairs:
        alike = "the same" if share >= 1 else f"{share:.0%} alike"
        parts.append(f"  row {count(row):>7}   row {count(other):>7}   {alike}\n")
    more = summary.repeats + summary.near - len(summary.pairs)
    if more > 0:
        parts.append((f"  ... {count(more)} more\n", "dim"))
    parts.append(
        ("\nLetter case and white space do not count; alike is the share of runs of three words in both.", "dim")
    )
    return Content.assemble(*parts)


def worst_line(opened: Opened, summary: Summary) -> Content:
    """Return the findings that matter most, the worst first, in one line."""
    found: list[tuple[str, str]] = []
    fatal = sum(one["fatal"] for one in opened.findings)
    if fatal:
        found.append(("rows must be corrected before it can be trained on", "$text-error"))
    left = sum(summary.left_out.values())
    if left:
        share = left / max(1, opened.rows + sum(opened.left_out.values()))
        found.append(
            (f"{count(left)} left out ({share:.0%})", "$text-error" if share > _SMALL_SHARE else "$text-warning")
        )
    if summary.cut:
        many = summary.cut > _MANY_CUT * summary.made
        found.append((f"{count(summary.cut)} cut at {count(summary.seq_len)}", "$text-warning" if many else ""))
    if summary.trained_share is not None:
        small = summary.trained_share < _SMALL_SHARE
        found.append((f"{summary.trained_share:.0%} learnt", "$text-warning" if small else ""))
    if repeats := summary.repeats + summary.near:
        found.append(("1 repeat" if repeats == 1 else f"{count(repeats)} repeats", ""))
    if summary.steps:
        found.append((f"{_steps(summary.steps)} an epoch", ""))
    if not summary.whole:
        found.append((f"of {count(summary.done)} rows so far", "dim"))
    return _separated(found)


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{count(number)} steps"


def _separated(found: Sequence[tuple[str, str]]) -> Content:
    parts: _Parts = []
    for place, (words, style) in enumerate(found):
        parts += [" · " if place else "", (words, style)]
    return Content.assemble(*parts)
