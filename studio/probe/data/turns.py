"""Turns of a conversation as files write them, as messages: who speaks, what is said, thought, called and learnt.

Read are the words of OpenAI (role and content, content in parts, tool_calls, function_call, weight), of ShareGPT and
LLaMA-Factory (from and value, function_call, observation), of ms-swift (tool_call, tool_response, loss), of axolotl
(train, train_detail), of Anthropic (parts that think, call and answer calls), and of files that write a question and
its answer into one object, or texts in turn.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from studio.core.text import plain
from studio.probe.data.calls import calls_of, check_results
from studio.probe.data.findings import filled, json_kind
from studio.probe.data.misreads import MEDIA_FIELDS, check_media, media_part
from studio.probe.data.raw_row import RawRow, json_of, json_text
from studio.probe.data.rows import Message, ToolCall

_WEIGHTS = ("weight", "train", "training")
"""Fields that weigh a turn: 1 and true ask for what is done anyway."""
_DETAILS = ("train_detail", "training_detail")
MARKS = (*_WEIGHTS, *_DETAILS, "loss")
MARKS_SET = frozenset(MARKS)
_WHOLE = (
    "wanted 0 or 1 (false or true). A label is learnt or not: a share of its loss cannot be given to it. Write 1, or 0 "
    "for what is not to be learnt"
)
_UNTRAINED = (
    "with data.answers_only = false every token is learnt, this turn too. Set data.answers_only to true, or remove the "
    "field"
)
_DETAIL = "wanted an object with begin_offset, end_offset (the last character) and train"

Spans = tuple[tuple[int, int], ...]

# ShareGPT says human and gpt; OpenAI's newer models say developer; some exports say model, function or observation.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "tool_result": "tool",
    "ipython": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call", "tool_calls", "tool_use")
"""Roles of turns that are calls, in the formats of ShareGPT and ms-swift."""
SPEAKERS = ("role", "from")
WORDS = ("content", "value", "text")
_ASKERS = ("human", "user", "question", "prompt", "input")
_ANSWERERS = ("assistant", "gpt", "bot", "answer", "response", "output")
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_CALL_FIELDS = ("tool_calls", "tool_call", "function_call")
_ID_FIELDS = ("tool_call_id", "tool_use_id", "call_id")
_UNDERSTOOD = frozenset({*_REASONING_FIELDS, *_CALL_FIELDS, *_ID_FIELDS, *MARKS, *MEDIA_FIELDS, "name"})
_ONE_OF_BOTH = "wanted the reasoning in one of them"


def turns_of(value: object, column: str, row: RawRow, *, after: Sequence[Message] = ()) -> list[Message]:
    """Return the turns in a column.

    Args:
        value: A list of turns, one turn, or JSON text of a list.
        column: The column.
        row: The row.
        after: The turns before these.

    Raises:
        Unusable: Something in it is no turn that can be used.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json_of(value)
        except ValueError as error:
            found = (
                f"found text that is not JSON ({plain(str(error), one_line=True, limit=60)}); wanted a list of messages"
            )
            row.refuse("wrong_type", column, found)
    if isinstance(value, dict) and _speaker(value, row) is not None:
        value = [value]
    if not isinstance(value, list):
        row.refuse("wrong_type", column, f"found {json_kind(value)}; wanted a list of messages")
    if len(value) > 1 and all(isinstance(turn, str) for turn in value):
        return [
            Message("assistant" if place % 2 else "user", row.checked_text(text, f"{column}[{place}]"))
            for place, text in enumerate(value)
        ]
    turns: list[Message] = []
    places: list[int] = []
    for place, turn in enumerate(value):
        if usual := _usual(turn):
            turns.append(usual)
            places.append(place)
            continue
        for message, is_call in _messages(turn, f"{column}[{place}]", row):
            if is_call and turns and turns[-1].role == "assistant" and turns[-1].learnt == message.learnt:
                turns[-1] = replace(turns[-1], calls=turns[-1].calls + message.calls)  # as calls at the same time
            else:
                turns.append(message)
                places.append(place)
    if any(turn.role == "tool" for turn in turns):
        said = (f"{column}[{place}]" for place in places)
        check_results([*after, *turns], [*([column] * len(after)), *said], row)
    return turns


