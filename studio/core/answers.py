"""Scores answers to held-out prompts by rules that anyone can repeat; no model judges another.

An answer is compared with the one that the data has for the same prompt.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.core.errors import BadInput
from studio.core.intervals import Interval, paired_interval, ratio_interval, share_interval
from studio.core.text import plain

_WORD = re.compile(r"\w+")
_END = " \t\n.!"
_ANSWER_CHARACTERS = 20_000
"""A longer answer is cut before a user's pattern is applied, since a pattern's time may grow fast with the text."""

_LEAST_APART = 6
"""With fewer prompts than these, one of two equal models may win on every prompt by chance: five coins all fall on the
same side once in sixteen times."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: Its text, without special tokens.
        tokens: How many tokens it wrote.
        stopped: Whether it ended by itself, and not at the limit of tokens.
    """

    text: str
    tokens: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class Check:
    """A rule.

    Attributes:
        name: A short name, for tables.
        how: What is compared, in words.
        score: Returns 0 to 1 for an answer and the held-out one.
    """

    name: str
    how: str
    score: Callable[[Answer, str], float]


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one model's answers under one rule, with 95 % intervals over prompts.

    Attributes:
        mean: The mean of all answers.
        more: The mean minus the reference's, prompt by prompt.
    """

    mean: Interval
    more: Interval


def normalised(text: str) -> str:
    """Return a text as it is compared: NFKC, small letters, single spaces, no full stop or white space at its ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_END)


def checks_for(expected: Sequence[str], pattern: str = "") -> list[Check]:
    """Return the rules that held-out answers allow.

    Args:
        expected: The held-out answers; empty where the data has none, as plain text.
        pattern: A regular expression of the user; empty for none.

    Raises:
        BadInput: The pattern is no regular expression.
    """
    found = [Check("ends by itself", "the answer ends with a stop token, not at the token limit", _stopped)]
    if expected:
        found += [
            Check(
                "exact match", "equal after NFKC, in small letters, with single spaces, no full stop at the end", _same
            ),
            Check("word F1", "words shared with the held-out answer, F1 as SQuAD has it, punctuation left out", _f1),
        ]
    if expected and all(_as_json(text) is not None for text in expected):
        found += [
            Check("valid JSON", "the whole answer is one JSON object or list", _is_json),
            Check("same keys", "and has the held-out answer's keys, at every depth", _same_keys),
            Check("same JSON", "and the same values, in any order of keys", _same_json),
        ]
    return [*found, *([_matches(pattern)] if pattern else [])]


def score_answers(
    check: Check, answers: Mapping[str, Sequence[Answer]], expected: Sequence[str], reference: str
) -> dict[str, Score]:
    """Return the scores of all models' answers under a rule.

    Args:
        check: The rule.
        answers: Each model's answers, in the order of the prompts.
        expected: The held-out answers.
        reference: The model that the others are compared with.

    Raises:
        ValueError: There is no answer, or they are not of the same prompts.
    """
    points = {
        name: [check.score(answer, wanted) for answer, wanted in zip(given, expected, strict=True)]
        for name, given in answers.items()
    }
    return score_points(points, reference)


def score_points(points: Mapping[str, Sequence[float]], reference: str) -> dict[str, Score]:
    """Return the scores of all models from their points, one for each prompt in the same order.

    Points that are all 0 or 1 are taken as shares, others as means.

    Raises:
        ValueError: There is no point, or the prompts are not the same.
    """
    hits = all(point in (0, 1) for own in points.values() for point in own)
    return {name: (_shares if hits else _means)(own, points[reference]) for name, own in points.items()}


def _shares(own: Sequence[float], other: Sequence[float]) -> Score:
    mine, its = [point == 1 for point in own], [point == 1 for point in other]
    return Score(share_interval(mine), paired_interval(mine, its))


def _means(own: Sequence[float], other: Sequence[float]) -> Score:
    ones, apart = [1.0] * len(own), [a - b for a, b in zip(own, other, strict=True)]
    more = ratio_interval(apart, ones)
    if more.low is not None and more.high is not None and sum(map(bool, apart)) < _LEAST_APART:
        more = Interval(more.value, min(more.low, 0.0), max(more.high, 0.0))
    return Score(ratio_interval(own, ones), more)


def _stopped(answer: Answer, expected: str) -> float:
    return float(answer.stopped)


def _same(answer: Answer, expected: str) -> float:
    return float(normalised(answer.text) == normalised(expected))


def _f1(answer: Answer, expected: str) -> float:
    """Return the harmonic mean of precision and recall of words (Rajpurkar et al. 2016), articles not left out."""
    own, wanted = (Counter(_WORD.findall(normalised(text))) for text in (answer.text, expected))
    if not own or not wanted:
        return float(own == wanted)
    return 2 * (own & wanted).total() / (own.total() + wanted.total())


def _is_json(answer: Answer, expected: str) -> float:
    return float(_as_json(answer.text) is not None)


def _same_keys(answer: Answer, expected: str) -> float:
    own = _as_json(answer.text)
    return float(own is not None and _shape(own) == _shape(_as_json(expected)))


def _same_json(answer: Answer, expected: str) -> float:
    return float(_as_json(answer.text) == _as_json(expected))


def _as_json(text: str) -> Any:
    """Return the object or list that a text is; None where it is none: a bare word or number proves no form."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _shape(value: Any) -> Hashable:
    """Return the keys of a value at every depth; of a list the kinds of its items, however many there are."""
    if isinstance(value, dict):
        return frozenset((key, _shape(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return ("list", frozenset(_shape(inner) for inner in value))
    return None


def _matches(pattern: str) -> Check:
    shown = plain(pattern, one_line=True, limit=60)
    try:
        wanted = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadInput(f"check-regex: {shown} is no regular expression: {error}.") from None

    def has(answer: Answer, expected: str) -> float:
        return float(wanted.search(answer.text[:_ANSWER_CHARACTERS]) is not None)

    def agrees(answer: Answer, expected: str) -> float:
        mine, its = (wanted.search(text[:_ANSWER_CHARACTERS]) for text in (answer.text, expected))
        return float(mine is not None and its is not None and normalised(mine[1] or "") == normalised(its[1] or ""))

    if wanted.groups:
        return Check("regex agrees", f"what the first group of {shown} finds is that of the held-out answer", agrees)
    return Check("regex", f"{shown} is found in the answer", has)
