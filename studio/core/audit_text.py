"""An audit's report as tables and words: the same for command line, screen and exported page.

Reads the report's plain values (`report.json`). Names of models, runs and files in it came from outside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from studio.core.answer_text import answer_lines, answer_markdown, answer_table, answers_of, prompts_in_words
from studio.core.audit_cells import Table, joined, markdown_table, word
from studio.core.audit_tables import block_table, lane_table, plan_table, task_table, use_table, variant_table
from studio.core.text import plain

DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""What the functions here raise for a report that another version wrote, or that was changed."""
_LONGEST_NOTE = 500


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
    """Return what the report advises, why, and how sure that is."""
    advice = report["recommendation"]
    return [advice["sentence"], f"Why: {advice['reason']}", f"Rests on {advice['certainty']}."]


def tables_of(report: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Return all tables of a report with their headings, those that it has."""
    if report["what"] == "race":
        found = [("Side by side", lane_table(report))]
    elif report["what"] == "base":
        found = [
            ("Roundings of the base, measured", variant_table(report)),
            (f"Blocks that {report['asked']} hurts most, measured", block_table(report)),
            ("Mixed plans, measured", plan_table(report)),
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
    lines = _row_lines(report)
    lines += [plain(text, one_line=True, limit=_LONGEST_NOTE) for text in (forgetting, report.get("gguf_note")) if text]
    return lines + answer_lines(report) + _task_lines(report)


def rows_of(report: Mapping[str, Any]) -> dict[str, int | None]:
    """Return how many rows of data a report rests on, and how many there are that were not trained on.

    Of a run the first is never more than the second. The second is None for a base, which nothing was trained on here.
    """
    return {"rows": report["rows"]["task"], "held_out_rows": report.get("held_out_rows")}


def _rows_word(report: Mapping[str, Any]) -> str:
    """Only what a run did not train on is held out; with a base nothing was."""
    return "rows" if report.get("what") == "base" else "held-out rows"


def _row_lines(report: Mapping[str, Any]) -> list[str]:
    """Return which rows were measured, and what is not known of models that no record says anything of."""
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


def _task_lines(report: Mapping[str, Any]) -> list[str]:
    tasks = report.get("lm_eval") or {}
    if why_not := tasks.get("why_not"):
        return [f"No tasks of lm-eval: {word(why_not)}"]
    left_out = [form for form in tasks.get("forms", ()) if form["why_not"]]
    lines = [f"lm-eval left out {form['name']}: {word(form['why_not'])}." for form in left_out]
    if tasks:
        lines.append(f"lm-eval {word(tasks['version'])}, without a chat template, each task's own number of shots.")
    return lines


def markdown_of(report: Mapping[str, Any], pictures: Sequence[tuple[str, str]] = (), *, texts: bool = True) -> str:
    """Return the report as a Markdown page.

    Args:
        report: Its plain values.
        pictures: Files beside the page, each with what it shows.
        texts: Whether prompts and answers are quoted: rows of the user's data, which are nobody else's business.
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