def _usual(turn: object) -> Message | None:
    """Return a turn of a role that we know and an ASCII text, as most are; this takes a third of the time."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, said = (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    if type(role) is str and type(said) is str and said.isascii() and role in ROLES:
        return Message(ROLES[role], said)
    return None


def _speaker(turn: Mapping[str, Any], row: RawRow) -> str | None:
    return next((key for key in (row.how.key("role"), *SPEAKERS) if key in turn), None)


def _messages(turn: object, field: str, row: RawRow) -> list[tuple[Message, bool]]:
    """Return the messages of one turn, and whether each is nothing but a call by its role."""
    if not isinstance(turn, dict):
        row.refuse("wrong_type", field, f"found {json_kind(turn)}; wanted role and content, or from and value")
    speaker = _speaker(turn, row)
    if speaker is None:
        return [(message, False) for message in _exchange(turn, field, row)]
    words = next(
        (key for key in (row.how.key("content"), *WORDS) if key in turn), "content" if speaker == "role" else "value"
    )
    said = turn.get(words)
    role = turn[speaker]
    if role in CALL_ROLES:
        learnt, _ = learnt_of(turn, "assistant", "", field, row)
        _leave_others(turn, (speaker, words), field, row)
        return [(Message("assistant", "", calls=calls_of(said, f"{field}.{words}", row), learnt=learnt), True)]
    role = _role(role, f"{field}.{speaker}", row)
    if isinstance(said, str) and all(part is None or key in (speaker, words) for key, part in turn.items()):
        return [(Message(role, row.checked_text(said, f"{field}.{words}")), False)]
    check_media(turn, field, row)
    _leave_others(turn, (speaker, words), field, row)
    return [(message, False) for message in _full(turn, role, words, field, row)]


def _full(turn: Mapping[str, Any], role: str, words: str, field: str, row: RawRow) -> list[Message]:
    """Return the messages of a turn that says more than a text: results of tools in parts are turns of their own."""
    content, thoughts, calls, results = _parts(turn.get(words), f"{field}.{words}", row)
    reasoning = _reasoning(turn, role, thoughts, field, row)
    calls += tuple(
        call for name in _CALL_FIELDS if filled(turn.get(name)) for call in calls_of(turn[name], f"{field}.{name}", row)
    )
    if calls and role != "assistant":
        row.refuse("bad_call", field, f"found a call in a turn of role {role}; only an assistant calls tools")
    if content is None:
        if not calls and not results:
            if role == "tool" and turn.get(words) is not None:
                content = row.checked_text(json_text(turn[words]), f"{field}.{words}")
            else:
                row.checked_text(turn.get(words), f"{field}.{words}", there=words in turn)
        content = content or ""
    if reasoning and "</think>" in content:
        content = _said_alone(content, reasoning, field, row)
    learnt, spans = learnt_of(turn, role, content, field, row)
    named, identity = turn.get("name"), next((turn[key] for key in _ID_FIELDS if turn.get(key)), "")
    message = Message(
        role,
        content,
        reasoning,
        calls,
        name=named if isinstance(named, str) else "",
        call_id=identity if isinstance(identity, str) and role == "tool" else "",
        learnt=learnt,
        spans=spans,
    )
    return [*results, *([message] if content.strip() or not results else [])]


def _exchange(turn: Mapping[str, Any], field: str, row: RawRow) -> list[Message]:
    """Return the turns of an object that holds a question and its answer."""
    asker = next((key for key in _ASKERS if key in turn), None)
    answerer = next((key for key in _ANSWERERS if key in turn), None)
    if asker is None or answerer is None:
        row.refuse("wrong_type", field, f"found {json_kind(turn)}; wanted role and content, or from and value")
    said = [
        (role, key)
        for role, key in (("system", "system"), ("user", asker), ("assistant", answerer))
        if turn.get(key) is not None
    ]
    _leave_others(turn, [key for _, key in said], field, row)
    return [Message(role, row.checked_text(turn[key], f"{field}.{key}")) for role, key in said]


def _leave_others(turn: Mapping[str, Any], used: Sequence[str], field: str, row: RawRow) -> None:
    column = field.partition("[")[0]
    row.findings.leave(
        f"{column}[].{key}"
        for key, said in turn.items()
        if key not in used and key not in _UNDERSTOOD and said is not None
    )


def _role(role: object, field: str, row: RawRow) -> str:
    if isinstance(role, str):
        if role in ROLES:
            return ROLES[role]
        for ours in ("user", "assistant"):
            if role == row.how.key(ours):
                return ours
        if role.strip().lower() in ROLES:
            return ROLES[role.strip().lower()]
    found = f"'{plain(role, one_line=True, limit=40)}'" if isinstance(role, str) else json_kind(role)
    close = difflib.get_close_matches(role.strip().lower(), ROLES, n=1) if isinstance(role, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    row.refuse("unknown_role", field, f"found the role {found}; wanted one of {', '.join(ROLES)}.{hint}")


Parts = tuple[str | None, str, tuple[ToolCall, ...], list[Message]]


def _parts(said: object, field: str, row: RawRow) -> Parts:
    """Return what content says, thinks and calls, and the results of tools in it; texts in parts are joined."""
    if isinstance(said, str):
        return row.checked_text(said, field), "", (), []
    if not isinstance(said, list) or not said:
        return None, "", (), []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    for place, part in enumerate(said):
        where = f"{field}[{place}]"
        if isinstance(part, str):
            texts.append(row.checked_text(part, where))
            continue
        if not isinstance(part, dict):
            return None, "", (), []
        kind = str(part.get("type") or "")
        if kind in ("tool_use", "tool_call", "function_call"):
            inner = part.get("tool_call") or part.get("function_call") or part
            calls += calls_of(inner, where, row)
        elif kind == "tool_result":
            results.append(_result(part, where, row))
        elif kind in ("thinking", "reasoning"):
            key = next((key for key in ("thinking", "reasoning", "text") if part.get(key)), "thinking")
            thoughts.append(row.checked_text(part.get(key), f"{where}.{key}", there=key in part))
        elif kind == "redacted_thinking":
            found = "found thinking that its maker has encrypted; it cannot be learnt, and the answer rests on it"
            row.refuse("reasoning", where, f"{found}. Take the row out, or the part where the answer stands without it")
        else:
            media_part(part, kind, where, row)
            key = "refusal" if kind == "refusal" else "text"
            if not isinstance(part.get(key), str):
                return None, "", (), []
            texts.append(row.checked_text(part[key], f"{where}.{key}"))
    content = "".join(texts) if texts else None if not thoughts else ""
    return content, "\n".join(thoughts), tuple(calls), results


def _result(part: Mapping[str, Any], field: str, row: RawRow) -> Message:
    """Return the turn of Anthropic's part that answers a call."""
    said = part.get("content", "")
    content, _, _, _ = _parts(said, f"{field}.content", row)
    if content is None:
        content = row.checked_text("" if said in (None, []) else json_text(said), f"{field}.content")
    identity = part.get("tool_use_id")
    return Message("tool", content, call_id=identity if isinstance(identity, str) else "")


