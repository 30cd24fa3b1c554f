"""The formats of data: which columns make which, and how a row of each becomes a conversation or a plain text.

A format is a function here that reads one of its rows, and a line of `SHAPES` for each way to name its columns; its
name stands among the choices of `data.format` (`studio.core.recipe`), and what a model without a chat template is asked
in for it in `studio.jobs.base.data.template`.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from studio.core.text import plain
from studio.probe.data.findings import Findings, json_kind
from studio.probe.data.misreads import (
    CALL_ROLES,
    UNDERSTOOD_FIELDS,
    check_placeholder,
    refuse_call,
    refuse_columns,
    refuse_message,
    refuse_parts,
)
from studio.probe.data.rows import Conversation, Message, PlainText, Row

# ShareGPT says human and gpt; OpenAI's newer models say developer; some exports say model, function or observation.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


class _Unusable(Exception):
    """A row that cannot be used; the finding is already recorded."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write a row: the format it belongs to, how it is read, the columns it needs and those it may have."""

    format: str
    read: Callable[["RawRow"], "list[Message] | str"]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        return self.needed + self.optional

    def __str__(self) -> str:
        return f"{self.format.replace('_', '/')} ({', '.join(self.needed)})"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as the file has it, and where findings about it go.

    Attributes:
        value: Its columns.
        shape: How it is written.
        number: Its line or place, from 1.
        findings: Gets what is wrong with it.
        answers_only: Whether only the answers will be trained.
    """

    value: Mapping[str, Any]
    shape: Shape
    number: int
    findings: Findings
    answers_only: bool

    def text(self, column: str) -> str:
        """Return the text of a column; a row without it cannot be used."""
        return _text(self.value, column, self.number, self.findings)

    def optional(self, column: str) -> str:
        """Return the text of a column, empty where it is missing or null."""
        return "" if self.value.get(column) is None else self.text(column)

    def asked(self, prompt: str, answer: str) -> list[Message]:
        """Return the turns of a prompt and its answer, after the row's system prompt where it has one."""
        return [*self.system(), Message("user", prompt), Message("assistant", answer)]

    def system(self) -> list[Message]:
        """Return the system turn that a column holds, if any."""
        text = self.optional("system")
        return [Message("system", text)] if text.strip() else []


def _plain_text(row: RawRow) -> str:
    return row.text(row.shape.needed[0])


def _pair(row: RawRow) -> list[Message]:
    prompt, answer = map(row.text, row.shape.needed)
    return row.asked(prompt, answer)


def _alpaca(row: RawRow) -> list[Message]:
    instruction, answer = map(row.text, row.shape.needed)
    extra = row.optional(row.shape.optional[0])
    return row.asked(f"{instruction}\n\n{extra}" if extra.strip() else instruction, answer)


def _chat(row: RawRow) -> list[Message]:
    column, number, findings = row.shape.needed[0], row.number, row.findings
    turns = row.value[column]
    if not isinstance(turns, list):
        findings.add("wrong_type", number, f"found {json_kind(turns)}; wanted a list of messages", field=column)
        raise _Unusable
    messages = [
        _turn(turn, f"{column}[{place}]", number, findings, answers_only=row.answers_only)
        for place, turn in enumerate(turns)
    ]
    system_above = "system" in row.shape.optional and not (messages and messages[0].role == "system")
    return [*(row.system() if system_above else ()), *messages]


# In the order of preference: the published Alpaca files have a `text` column beside instruction and output.
SHAPES = (
    Shape("chat", _chat, ("messages",)),
    Shape("chat", _chat, ("conversations",), ("system",)),
    Shape("alpaca", _alpaca, ("instruction", "output"), ("input", "system")),
    Shape("alpaca", _alpaca, ("instruction", "response"), ("context", "system")),
    Shape("prompt_completion", _pair, ("prompt", "completion"), ("system",)),
    Shape("prompt_completion", _pair, ("prompt", "response"), ("system",)),
    Shape("prompt_completion", _pair, ("question", "answer"), ("system",)),
    Shape("text", _plain_text, ("text",)),
)


def recognise(columns: Iterable[str], wanted: str = "auto") -> Shape | None:
    """Return the first shape whose needed columns are all there, of the wanted format only unless that is `auto`."""
    there = set(columns)
    return next((s for s in SHAPES if there.issuperset(s.needed) and wanted in ("auto", s.format)), None)


def wrong_columns(columns: Iterable[str], wanted: str = "auto") -> str:
    """Return the message for columns that make no known row: what was found, what is allowed, which name is near."""
    found = list(columns)
    listed = ", ".join(plain(name, one_line=True, limit=40) for name in found[:12]) + (
        ", ..." if len(found) > 12 else ""
    )
    allowed = "; ".join(" + ".join(shape.needed) for shape in SHAPES if wanted in ("auto", shape.format))
    message = f"found the columns {listed}; wanted {allowed}" if found else f"found no columns; wanted {allowed}"
    if wanted != "auto" and (other := recognise(found)):
        return (
            f"{message} (data.format = {wanted!r}). The row is {other}: set data.format to 'auto' or {other.format!r}"
        )
    needed = {column for shape in SHAPES if wanted in ("auto", shape.format) for column in shape.needed}
    near = {name: close for name in found if name not in needed and (close := _nearest(name, sorted(needed)))}
    hints = [f"'{plain(name, one_line=True, limit=40)}' for {close!r}" for name, close in near.items()]
    return f"{message}. Did you mean {', '.join(hints)}?" if hints else message


