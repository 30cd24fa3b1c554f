"""The formats of data: which columns make which, and how a row of each becomes a conversation, a preference or a text.

A format is a function here that reads one of its rows, and a line of `SHAPES` for each way to name its columns; its
name stands among the choices of `data.format` (`studio.core.recipe`), and what a model without a chat template is asked
in for it in `studio.jobs.base.data.template`. What stands beside the texts of a row is read for all formats alike
(`beside`).
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.beside import (
    BESIDE_COLUMNS,
    CONTEXT_COLUMNS,
    LABEL_COLUMNS,
    REASONING_COLUMNS,
    TOOL_COLUMNS,
    check_context,
    context_of,
    history_of,
    label_of,
    reasoning_of,
    system_of,
    template_kwargs_of,
)
from studio.probe.data.calls import calls_of, glaive, taken_apart, tools_of
from studio.probe.data.findings import Findings, filled
from studio.probe.data.misreads import check_placeholder, refuse_media
from studio.probe.data.preferences import PAIR_COLUMNS, PAIRS, PROMPT_COLUMNS, TURN_COLUMNS, prompt_column
from studio.probe.data.raw_row import RawRow, Shape, Unusable, json_of
from studio.probe.data.reading import Reading
from studio.probe.data.rows import Conversation, Message, PlainText, Preference, Row
from studio.probe.data.turns import turns_of


class UnknownColumns(BadInput):
    """A table has no column that is known."""


_NAMED_SHAPES = 9
_MAY_BE_TEXT = ("dialog", "dialogue", "turns", "data")
_BESIDE = frozenset(BESIDE_COLUMNS)
_TREE = {"message_id", "parent_id"}
"""Columns of data sets that hold a message a row, each with the one that it answers (oasst1)."""
_MESSAGE = ({"role", "content"}, {"from", "value"})


def _plain_text(row: RawRow) -> str:
    return row.text(row.shape.needed[0])


def _pair(row: RawRow) -> list[Message]:
    prompt, answer = row.shape.needed
    asked = _asked(row, prompt)
    return [*asked, *_answered(row, answer, asked)]


def _alpaca(row: RawRow) -> list[Message]:
    instruction, answer = row.shape.needed
    asked = _asked(row, instruction, row.optional("input"))
    return [*asked, *_answered(row, answer, asked)]


def _asked(row: RawRow, column: str, extra: str = "") -> list[Message]:
    """Return the turns of a prompt. Answers in a prompt of several turns are not learnt (TRL)."""
    value = row.value[column]
    if not isinstance(value, list | dict):
        texts = (row.text(column), extra, context_of(row))
        return [Message("user", "\n\n".join((texts[0], *(text for text in texts[1:] if text.strip()))))]
    turns = turns_of(value, column, row)
    return [replace(turn, learnt=False) if turn.role == "assistant" else turn for turn in turns]


def _answered(row: RawRow, column: str, asked: list[Message]) -> list[Message]:
    value = row.value[column]
    turns = (
        turns_of(value, column, row, after=asked)
        if isinstance(value, list | dict)
        else [Message("assistant", row.text(column))]
    )
    if (reasoning := reasoning_of(row)) and turns and turns[-1].role == "assistant" and not turns[-1].reasoning:
        turns[-1] = replace(turns[-1], reasoning=reasoning)
    return turns


def _answers(row: RawRow) -> list[Message]:
    """Return a question and the calls that answer it (xLAM), or the first of its answers in a text (SQuAD)."""
    question, column = row.shape.needed
    asked, value = _asked(row, question), row.value[column]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json_of(value)
        except ValueError:
            row.refuse(
                "bad_call", column, "found text that is not JSON; wanted a list of calls, each with name and arguments"
            )
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        return [*asked, Message("assistant", row.checked_text(next(iter(value["text"]), ""), f"{column}.text[0]"))]
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
        text = value if isinstance(value, str) else value[0]
        return [*asked, Message("assistant", row.checked_text(text, column))]
    return [*asked, Message("assistant", "", calls=calls_of(value, column, row) if filled(value) else ())]


def _chat(row: RawRow) -> list[Message]:
    column = row.shape.needed[0]
    return turns_of(row.value[column], column, row)


def _dialogue(row: RawRow) -> list[Message] | Conversation:
    column = row.shape.needed[0]
    return (
        glaive(row)
        if isinstance(row.value[column], str) and not row.value[column].lstrip().startswith("[")
        else _chat(row)
    )


_BESIDE_TURNS = tuple(column for column in BESIDE_COLUMNS if column not in CONTEXT_COLUMNS)
_BESIDE_PAIR = (*BESIDE_COLUMNS, *REASONING_COLUMNS)
ANSWER_COLUMNS = ("completion", "response", "output", "solution", "answer", "target")
PROMPTS = tuple(column for column in PROMPT_COLUMNS if column != "instruction")

# In the order of preference: the published Alpaca files have a `text` column beside instruction and output, ultrachat a
# `prompt` beside messages, NuminaMath a problem and a solution.
SHAPES = (
    Shape("chat", _chat, ("messages",), _BESIDE_TURNS),
    Shape("chat", _chat, ("conversations",), _BESIDE_TURNS),
    Shape("alpaca", _alpaca, ("instruction", "output"), ("input", *_BESIDE_PAIR)),
    Shape("alpaca", _alpaca, ("instruction", "response"), ("input", *_BESIDE_PAIR)),
    *(Shape("prompt_completion", _pair, ("prompt", answer), _BESIDE_PAIR) for answer in ANSWER_COLUMNS),
    Shape("chat", _chat, ("conversation",), _BESIDE_TURNS),
    *(
        Shape("alpaca", _alpaca, ("instruction", answer), ("input", *_BESIDE_PAIR))
        for answer in ("completion", "answer")
    ),
    *(
        Shape("prompt_completion", _pair, (prompt, answer), _BESIDE_PAIR)
        for prompt in PROMPTS[1:]
        for answer in ANSWER_COLUMNS
    ),
    Shape("prompt_completion", _pair, ("inputs", "targets"), _BESIDE_PAIR),
    Shape("prompt_completion", _answers, ("query", "answers"), _BESIDE_PAIR),
    Shape("prompt_completion", _answers, ("question", "answers"), _BESIDE_PAIR),
    Shape("chat", _dialogue, ("chat",), _BESIDE_TURNS),
    *(Shape("chat", _chat, (column,), _BESIDE_TURNS) for column in _MAY_BE_TEXT[:3]),
    Shape("text", _plain_text, ("text",)),
    Shape("chat", _chat, ("data",), _BESIDE_TURNS),
)


def recognise(columns: Iterable[str], wanted: str = "auto") -> Shape | None:
    """Return the first shape whose needed columns are all there, of the wanted format only unless that is `auto`."""
    there = set(columns)
    if isinstance(columns, Mapping):  # these names may also hold one text that is no chat: a dialogue to sum up
        there -= {
            name for name in _MAY_BE_TEXT if isinstance(columns.get(name), str) and columns[name].lstrip()[:1] != "["
        }
    return next((s for s in SHAPES if there.issuperset(s.needed) and wanted in ("auto", s.format)), None)


def wrong_columns(columns: Iterable[str], wanted: str = "auto") -> str:
    """Return the message for columns that make no known row: what was found, what is allowed, which name is near."""
    found = list(columns)
    listed = ", ".join(plain(name, one_line=True, limit=40) for name in found[:12]) + (
        ", ..." if len(found) > 12 else ""
    )
    shapes = [shape for shape in SHAPES if wanted in ("auto", shape.format)]
    named = [" + ".join(shape.needed) for shape in shapes[:_NAMED_SHAPES]]
    if len(shapes) > _NAMED_SHAPES:
        named.append("or others that docs/data.md lists; data.columns gives the file's columns our names")
    allowed = "; ".join(named)
    message = f"found the columns {listed}; wanted {allowed}" if found else f"found no columns; wanted {allowed}"
    if wanted != "auto" and (other := recognise(found)):
        return (
            f"{message} (data.format = {wanted!r}). The row is {other}: set data.format to 'auto' or {other.format!r}"
        )
    if any(fields <= set(found) for fields in _MESSAGE):
        return f"{message}. The row is one message: a row wants all messages of its conversation, in a list"
    needed = {column for shape in shapes for column in shape.needed}
    near = {name: close for name in found if name not in needed and (close := _nearest(name, sorted(needed)))}
    hints = [f"'{plain(name, one_line=True, limit=40)}' for {close!r}" for name, close in near.items()]
    return f"{message}. Did you mean {', '.join(hints)}?" if hints else message


def _nearest(name: str, allowed: list[str]) -> str | None:
    close = difflib.get_close_matches(name.strip().lower(), allowed, n=1, cutoff=0.75)
    return close[0] if close else None


def known_columns() -> frozenset[str]:
    """Return every column that some format reads."""
    read = {column for shape in SHAPES for column in shape.columns}
    return frozenset(read | {column for pair in PAIRS for column in pair} | set(PROMPT_COLUMNS) | set(TURN_COLUMNS))


def beside_columns(value: Mapping[str, Any], shape: Shape) -> Iterable[str]:
    """Return the columns of a row that are used beside those that its shape needs."""
    if len(value) == len(shape.needed):
        return ()
    held = [column for column in shape.optional if column in value and filled(value[column])]
    if is_pair(shape):
        prompt = prompt_column(value, shape)
        asking = (prompt, "input") if prompt == "instruction" else (prompt,)
        held = [column for column in held if column in asking or column in _BESIDE]
    labels = [column for column in LABEL_COLUMNS if isinstance(value.get(column), bool)]
    return held if shape.format == "text" else [*held, *labels]


def unused_columns(value: Mapping[str, Any], shape: Shape, used: Iterable[str]) -> Iterable[str]:
    """Return the columns of a row that say something to nobody.

    Args:
        value: The row.
        shape: How it is written.
        used: What `beside_columns` returned.
    """
    if len(value) == len(shape.needed):
        return ()
    known = {*shape.needed, *used}
    return (key for key in value if key not in known and (key not in shape.optional or filled(value[key])))


def is_pair(shape: Shape) -> bool:
    """Return whether rows of a shape are two answers."""
    return any(column in PAIR_COLUMNS for column in shape.needed)


def normalised(value: Mapping[str, Any], shape: Shape, number: int, findings: Findings, how: Reading) -> Row | None:
    """Return the row in the one form of all rows, or None where it cannot be used, with a finding that says why.

    Fatal: wrong types, unknown roles, and what would be trained otherwise than the row says. Not fatal, row left out:
    no answer in it. Not fatal, row kept: turns after the last answer, which teach nothing.
    """
    if refuse_media(value, shape.needed, number, findings):
        return None
    row = RawRow(value, shape, number, findings, how)
    try:
        made = shape.read(row)
        if isinstance(made, str):
            return _continued(made, row)
        if isinstance(made, Preference):
            return _told(made, row)
        return _conversation(made, row)
    except Unusable:
        return None


def _continued(text: str, row: RawRow) -> PlainText:
    """Return the plain text unless it is empty."""
    column = row.shape.needed[0]
    if row.how.wants == "labels":
        row.refuse("no_label", column, "found a plain text; wanted a prompt, its answer, and a label true or false")
    if row.value.keys() >= _TREE:
        found = "found one message of a tree (message_id, parent_id); wanted a whole conversation"
        row.refuse("message_tree", column, f"{found}. Take a version of the data set with conversations, or build them")
    if not text.strip():
        row.leave_out("empty_text", "empty; the row is left out", column)
    check_placeholder([text], row)
    return PlainText(text, row.number)


def _told(made: Preference, row: RawRow) -> Preference:
    """Return a preference with what its template is told besides the turns."""
    asked = row.value.get("input")
    inner = asked.get("tools") if isinstance(asked, dict) else None  # OpenAI's form
    check_placeholder((turn.content for turn in made.turns), row)
    return replace(
        made, tools=_tools(row) or tools_of(inner, "input.tools", row), template_kwargs=template_kwargs_of(row)
    )


def _tools(row: RawRow) -> str:
    column = row.first(TOOL_COLUMNS)
    return tools_of(row.value[column], column, row) if column else ""


def _conversation(made: list[Message] | Conversation, row: RawRow) -> Conversation:
    """Return the conversation of a row's turns and of what stands beside them."""
    label = label_of(row)
    if label and row.how.wants in ("answers", "measured"):
        row.refuse(
            "desirable_label",
            label[0],
            f"found {str(label[1]).lower()} beside an answer: whether it is desirable (KTO); undesired ones would be "
            "learnt like the others. Keep the rows with desirable answers and remove the column; where it means "
            "something else, rename it",
        )
    bare = _BESIDE.isdisjoint(row.value)  # the usual case, which takes half the time
    if isinstance(made, Conversation):
        turns, tools = list(made.messages), made.tools
    elif bare:
        turns, tools = taken_apart(made, "", row)
    else:
        turns, tools = taken_apart(_with_beside(made, row), _tools(row), row)
        check_context(row, row.shape.columns)
    kwargs = "" if bare else template_kwargs_of(row)
    return Conversation(tuple(_checked(turns, row)), row.number, tools, kwargs, label[1] if label else None)