def _reasoning(turn: Mapping[str, Any], role: str, thoughts: str, field: str, row: RawRow) -> str:
    found = {"": thoughts} if thoughts else {}
    for name in _REASONING_FIELDS:
        if filled(turn.get(name)):
            found[name] = row.checked_text(turn[name], f"{field}.{name}")
    if not found:
        return ""
    first = next(iter(found))
    if role != "assistant":
        row.refuse(
            "reasoning",
            f"{field}.{first}".rstrip("."),
            f"found reasoning in a turn of role {role}; only an assistant thinks",
        )
    if len(set(found.values())) > 1:
        names = " and ".join(name or "parts" for name in found)
        row.refuse("reasoning", f"{field}.{first}".rstrip("."), f"found two different texts in {names}; {_ONE_OF_BOTH}")
    return found[first]


def _said_alone(content: str, reasoning: str, field: str, row: RawRow) -> str:
    """Return an answer without the thinking that stands beside it as well."""
    thought, _, said = content.partition("</think>")
    if thought.replace("<think>", "").strip() != reasoning.strip():
        found = "found reasoning in a field of its own and another in the text, before </think>"
        row.refuse("reasoning", field, f"{found}; {_ONE_OF_BOTH}")
    return said.lstrip("\n")


def learnt_of(turn: Mapping[str, Any], role: str, content: str, field: str, row: RawRow) -> tuple[bool, Spans | None]:
    """Return whether a turn is learnt, and which ranges of its content are; None for all of it.

    Args:
        turn: As it stands in the file.
        role: Its role, in our words. Others than an assistant's are not learnt anyway, where only answers are.
        content: What it says.
        field: Its place in the row.
        row: The row.

    Raises:
        Unusable: It asks for what labels cannot do.
    """
    if MARKS_SET.isdisjoint(turn) or (role != "assistant" and row.how.answers_only):
        return True, None
    against = ""
    for name in _WEIGHTS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            found = f"{value:g}" if isinstance(value, int | float) else json_kind(value)
            row.refuse("fractional_weight", f"{field}.{name}", f"found {found}; {_WHOLE}")
        if not value:
            against = against or name
    if turn.get("loss") is False:  # any other value of it may be a loss that somebody measured
        against = against or "loss"
    spans = None
    for name in _DETAILS:
        if filled(turn.get(name)):
            spans = _spans(turn[name], content, f"{field}.{name}", row)
            against = against or (name if spans != ((0, len(content)),) else "")
            break
    if against and not row.how.answers_only:
        shown = plain(str(turn[against]).lower(), one_line=True, limit=40)
        row.refuse("untrained_message", f"{field}.{against}", f"found {shown}; {_UNTRAINED}")
    if spans is None or spans == ((0, len(content)),):
        return not against, None
    return bool(spans) and against in _DETAILS, spans or None


