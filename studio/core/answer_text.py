"""Answers of an audit as tables and words: how they fare under each rule, and the texts themselves.

Prompts and answers came from data and models: whoever shows a text makes it harmless; cells and lines are so already.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from studio.core.audit_cells import Table, joined, share, share_difference, word
from studio.core.evidence import LEAST_ROWS
from studio.core.intervals import Interval
from studio.core.text import plain

_LONGEST_SHOWN = 2000


@dataclass(frozen=True, slots=True)
class Shown:
    """A prompt and what is said to it.

    Attributes:
        prompt: Harmless, with its line breaks.
        said: Who, what, and how it fares, the held-out answer first.
    """

    prompt: str
    said: tuple[tuple[str, str, str], ...]


def answers_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a report's answers; empty where it has none."""
    found = report.get("answers") or {}
    return {} if found.get("why_not") else found


def answer_table(report: Mapping[str, Any]) -> Table:
    """Return how every form fares under every rule; nothing where nobody answered."""
    answers = answers_of(report)
    if not answers:
        return []
    against = answers["reference"]
    names = list(answers["rows"][0]["answers"])
    rows = [["", *names]]
    for check in answers["checks"]:
        scores = check["scores"]
        rows.append([check["name"], *(share(scores[name]["mean"]) for name in names)])
        more = ("-" if name == against else share_difference(scores[name]["more"]) for name in names)
        rows.append([f"  against {against}", *more])
    return rows


def answer_lines(report: Mapping[str, Any]) -> list[str]:
    """Return in words what the answers show, what each rule compares, and who gave none."""
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
        "the model as it was trained" if against == answers["trained"] else "compared with, the trained gave none"
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


def prompts_in_words(count: int, kind: str = "") -> str:
    """Return how many prompts, such as `1 prompt` or `20 held-out prompts`."""
    return f"{count}{kind and ' '}{kind} prompt{'' if count == 1 else 's'}"


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
