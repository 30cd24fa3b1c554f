"""Calls of tools and descriptions of tools, in the forms that people write them, as the one form of all rows.

A call is read in the forms of OpenAI (`function` with `name` and `arguments`, now in `tool_calls`, once in
`function_call`), of Anthropic (`name` and `input`), and of ShareGPT, ms-swift, Hermes and xLAM (`name` and
`arguments`), each as an object or as JSON text. Tools are handed on in OpenAI's form, which chat templates expect.

Calls that stand in texts, as in the data of Hermes and Glaive, are taken apart into calls, results and tools: each
model's chat template writes them in its own words again. Texts that cannot be taken apart as a whole stay as they are.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from studio.core.text import plain
from studio.probe.data.findings import filled, json_kind
from studio.probe.data.raw_row import RawRow, json_of, json_text
from studio.probe.data.rows import Conversation, Message, ToolCall

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

_ARGUMENTS = ("arguments", "parameters", "input", "args")
_WANTED_CALL = "wanted an object with name and arguments, or JSON text of one"
_WANTED_TOOLS = (
    'wanted a list of tools, or JSON text of one; another meaning of the column: data.columns = { tools = "" }'
)
_SCHEMA_WORDS = ("properties", "required", "$ref", "anyOf", "oneOf", "allOf")
_JSON_TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean", "list": "array", "array": "array", "tuple": "array", "set": "array",
    "dict": "object", "object": "object",
}  # fmt: skip
"""What xLAM's names of types, which are Python's, are in JSON Schema."""


def calls_of(value: object, field: str, row: RawRow) -> tuple[ToolCall, ...]:
    """Return the calls in a value: one call or a list of them, or JSON text of either.

    Args:
        value: As it stands in the file.
        field: Its place in the row.
        row: The row.

    Raises:
        Unusable: Something in it is no call.
    """
    value = _parsed(value, field, row, _WANTED_CALL)
    if isinstance(value, list):
        return tuple(_call(one, f"{field}[{place}]", row) for place, one in enumerate(value))
    return (_call(value, field, row),)


def _call(value: object, field: str, row: RawRow) -> ToolCall:
    value = _parsed(value, field, row, _WANTED_CALL)
    if not isinstance(value, dict):
        row.refuse("bad_call", field, f"found {json_kind(value)}; {_WANTED_CALL}")
    inner = value.get("function")
    said, where = (inner, f"{field}.function") if isinstance(inner, dict) else (value, field)
    name = said.get("name") or (inner if isinstance(inner, str) else None)
    if not (isinstance(name, str) and name.strip()):
        found = json_kind(said.get("name")) if said.get("name") is not None else "no name"
        row.refuse("bad_call", f"{where}.name", f"found {found}; wanted the name of the tool that is called")
    key = next((key for key in _ARGUMENTS if key in said), "arguments")
    arguments = _parsed_arguments(said.get(key), f"{where}.{key}", row)
    identity = value.get("id")
    return ToolCall(
        row.checked_text(name, f"{where}.name"),
        row.checked_text(json_text(arguments), f"{where}.{key}"),
        identity if isinstance(identity, str) else "",
    )


def _parsed_arguments(value: object, field: str, row: RawRow) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    as_text = isinstance(value, str)
    if isinstance(value, str):
        try:
            value = json_of(value)
        except ValueError as error:
            row.refuse("bad_call", field, f"found text that is not JSON ({_short(error)}); wanted an object")
    if not isinstance(value, dict):
        row.refuse("bad_call", field, f"found {json_kind(value)}; wanted an object of arguments by name")
    return _without_nulls(value) if row.findings.from_table and not as_text else value


def check_results(messages: Sequence[Message], places: Sequence[str], row: RawRow) -> None:
    """Refuse the result of a tool that nobody called.

    Where no turn has calls and results name none, calls are taken to stand in the texts.

    Args:
        messages: The turns so far.
        places: Where each stands in the row.
        row: The row.

    Raises:
        Unusable: There is such a result.
    """
    structured = any(message.calls for message in messages)
    known: set[str] = set()
    called = False
    for message, place in zip(messages, places, strict=True):
        if message.calls:
            called = True
            known.update(call.id for call in message.calls if call.id)
        elif message.role == "user":
            called = False
        elif message.role == "tool" and (
            (message.call_id and (not structured or (known and message.call_id not in known)))
            or (structured and not called)
        ):
            shown = f" of the call '{plain(message.call_id, one_line=True, limit=40)}'" if message.call_id else ""
            row.refuse(
                "result_without_call",
                place,
                f"found a result{shown}, and no such call before it; wanted the assistant's call first",
            )


def tools_of(value: object, column: str, row: RawRow) -> str:
    """Return the tools of a row as the text of a JSON list in OpenAI's form; empty for none.

    Args:
        value: A list of tools, or JSON text of one.
        column: The column that holds it.
        row: The row.

    Raises:
        Unusable: It is something else.
    """
    if not filled(value):
        return ""
    listed = _parsed(value, column, row, _WANTED_TOOLS, kind="bad_tools")
    if isinstance(listed, dict):
        listed = [listed]
    if not isinstance(listed, list):
        row.refuse("bad_tools", column, f"found {json_kind(listed)}; {_WANTED_TOOLS}")
    tools = [_tool(one, f"{column}[{place}]", row) for place, one in enumerate(listed)]
    return row.checked_text(json_text(tools), column) if tools else ""


def _tool(value: object, field: str, row: RawRow) -> dict[str, Any]:
    value = _parsed(value, field, row, "wanted an object with name, description and parameters", kind="bad_tools")
    if not isinstance(value, dict):
        found = f"found {json_kind(value)}; wanted an object with name, description and parameters"
        row.refuse("bad_tools", field, found)
    tool: dict[str, Any] = _without_nulls(value)
    inner = tool.get("function")
    said = inner if isinstance(inner, dict) else {key: part for key, part in tool.items() if key != "type"}
    if not (isinstance(said.get("name"), str) and said["name"].strip()):
        row.refuse("bad_tools", f"{field}.name", "found no name; wanted the name of the tool")
    if "input_schema" in said:  # Anthropic's word
        said = {("parameters" if key == "input_schema" else key): part for key, part in said.items()}
    parameters = said.get("parameters")
    if isinstance(parameters, str):
        said = said | {"parameters": _parsed(parameters, f"{field}.parameters", row, "wanted an object", "bad_tools")}
    elif isinstance(parameters, dict) and _is_listed(parameters):
        said = said | {"parameters": _schema(parameters)}
    return {"type": "function", "function": said}


def _is_listed(parameters: Mapping[str, Any]) -> bool:
    """Return whether parameters are a table by name, as in xLAM, and no JSON Schema."""
    if isinstance(parameters.get("type"), str) or any(word in parameters for word in _SCHEMA_WORDS):
        return False
    return bool(parameters) and all(isinstance(one, dict) for one in parameters.values())


def _schema(parameters: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return xLAM's parameters as JSON Schema: optional are those that say so or have a default."""
    properties, required = {}, []
    for name, said in parameters.items():
        words = str(said.get("type", "")).split(",")
        plain_type = words[0].strip().partition("[")[0].lower()
        properties[name] = said | ({"type": _JSON_TYPES[plain_type]} if plain_type in _JSON_TYPES else {})
        if "default" not in said and not any(word.strip() == "optional" for word in words[1:]):
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _without_nulls(value: Any) -> Any:
    """Return an object without the keys that are null: tables give each object the keys of all. A default may be."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if part is not None or key == "default"}
        return {key: _without_nulls(part) for key, part in kept.items()}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _parsed(value: object, field: str, row: RawRow, wanted: str, kind: str = "bad_call") -> Any:
    """Return a value, or what it holds as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json_of(value)
    except ValueError as error:
        row.refuse(kind, field, f"found text that is not JSON ({_short(error)}); {wanted}")


def _short(error: ValueError) -> str:
    return plain(str(error), one_line=True, limit=60)


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