def _nearest(name: str, allowed: list[str]) -> str | None:
    close = difflib.get_close_matches(name.strip().lower(), allowed, n=1, cutoff=0.75)
    return close[0] if close else None


def known_columns() -> frozenset[str]:
    """Return every column that some format reads."""
    return frozenset(column for shape in SHAPES for column in shape.columns)


def normalised(
    value: Mapping[str, Any], shape: Shape, number: int, findings: Findings, *, answers_only: bool
) -> Row | None:
    """Return the row in the one form of all rows, or None where it cannot be used, with a finding that says why.

    Fatal: wrong types, unknown roles, and what would be trained otherwise than the row says (see `misreads`). Not
    fatal, row left out: no answer in it. Not fatal, row kept: turns after the last answer, which teach nothing.
    """
    if refuse_columns(value, shape.needed, number, findings, answered=shape.format != "text"):
        return None
    try:
        made = shape.read(RawRow(value, shape, number, findings, answers_only))
    except _Unusable:
        return None
    if isinstance(made, str):
        return _continued(made, shape.needed[0], number, findings)
    return _checked(made, number, findings)


def _continued(text: str, column: str, number: int, findings: Findings) -> PlainText | None:
    """Return the plain text unless it is empty."""
    if not text.strip():
        findings.add("empty_text", number, "empty; the row is left out", field=column, fatal=False)
        return None
    check_placeholder([text], number, findings)
    return PlainText(text, number)


def _turn(turn: object, field: str, number: int, findings: Findings, *, answers_only: bool) -> Message:
    if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
        found = f"found {json_kind(turn)}; wanted role and content, or from and value"
        findings.add("wrong_type", number, found, field=field)
        raise _Unusable
    speaker, text = ("role", "content") if "role" in turn else ("from", "value")
    role = _role(turn[speaker], f"{field}.{speaker}", number, findings)
    if refuse_message(turn, role, field, number, findings, answers_only=answers_only):
        raise _Unusable
    if len(turn) > len((speaker, text)):
        used = {speaker, text, *UNDERSTOOD_FIELDS}
        column = field.partition("[")[0]
        findings.leave(f"{column}[].{key}" for key, said in turn.items() if key not in used and said is not None)
    return Message(role, _content(turn, text, field, number, findings))


def _role(role: object, field: str, number: int, findings: Findings) -> str:
    if isinstance(role, str) and role in ROLES:
        return ROLES[role]
    if role in CALL_ROLES:
        refuse_call(field, number, findings)
        raise _Unusable
    found = f"'{plain(role, one_line=True, limit=40)}'" if isinstance(role, str) else json_kind(role)
    close = difflib.get_close_matches(role.strip().lower(), ROLES, n=1) if isinstance(role, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    findings.add(
        "unknown_role", number, f"found the role {found}; wanted one of {', '.join(ROLES)}.{hint}", field=field
    )
    raise _Unusable


def _content(turn: Mapping[str, Any], column: str, field: str, number: int, findings: Findings) -> str:
    """Return a message's text; content in parts (as vision chats have it) is joined when every part is text."""
    parts = turn.get(column)
    if isinstance(parts, list):
        if refuse_parts(parts, f"{field}.{column}", number, findings):
            raise _Unusable
        if parts and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            turn = {column: "".join(part["text"] for part in parts)}
    return _text(turn, column, number, findings, prefix=f"{field}.")


def _text(value: Mapping[str, Any], column: str, number: int, findings: Findings, *, prefix: str = "") -> str:
    text = value.get(column)
    field = prefix + column
    if not isinstance(text, str):
        found = json_kind(text) if column in value else "nothing"
        findings.add("not_text", number, f"found {found}; wanted text", field=field)
        raise _Unusable
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"found half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character {error.start}"
            findings.add("lone_surrogate", number, f"{found}; no tokenizer can read it", field=field)
            raise _Unusable from None
    return text


def _checked(messages: list[Message], number: int, findings: Findings) -> Conversation | None:
    """Return the conversation, or None if it has no answer to learn from."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        found = ", ".join(message.role for message in messages[:8]) or "no messages"
        findings.add("no_answer", number, f"found {found}; no assistant turn, the row is left out", fatal=False)
        return None
    if not all(answer.content.strip() for answer in answers):
        findings.add("empty_answer", number, "an assistant turn is empty; the row is left out", fatal=False)
        return None
    if messages[-1].role != "assistant":
        last = f"the last turn is {messages[-1].role}'s; what follows the last answer is left out"
        findings.add("last_turn_not_assistant", number, last, fatal=False)
        while messages[-1].role != "assistant":
            messages.pop()
    check_placeholder((message.content for message in messages), number, findings)
    return Conversation(tuple(messages), number)
