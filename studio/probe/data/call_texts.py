"""Calls of tools that stand in texts, as in the data of Hermes and Glaive, taken apart into calls, results and tools.

Each model's chat template writes them in its own words again, as it does where the model is served. Texts that cannot
be taken apart as a whole stay as they are.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from studio.probe.data.calls import calls_of, tools_of
from studio.probe.data.raw_row import RawRow, json_of
from studio.probe.data.rows import Conversation, Message

_TOOLS = re.compile(r"<tools>\s*([\[{].*?)</tools>", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_INSTRUCTIONS = re.compile(
    r"(?:\s*You are a function calling AI model\.|\s*# Tools\s+You may call one or more functions)"
    r".*?<tools>.*?</tools>.*?For each function call,? return .*\Z",
    re.DOTALL,
)
"""What Hermes' system prompt and Qwen's template say of calls around the tools: the template says it again."""

_GLAIVE_TURN = re.compile(r"(?:\A|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_GLAIVE_CALL = re.compile(r"""\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*'(.*)'\s*\}\s*\Z""", re.DOTALL)
_GLAIVE_END = "<|endoftext|>"


def taken_apart(turns: Sequence[Message], tools: str, row: RawRow) -> tuple[list[Message], str]:
    """Return a conversation's turns and tools with Hermes' calls, results and tools out of its texts.

    Args:
        turns: The turns.
        tools: The tools that a column holds; empty for none.
        row: The row.
    """
    system = next((turn for turn in turns if turn.role == "system"), None)
    found = _TOOLS.search(system.content) if system else None
    if not found and not any(turn.role == "assistant" and "<tool_call>" in turn.content for turn in turns):
        return list(turns), tools
    try:
        return _all_apart(turns, tools, found, row)
    except ValueError:
        row.note("calls_as_text", "", "found calls of tools in the texts; they are trained as these characters")
        return list(turns), "" if found else tools


def _all_apart(
    turns: Sequence[Message], tools: str, found: re.Match[str] | None, row: RawRow
) -> tuple[list[Message], str]:
    """Return turns and tools taken apart.

    Raises:
        ValueError: Something cannot be.
    """
    apart: list[Message] = []
    if found:
        tools = tools or json.dumps([*_values(found[1])], ensure_ascii=False)
    for turn in turns:
        if found and turn.content is found.string:
            rest, met = _INSTRUCTIONS.subn("", turn.content)
            if not met:
                raise ValueError("other instructions than those that templates write")
            apart += [replace(turn, content=rest.strip())] if rest.strip() else []
        else:
            apart += _apart(turn, row)
    if not tools:
        raise ValueError("no tools")
    return apart, tools_of(tools, "tools", row)


def _apart(turn: Message, row: RawRow) -> list[Message]:
    """Return a turn with its calls or results taken out of its text.

    Raises:
        ValueError: They cannot be.
    """
    if turn.role == "tool" and (results := _RESULT.findall(turn.content)):
        return [replace(turn, content=result.strip()) for result in results]
    if turn.role != "assistant" or "<tool_call>" not in turn.content:
        return [turn]
    if turn.spans is not None or turn.content.count("<tool_call>") != len(_CALL.findall(turn.content)):
        raise ValueError("an open call, or one of which a part is learnt")
    found: list[Any] = [json_of(said.strip()) for said in _CALL.findall(turn.content)]
    if not all(_is_call(call) for call in found):
        raise ValueError("no call")
    calls = calls_of(found, "", row)
    return [replace(turn, content=_CALL.sub("", turn.content).strip(), calls=turn.calls + calls)]


def _is_call(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)


def _values(text: str) -> Iterable[Any]:
    """Yield the JSON values that follow one another in a text; of a list, its members.

    Raises:
        ValueError: Something in it is no JSON.
    """
    decoder, place = json.JSONDecoder(), 0
    while place < len(text):
        if text[place].isspace() or text[place] == ",":
            place += 1
            continue
        value, place = decoder.raw_decode(text, place)
        yield from value if isinstance(value, list) else [value]


def glaive(row: RawRow) -> Conversation:
    """Return a row of Glaive's function calling set: a system prompt with tools, and a chat in one text.

    Raises:
        Unusable: A call, or a tool, cannot be read.
    """
    column = row.shape.needed[0]
    said = _GLAIVE_TURN.split(row.text(column))
    if len(said) < 3:
        row.refuse("wrong_type", column, "found text without USER: and ASSISTANT:; wanted a list of messages")
    turns = [
        _glaive_turn(_GLAIVE_ROLES[who], what.replace(_GLAIVE_END, "").strip(), f"{column}: turn {place}", row)
        for place, (who, what) in enumerate(zip(said[1::2], said[2::2], strict=True))
    ]
    system = row.optional("system").strip().removeprefix("SYSTEM:").strip()
    words, brace, listed = system.partition("{")
    tools = ""
    if brace:
        try:
            tools = tools_of([*_values(brace + listed)], "system", row)
        except (ValueError, RecursionError):
            row.refuse("bad_tools", "system", "found tools that are not JSON; wanted an object for each after the text")
        words = words.partition(" with access to the following functions")[0].rstrip(" -.") + "."
    first = [Message("system", words)] if words.strip(" .") else []
    return Conversation((*first, *turns), row.number, tools)


def _glaive_turn(role: str, text: str, field: str, row: RawRow) -> Message:
    before, mark, call = text.partition("<functioncall>")
    if role != "assistant" or not mark:
        return Message(role, text)
    call = call.strip()
    quoted = _GLAIVE_CALL.match(call)
    value: Any = {"name": quoted[1], "arguments": quoted[2].replace("\\'", "'")} if quoted else call
    return Message(role, before.strip(), calls=calls_of(value, field, row))
