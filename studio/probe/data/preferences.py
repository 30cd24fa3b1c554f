r"""Rows of two answers of which one is preferred, as TRL, LLaMA-Factory, ms-swift, OpenAI and axolotl write them.

prompt, chosen, rejected                        texts, or lists of messages (TRL)
chosen, rejected                                lists of messages that begin alike, or texts that do (TRL)
question or instruction (and input), ...        the prompt under other names, with system and history
conversations or messages, chosen, rejected     the turns before (LLaMA-Factory, axolotl)
messages, rejected_response or rejected_messages            the preferred answer ends the messages (ms-swift)
input, preferred_output, non_preferred_output               OpenAI
chosen, rejected with "\n\nHuman: ..." in them              Anthropic's hh-rlhf
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from studio.probe.data.beside import BESIDE_COLUMNS, context_of, history_of, system_of
from studio.probe.data.findings import Findings, filled, json_kind
from studio.probe.data.raw_row import RawRow, Shape
from studio.probe.data.reading import Reading
from studio.probe.data.rows import Message, Preference
from studio.probe.data.turns import ROLES, SPEAKERS, turns_of

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "problem", "input")
TURN_COLUMNS = ("messages", "conversations", "conversation")
PAIRS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
)
"""Columns of the preferred answer and of the other; where messages are the first, they end with the preferred one."""
PAIR_COLUMNS = tuple(dict.fromkeys(column for pair in PAIRS for column in pair if column not in TURN_COLUMNS))
_OPTIONAL = (*TURN_COLUMNS, *PROMPT_COLUMNS, *BESIDE_COLUMNS)
_MARKS = frozenset(rejected for _, rejected in PAIRS)
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
_NO_PROMPT = (
    "found two answers and no prompt; wanted a column prompt, or messages or texts that begin alike, up to where the "
    "answers part"
)


def pair_shape(value: Mapping[str, Any]) -> Shape | None:
    """Return how a row of two answers is written; None for any other row."""
    if _MARKS.isdisjoint(value):
        return None
    pair = next((pair for pair in PAIRS if all(filled(value.get(column)) for column in pair)), None)
    if pair is None:
        return None
    text = isinstance(value[pair[0]], str) and not _SPEAKER.match(value[pair[0]])
    if not text or any(filled(value.get(column)) for column in TURN_COLUMNS):
        made_of = "chat"
    else:
        made_of = "alpaca" if filled(value.get("instruction")) else "prompt_completion"
    return Shape(made_of, read_pair, pair, _OPTIONAL)


def prompt_column(value: Mapping[str, Any], shape: Shape) -> str:
    """Return the column that holds what both answers of a row were asked; empty where it stands in them or nowhere."""
    first = value[shape.needed[0]]
    begun = isinstance(first, list) and first and isinstance(first[0], dict)
    if shape.needed[0] in TURN_COLUMNS or (begun and not _answers(first[0])):
        return ""
    return next((column for column in (*TURN_COLUMNS, *PROMPT_COLUMNS) if filled(value.get(column))), "")


def _answers(turn: Mapping[str, Any]) -> bool:
    return any(ROLES.get(str(turn.get(key))) == "assistant" for key in SPEAKERS)


def refuse_pair(number: int, findings: Findings, shape: Shape, how: Reading) -> None:
    """Refuse a row of two answers where answers alone are learnt."""
    findings.add(
        "preference_pair",
        number,
        "found a preferred and a rejected answer; wanted one answer. Learn the preference with train.objective = "
        '"dpo", or, to learn the preferred answers alone, write prompt and chosen as prompt and completion',
        field=how.in_file(", ".join(shape.needed)),
    )


def read_pair(row: RawRow) -> Preference:
    """Return a row's shared turns and its two answers.

    Raises:
        Unusable: Something in it is missing or wrong.
    """
    good, bad = row.shape.needed
    before = [*system_of(row), *history_of(row)]
    if good == "messages":
        turns = turns_of(row.value[good], good, row)
        last = len(turns) - next(
            (place for place, turn in enumerate(reversed(turns)) if turn.role != "assistant"), len(turns)
        )
        asked, chosen = turns[:last], turns[last:]
        if bad == "rejected_messages":
            other = turns_of(row.value[bad], bad, row)
            asked, chosen, rejected = _parted(turns, other)
        else:
            rejected = _side(row.value[bad], bad, row, asked)
    else:
        asked = _asked(row)
        chosen, rejected = _side(row.value[good], good, row, asked), _side(row.value[bad], bad, row, asked)
        whole = chosen
        begun, chosen, rejected = _parted(chosen, rejected)
        if not asked and not begun:
            asked, chosen, rejected = _parted_texts(chosen, rejected, row)
        elif begun and _begins(whole, asked):  # the prompt stands in both answers again, as in UltraFeedback
            system = asked[:1] if asked and asked[0].role == "system" and begun[0].role != "system" else []
            asked = [*system, *begun]
        else:
            asked = [*asked, *begun]
    if asked and asked[0].role == "system":
        before = [turn for turn in before if turn.role != "system"]
        asked, before = asked[1:], [asked[0], *before]
    asked = [*before, *asked]
    return _checked(asked, chosen, rejected, row)


def _asked(row: RawRow) -> list[Message]:
    """Return the turns of the columns before the answers."""
    for column in TURN_COLUMNS:
        if filled(row.value.get(column)):
            return turns_of(row.value[column], column, row)
    column = next((name for name in PROMPT_COLUMNS if filled(row.value.get(name))), "")
    if not column:
        return []
    value = row.value[column]
    if column == "input" and isinstance(value, dict):  # OpenAI's form
        return turns_of(value.get("messages"), "input.messages", row)
    if not isinstance(value, str):
        return turns_of(value, column, row)
    extra = row.optional("input") if column == "instruction" else ""
    return [Message("user", "\n\n".join(text for text in (row.text(column), extra, context_of(row)) if text.strip()))]


def _side(value: object, column: str, row: RawRow, asked: Sequence[Message]) -> list[Message]:
    if not isinstance(value, str):
        return turns_of(value, column, row, after=asked)
    text = row.checked_text(value, column)
    if not _SPEAKER.match(text):
        return [Message("assistant", text)]
    said = _SPEAKER.split(text)[1:]  # who, what, who, what ...
    return [
        Message("user" if who == "Human" else "assistant", what.strip())
        for who, what in zip(said[::2], said[1::2], strict=True)
    ]


def _parted(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Return the turns with which both begin, and the rest of each, which begins with an answer.

    An answer that both share after the last question stays with both, and is not learnt.
    """
    alike = 0
    while alike < min(len(chosen), len(rejected)) and chosen[alike] == rejected[alike]:
        alike += 1
    shared = alike
    while shared and chosen[shared - 1].role == "assistant":
        shared -= 1
    if alike == len(chosen) or alike == len(rejected):
        return chosen[:shared], chosen[shared:], rejected[shared:]
    again = [replace(turn, learnt=False) for turn in chosen[shared:alike]]
    return chosen[:shared], again + chosen[alike:], again + rejected[alike:]


