"""Columns that stand beside the texts of a row, whatever its format: system prompt, history, context, tools, labels."""

from collections.abc import Sequence
from typing import Any

from studio.core.text import plain
from studio.probe.data.findings import filled, json_kind
from studio.probe.data.raw_row import RawRow, json_of, json_text
from studio.probe.data.rows import Message
from studio.probe.data.turns import turns_of

SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")
CONTEXT_COLUMNS = ("context", "contexts")
LABEL_COLUMNS = ("label", "kto_tag")
REASONING_COLUMNS = ("reasoning", "reasoning_content", "thinking", "complex_cot")
"""Reasoning of an answer in a column of its own; the last is FreedomIntelligence's medical-o1-reasoning-SFT."""
BESIDE_COLUMNS = (
    *SYSTEM_COLUMNS, *TOOL_COLUMNS, *CONTEXT_COLUMNS, "history", "documents", "chat_template_kwargs",
)  # fmt: skip

_LABEL_WORDS = {"true": True, "desirable": True, "false": False, "undesirable": False}
_WANTED_HISTORY = "wanted a list of pairs, a question and its answer each, or of messages"


def system_of(row: RawRow) -> list[Message]:
    """Return the system turn that a column holds, if any."""
    column = row.first(SYSTEM_COLUMNS)
    return [Message("system", row.text(column))] if column else []


def history_of(row: RawRow) -> list[Message]:
    """Return the turns before the prompt; their answers are learnt as well (LLaMA-Factory).

    Raises:
        Unusable: The column holds something else.
    """
    value = row.value.get("history")
    if not filled(value):
        return []
    if isinstance(value, str):
        try:
            value = json_of(value)
        except ValueError:
            row.refuse("bad_history", "history", f"found text that is not JSON; {_WANTED_HISTORY}")
    if not isinstance(value, list):
        row.refuse("bad_history", "history", f"found {json_kind(value)}; {_WANTED_HISTORY}")
    if all(isinstance(turn, dict) for turn in value):
        return turns_of(value, "history", row)
    turns = []
    for place, pair in enumerate(value):
        field = f"history[{place}]"
        if not (isinstance(pair, list) and len(pair) == 2):
            found = f"a list of {len(pair)}" if isinstance(pair, list) else json_kind(pair)
            row.refuse("bad_history", field, f"found {found}; {_WANTED_HISTORY}")
        turns += [
            Message(role, row.checked_text(text, f"{field}[{side}]"))
            for side, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True))
        ]
    return turns


def context_of(row: RawRow) -> str:
    """Return what the prompt is asked about: a text, or texts with blank lines between.

    Raises:
        Unusable: The column holds something else.
    """
    column = row.first(CONTEXT_COLUMNS)
    if column is None:
        return ""
    value = row.value[column]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return "\n\n".join(row.checked_text(text, f"{column}[{place}]") for place, text in enumerate(value))
    if not isinstance(value, str):
        found = f"found {json_kind(value)}; wanted text, or a list of texts"
        row.refuse("bad_context", column, f"{found}. Write the prompt from it with data.prompt")
    return row.text(column)


def template_kwargs_of(row: RawRow) -> str:
    """Return the other variables of the chat template as the text of a JSON object; empty for none.

    Those of `chat_template_kwargs`, and `documents`, which templates for answers from documents read.

    Raises:
        Unusable: A column holds something else.
    """
    given: dict[str, Any] = {}
    value = row.value.get("chat_template_kwargs")
    if filled(value) or value is False:
        if isinstance(value, str):
            try:
                value = json_of(value)
            except ValueError as error:
                found = f"found text that is not JSON ({plain(str(error), one_line=True, limit=60)})"
                row.refuse("bad_template_kwargs", "chat_template_kwargs", f"{found}; wanted an object")
        if not isinstance(value, dict):
            found = f"found {json_kind(value)}; wanted an object of variables by name"
            row.refuse("bad_template_kwargs", "chat_template_kwargs", found)
    if isinstance(value, dict):
        given = {name: said for name, said in value.items() if said is not None}
    documents = row.value.get("documents")
    if filled(documents):
        given["documents"] = _documents(documents, row)
    return row.checked_text(json_text(given), "chat_template_kwargs") if given else ""


def _documents(value: Any, row: RawRow) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json_of(value)
        except ValueError:
            value = [value]
    listed = [{"text": one} if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]
    for place, one in enumerate(listed):
        if not isinstance(one, dict):
            found = f"found {json_kind(one)}; wanted a text, or an object with title and text"
            row.refuse("bad_documents", f"documents[{place}]", found)
    return listed


def reasoning_of(row: RawRow) -> str:
    """Return the reasoning before the answer that a column of its own holds; empty for none."""
    column = row.first(REASONING_COLUMNS)
    return row.text(column) if column else ""


def label_of(row: RawRow) -> tuple[str, bool] | None:
    """Return the column that says whether an answer is desirable, and what it says; None where no column does.

    A number or another text is taken for a class, an author or a topic, unless labels are wanted.

    Raises:
        Unusable: Labels are wanted, and the row has none that says yes or no.
    """
    wanted = row.how.wants == "labels"
    for column in LABEL_COLUMNS:
        label = row.value.get(column)
        if isinstance(label, bool):
            return column, label
        if isinstance(label, str) and label.strip().lower() in _LABEL_WORDS:
            return column, _LABEL_WORDS[label.strip().lower()]
        if wanted and isinstance(label, int | float) and label in (0, 1):
            return column, bool(label)
        if wanted and label is not None:
            row.refuse(
                "no_label", column, f"found {_shown(label)}; wanted true or false: whether the answer is desirable"
            )
    if wanted:
        row.refuse("no_label", "label", "found no label; wanted true or false: whether the answer is desirable")
    return None


def check_context(row: RawRow, used: Sequence[str]) -> None:
    """Say that a row has columns that its answer may rest on and that its format does not use."""
    if held := [column for column in CONTEXT_COLUMNS if column not in used and filled(row.value.get(column))]:
        found = f"found {', '.join(held)}, not used; what the answer owes to it is learnt without"
        row.note("unused_context", held[0], found)


def _shown(value: object) -> str:
    return plain(str(value), one_line=True, limit=40) if isinstance(value, int | float | str) else json_kind(value)