def _with_beside(made: list[Message], row: RawRow) -> list[Message]:
    """Return turns with the history before them, and the system prompt of a column unless they have their own."""
    history = history_of(row)
    if made and made[0].role == "system":
        return [made[0], *history, *made[1:]]
    system = [] if history and history[0].role == "system" else system_of(row)
    return [*system, *history, *made]


def _checked(turns: list[Message], row: RawRow) -> list[Message]:
    """Return the turns up to the last answer.

    Raises:
        Unusable: There is no answer to learn from; the row is left out.
    """
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        found = ", ".join(turn.role for turn in turns[:8]) or "no messages"
        row.leave_out("no_answer", f"found {found}; no assistant turn, the row is left out")
    learnt = [answer for answer in answers if answer.learnt]
    if not learnt:
        row.leave_out("nothing_learnt", "every answer is marked as one that is not to be learnt; the row is left out")
    if not all(answer.content.strip() or answer.calls for answer in learnt):
        row.leave_out("empty_answer", "an assistant turn is empty; the row is left out")
    if turns[-1].role != "assistant":
        last = f"the last turn is {turns[-1].role}'s; what follows the last answer is left out"
        row.note("last_turn_not_assistant", "", last)
        while turns[-1].role != "assistant":
            turns.pop()
    check_placeholder((turn.content for turn in turns), row)
    return turns