def _begins(turns: Sequence[Message], asked: Sequence[Message]) -> bool:
    """Return whether turns begin with those that were asked, system prompts aside."""
    said, wanted = ([turn for turn in some if turn.role != "system"] for some in (turns, asked))
    return said[: len(wanted)] == wanted


def _parted_texts(
    chosen: list[Message], rejected: list[Message], row: RawRow
) -> tuple[list[Message], list[Message], list[Message]]:
    """Return two plain texts parted where they differ, at the space before (TRL)."""
    if not (len(chosen) == len(rejected) == 1 and isinstance(row.value[row.shape.needed[0]], str)):
        row.refuse("no_prompt", ", ".join(row.shape.needed), _NO_PROMPT)
    good, bad = chosen[0].content, rejected[0].content
    alike = next((n for n, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    cut = len(good[:alike].rstrip()) if good[:alike] != good[:alike].rstrip() else good.rfind(" ", 0, alike)
    if good != bad and cut <= 0:
        row.refuse("no_prompt", ", ".join(row.shape.needed), _NO_PROMPT)
    return (
        [Message("user", good[:cut])],
        [Message("assistant", good[cut:].lstrip())],
        [Message("assistant", bad[cut:].lstrip())],
    )


def _checked(asked: list[Message], chosen: list[Message], rejected: list[Message], row: RawRow) -> Preference:
    """Return the preference, if both sides answer what was asked, and differently."""
    good, bad = row.shape.needed
    while asked and asked[-1].role == "assistant":  # an answer that has been given before both
        turn = replace(asked.pop(), learnt=False)
        chosen, rejected = [turn, *chosen], [turn, *rejected]
    if not any(turn.role in ("user", "tool") for turn in asked):
        row.refuse("no_prompt", ", ".join(row.shape.needed), _NO_PROMPT)
    sides = [_ended(column, side, row) for column, side in ((good, chosen), (bad, rejected))]
    if sides[0] == sides[1]:
        row.leave_out("same_answers", "both answers are the same; the row is left out", f"{good}, {bad}")
    return Preference(tuple(asked), tuple(sides[0]), tuple(sides[1]), row.number)


def _ended(column: str, side: list[Message], row: RawRow) -> list[Message]:
    """Return an answer up to its last turn that is the assistant's."""
    last = next((place for place in range(len(side), 0, -1) if side[place - 1].role == "assistant"), 0)
    if side[last:] and last:
        row.note("last_turn_not_assistant", column, f"the last turn is {side[-1].role}'s; it is left out")
    if not any(turn.learnt and (turn.content.strip() or turn.calls) for turn in side[:last]):
        row.leave_out("empty_answer", f"found no answer ({json_kind(row.value[column])}); the row is left out", column)
    return side[:last]
