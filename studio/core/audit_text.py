"""An audit's report as tables and words: the same for command line, screen and exported page.

Reads the report's plain values (`report.json`). Names of models, runs and files, prompts and answers in it came from
outside: whoever shows such a text must first make it harmless. The cells and lines that functions here return are so
already.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.core.audit_tables import (
    Table,
    answer_table,
    answers_of,
    block_table,
    joined,
    lane_table,
    markdown_table,
    plan_table,
    prompts_in_words,
    proposal_table,
    task_table,
    use_table,
    variant_table,
    word,
)
from studio.core.evidence import LEAST_ROWS
from studio.core.intervals import Interval
from studio.core.text import plain

DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What the functions here raise for a report that another version wrote, or that was changed."""
_LONGEST_NOTE = 500
_MOST_OF_IT = 0.9
"""Of what 4 bits cost: what the proposal that a report spells out takes away at least."""
_LONGEST_SHOWN = 2000


def title_of(report: Mapping[str, Any]) -> str:
    """Return what was audited, in a line."""
    what, tokens = report.get("what"), tokens_of(report)
    rests = f"{tokens['task']:,} tokens of {report['rows']['task']} {_rows_word(report)}"
    if what == "race":
        return f"race of {word(report['recipe'])} on {word(report['model'])}: {rests}"
    if what == "run":
        return f"run {word(report['run'])} on {word(report['model'])}: {rests}"
    return f"base {word(report['model'])}: {rests}"


def tokens_of(report: Mapping[str, Any]) -> dict[str, int]:
    """Return how many tokens the figures rest on, for the task and for the neutral text."""
    one = report["lanes" if report.get("what") == "race" else "variants"][0]
    return {part: int((one.get(part) or {}).get("tokens", 0)) for part in ("task", "neutral")}


def advice_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what the report advises, why, how sure that is, and what to try after a run that did not beat its base."""
    advice = report["recommendation"]
    lines = [advice["sentence"], f"Why: {advice['reason']}", f"Rests on {advice['certainty']}."]
    return lines + [f"Try next: {plain(one['words'], one_line=True)}." for one in report.get("next") or ()]


def tables_of(report: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Return all tables of a report with their headings, those that it has."""
    if report["what"] == "race":
        found = [("Side by side", lane_table(report))]
    elif report["what"] == "base":
        found = [
            ("Roundings of the base, measured", variant_table(report)),
            (f"Blocks that {report['asked']} hurts most, measured", block_table(report)),
            ("Mixed plans, measured", plan_table(report)),
            ("Where a GiB buys the most, estimated from the effects above", proposal_table(report)),
        ]
    else:
        prompts = answers_of(report).get("prompts", 0)
        found = [
            ("Forms of the trained model: what they know, measured", variant_table(report)),
            ("What they take and what they are for", use_table(report)),
            (f"Answers to {prompts_in_words(prompts, 'held-out')}, measured", answer_table(report)),
            ("Tasks of lm-eval, measured", task_table(report)),
            ("Rounding beside adapter, relative to the weights, measured", block_table(report)),
        ]
    return [(heading, table) for heading, table in found if table]