def _spans(details: object, content: str, field: str, row: RawRow) -> Spans:
    """Return the ranges that are learnt, in order; what no detail names is not (axolotl)."""
    if not isinstance(details, list):
        row.refuse("bad_span", field, f"found {json_kind(details)}; wanted a list of ranges")
    spans: list[tuple[int, int]] = []
    taken = [False] * len(content)
    for place, detail in enumerate(details):
        where = f"{field}[{place}]"
        if not isinstance(detail, dict):
            row.refuse("bad_span", where, f"found {json_kind(detail)}; {_DETAIL}")
        begin, end, train = (detail.get(key) for key in ("begin_offset", "end_offset", "train"))
        if type(begin) is not int or type(end) is not int or not isinstance(train, bool):
            row.refuse("bad_span", where, f"found {json_kind(detail)}; {_DETAIL}")
        if not 0 <= begin <= end < len(content):
            found = f"found characters {begin} to {end} of a text of {len(content)}"
            row.refuse(
                "bad_span", where, f"{found}; wanted 0 to {max(0, len(content) - 1)}, the first not after the last"
            )
        if any(taken[begin : end + 1]):
            row.refuse("bad_span", where, "found characters that a range before it names too; wanted each once")
        taken[begin : end + 1] = [True] * (end + 1 - begin)
        if train:
            spans.append((begin, end + 1))
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return tuple(joined)
