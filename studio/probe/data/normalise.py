"""Makes a conversation or a plain text of a raw row, and reports everything that is wrong with the row."""

import difflib
from collections.abc import Mapping
from typing import Any

from studio.core.text import plain
from studio.probe.data.findings import Findings
from studio.probe.data.json_rows import json_kind
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
from studio.probe.data.shapes import Shape

# ShareGPT says human and gpt; OpenAI's newer models say developer; some exports say model, function or observation.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


class _Unusable(Exception):
    """A row that cannot be used; the finding is already recorded."""


def normalised(
    value: Mapping[str, Any], shape: Shape, number: int, findings: Findings, *, answers_only: bool
) -> Row | None:
    """Return the row in the one form of all rows, or None where it cannot be used, with a finding that says why.

    Fatal: wrong types, unknown roles, and what would be trained otherwise than the row says (see `misreads`). Not
    fatal, row left out: no answer in it. Not fatal, row kept: turns after the last answer, which teach nothing.
    """
    if refuse_columns(value, shape, number, findings):
        return None
    try:
        match shape.format:
            case "text":
                return _plain_text(value, shape, number, findings)
            case "chat":
                messages = _turns(value, shape, number, findings, answers_only=answers_only)
            case "alpaca":
                messages = _alpaca(value, shape, number, findings)
            case _:
                messages = _pair(value, shape, number, findings)
    except _Unusable:
        return None
    return _checked(messages, number, findings)


def _plain_text(value: Mapping[str, Any], shape: Shape, number: int, findings: Findings) -> PlainText | None:
    text = _text(value, shape.needed[0], number, findings)
    if not text.strip():
        findings.add("empty_text", number, "empty; the row is left out", field=shape.needed[0], fatal=False)
        return None
    check_placeholder([text], number, findings)
    return PlainText(text, number)


def _pair(value: Mapping[str, Any], shape: Shape, number: int, findings: Findings) -> list[Message]:
    prompt, answer = (_text(value, column, number, findings) for column in shape.needed)
    return [*_system(value, number, findings), Message("user", prompt), Message("assistant", answer)]


def _alpaca(value: Mapping[str, Any], shape: Shape, number: int, findings: Findings) -> list[Message]:
    instruction, answer = (_text(value, column, number, findings) for column in shape.needed)
    extra = _optional(value, shape.optional[0], number, findings)
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [*_system(value, number, findings), Message("user", prompt), Message("assistant", answer)]


def _turns(
    value: Mapping[str, Any], shape: Shape, number: int, findings: Findings, *, answers_only: bool
) -> list[Message]:
    column = shape.needed[0]
    turns = value[column]
    if not isinstance(turns, list):
        findings.add("wrong_type", number, f"found {json_kind(turns)}; wanted a list of messages", field=column)
        raise _Unusable
    messages = [
        _turn(turn, f"{column}[{place}]", number, findings, answers_only=answers_only)
        for place, turn in enumerate(turns)
    ]
    system_above = "system" in shape.optional and not (messages and messages[0].role == "system")
    return [*(_system(value, number, findings) if system_above else ()), *messages]


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


def _system(value: Mapping[str, Any], number: int, findings: Findings) -> list[Message]:
    text = _optional(value, "system", number, findings)
    return [Message("system", text)] if text.strip() else []


def _optional(value: Mapping[str, Any], column: str, number: int, findings: Findings) -> str:
    return "" if value.get(column) is None else _text(value, column, number, findings)


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
