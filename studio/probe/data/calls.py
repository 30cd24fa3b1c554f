"""Calls of tools and descriptions of tools, in the forms that people write them, as the one form of all rows.

A call is read in the forms of OpenAI (`function` with `name` and `arguments`, now in `tool_calls`, once in
`function_call`), of Anthropic (`name` and `input`), and of ShareGPT, ms-swift, Hermes and xLAM (`name` and
`arguments`), each as an object or as JSON text. Tools are handed on in OpenAI's form, which chat templates expect.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from studio.core.text import plain
from studio.probe.data.findings import filled, json_kind
from studio.probe.data.raw_row import RawRow, json_of, json_text
from studio.probe.data.rows import Message, ToolCall

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