def note_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what the tables leave unsaid: what was forgotten, what answers show, what could not be measured."""
    forgetting = (report.get("forgetting") or {}).get("verdict")
    lines = [*_row_lines(report), *_proposal_lines(report)]
    lines += [plain(text, one_line=True, limit=_LONGEST_NOTE) for text in (forgetting, report.get("gguf_note")) if text]
    return lines + answer_lines(report) + _task_lines(report)


def rows_of(report: Mapping[str, Any]) -> dict[str, int | None]:
    """Return how many rows of data a report rests on, and how many there are that were not trained on.

    Of a run the first is never more than the second. The second is None for a base, which nothing was trained on here.
    """
    return {"rows": report["rows"]["task"], "held_out_rows": report.get("held_out_rows")}


@dataclass(frozen=True, slots=True)
class Shown:
    """A prompt and what is said to it.

    Attributes:
        prompt: Harmless, with its line breaks.
        said: For each answer who gave it, its text, and how it fares under the rules; the held-out answer first.
    """

    prompt: str
    said: tuple[tuple[str, str, str], ...]


def answer_lines(report: Mapping[str, Any]) -> list[str]:
    """Return in words what the answers show, what each rule compares, and which forms gave no answers."""
    if why_not := (report.get("answers") or {}).get("why_not"):
        return [f"No answers: {word(why_not)}"]
    answers = answers_of(report)
    if not answers:
        return []
    against, names = answers["reference"], list(answers["rows"][0]["answers"])
    lines = [_verdict(name, answers) for name in names if name != against]
    lines += [
        f"{form['name']} gave no answers: {word(form['why_not'])}." for form in answers["forms"] if form["why_not"]
    ]
    was_trained = (
        "the model as it was trained"
        if against == answers["trained"]
        else "the reference, as the trained model gave no answers"
    )
    asked = prompts_in_words(answers["prompts"], "held-out")
    lines.append(
        f"{asked}, answered greedily in {answers['dtype']} on {answers['device']}, at "
        f"most {answers['new_tokens']} tokens each; {against} is {was_trained}."
    )
    if answers["prompts"] < LEAST_ROWS:
        verb = "is" if answers["prompts"] == 1 else "are"
        too_few = f"{prompts_in_words(answers['prompts'])} {verb} too few to tell forms apart"
        lines.append(f"{too_few} ({LEAST_ROWS} would do): read the answers.")
    return lines + [f"{check['name']}: {word(check['how'])}." for check in answers["checks"]]


def shown_answers(report: Mapping[str, Any]) -> Iterator[Shown]:
    """Yield every prompt with what each form says to it."""
    answers = answers_of(report)
    checks = [check["name"] for check in answers.get("checks") or ()]
    for row in answers.get("rows") or ():
        said = [("held-out answer", _text(row["expected"]), "")]
        said += [
            (name, _text(given["text"]), ", ".join(_mark(given["scores"][check], check) for check in checks))
            for name, given in row["answers"].items()
        ]
        yield Shown(_text(row["prompt"]), tuple(said))


def answer_markdown(report: Mapping[str, Any]) -> list[str]:
    """Return the prompts and answers as lines of Markdown."""
    lines: list[str] = []
    for place, one in enumerate(shown_answers(report), start=1):
        lines += [f"### Prompt {place}", "", *_quoted(one.prompt), ""]
        for who, text, marks in one.said:
            lines += [f"**{plain(who, one_line=True)}**{f' ({marks})' if marks else ''}", "", *_quoted(text), ""]
    return lines


def markdown_of(report: Mapping[str, Any], pictures: Sequence[tuple[str, str]] = (), *, texts: bool = True) -> str:
    """Return the report as a Markdown page.

    Args:
        report: Its plain values.
        pictures: Files beside the page, each with what it shows.
        texts: Whether prompts and answers are quoted. They are rows of the user's data: a page for others omits
            them.
    """
    tokens = tokens_of(report)
    lines = [f"# Audit: {title_of(report)}", "", *advice_lines(report), ""]
    for heading, table in tables_of(report):
        lines += [f"## {heading}", "", *markdown_table(table), ""]
    if notes := note_lines(report):
        lines += ["## Notes", "", *(f"- {line}" for line in notes), ""]
    for what, file in pictures:
        lines += [f"![{what}]({file})", ""]
    lines += [
        f"Losses and KL in nats per token. Task: {tokens['task']:,} tokens of {report['rows']['task']} "
        f"{_rows_word(report)}; neutral: {tokens['neutral']:,} tokens of {report['rows']['neutral']} passages. "
        "Intervals: 95 %, bootstrap over rows. Arithmetic in fp32, weights rounded by bitsandbytes.",
        "",
    ]
    if texts and (answers := answer_markdown(report)):
        lines += ["## Answers side by side", "", *answers]
    return "\n".join(lines)


def _rows_word(report: Mapping[str, Any]) -> str:
    """Return what the measured rows are called: held-out ones exist only where something was trained here."""
    return "rows" if report.get("what") == "base" else "held-out rows"


def _row_lines(report: Mapping[str, Any]) -> list[str]:
    """Return which rows were measured, and for which models it is not known whether they were trained on them."""
    said = [f"Measured on {report['rows_from']}."] if report.get("rows_from") else []
    said += [f"{note.rstrip('.')}." for note in report.get("rows_notes") or ()]
    if report.get("what") == "base":
        said.append(f"Whether {word(report['model'])} was trained on these rows before is not known.")
    if others := report.get("unknown"):
        named = joined([word(name) for name in others])
        said.append(
            f"Whether what was named ({named}) was trained on these rows is not known: only runs have a record."
        )
    return [plain(line, one_line=True, limit=_LONGEST_NOTE) for line in said]


def _proposal_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the line that puts the best proposal into a recipe."""
    proposed = report.get("proposals") or ()
    if not proposed:
        return []
    best = next((one for one in proposed if one["buys"] >= _MOST_OF_IT), proposed[-1])
    table = ", ".join(f'"{plain(name, one_line=True)}" = "{word(bits)}"' for name, bits in best["precision"].items())
    return [
        f"To take away {best['buys']:.1%} of what 4 bits cost, by this estimate, write below [model] in the recipe: "
        f"precision = {{ {table} }}",
        "The estimate adds up the squares of the blocks' effects; a mixed plan that was measured counts for more.",
    ]


def _task_lines(report: Mapping[str, Any]) -> list[str]:
    tasks = report.get("lm_eval") or {}
    if why_not := tasks.get("why_not"):
        return [f"No tasks of lm-eval: {word(why_not)}"]
    left_out = [form for form in tasks.get("forms", ()) if form["why_not"]]
    lines = [f"lm-eval left out {form['name']}: {word(form['why_not'])}." for form in left_out]
    if tasks:
        lines.append(f"lm-eval {word(tasks['version'])}, without a chat template, each task's own number of shots.")
    return lines


def _verdict(name: str, answers: Mapping[str, Any]) -> str:
    against = answers["reference"]
    signs = {check["name"]: Interval(**check["scores"][name]["more"]).sign for check in answers["checks"]}
    words = [
        f"{side} in {joined(found)}"
        for side, wanted in (("higher", 1), ("lower", -1))
        if (found := [check for check, sign in signs.items() if sign == wanted])
    ]
    return f"{name} against {against}: {joined(words) if words else 'no difference seen under any rule'}."


def _mark(score: float, check: str) -> str:
    shown = "yes" if score == 1 else "no" if score == 0 else f"{score:.2f}"
    return f"{check}: {shown}"


def _text(text: object) -> str:
    return plain(str(text), limit=_LONGEST_SHOWN)


def _quoted(text: str) -> list[str]:
    """Return a text as a block that no Markdown in it can leave: indented by four, it is code."""
    return [f"    {line}" for line in text.split("\n")]
