"""What a file calls the columns that we know: the names that `data.columns` may map, and its kind of value."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from studio.core.text import plain
from studio.core.value_kinds import Text, ValueKind, found_value

COLUMN_NAMES: Mapping[str, str] = {
    "prompt": "what is asked: text, or messages",
    "completion": "the answer that is learnt: text, or messages",
    "messages": "the turns of a conversation",
    "system": "the system prompt",
    "instruction": "what is asked, where input may follow it",
    "input": "what follows the instruction",
    "text": "plain text to continue",
    "reasoning": "what is thought before the answer",
    "context": "what the prompt is asked about, written after it",
    "history": "questions and answers before the prompt",
    "documents": "documents for the chat template",
    "tools": "the tools that may be called",
    "chat_template_kwargs": "other variables for the chat template",
    "chosen": "the preferred answer",
    "rejected": "the other answer",
    "label": "whether the answer is desirable",
}
"""Columns, by our name. One that is mapped to nothing is not used, though the file has a column of that name."""
FIELD_NAMES: Mapping[str, str] = {
    "role": "field of a message: who speaks",
    "content": "field of a message: what is said",
    "user": "the word in role for who asks",
    "assistant": "the word in role for who answers",
}
"""Fields of messages, and words in them, by our name."""

_FILE_NAME = Text()

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Columns(ValueKind):
    """A table from our names to the file's."""

    @property
    def allowed(self) -> str:
        """The table."""
        return (
            'a table from our names to the file\'s columns, such as { prompt = "Frage", completion = "Antwort" }; on '
            "one line: prompt=Frage, completion=Antwort. An empty name uses none. Our names: "
            f"{', '.join((*COLUMN_NAMES, *FIELD_NAMES))}"
        )

    def shaped(self, value: Any) -> Any:
        """Return a table as pairs."""
        return tuple(value.items()) if isinstance(value, Mapping) else value

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no table, each name that is not ours, and each column that is none or stands twice."""
        if not isinstance(value, tuple):
            yield found_value(value), self.allowed
            return
        met: set[str] = set()
        for ours, column in value:
            if ours not in COLUMN_NAMES and ours not in FIELD_NAMES:
                near = difflib.get_close_matches(str(ours), [*COLUMN_NAMES, *FIELD_NAMES], n=1)
                yield plain(f"the name {ours!r}", limit=100), f"perhaps {near[0]}" if near else self.allowed
            elif any(_FILE_NAME.wrong(column)):
                yield f"{ours} = {found_value(column)}", "the name of a column of the file, or nothing"
            elif not column.strip():
                if ours in FIELD_NAMES:
                    yield f"{ours} = {found_value(column)}", "the name of a field, or a word"
            elif column in met:
                yield plain(f"the column {column!r} twice", limit=100), "one of our names for each column"
            else:
                met.add(column)

    def read(self, text: str) -> Any:
        """Read `ours=theirs` with commas between, or a table as TOML has it."""
        text = text.strip()
        if text.startswith("{"):
            import tomllib  # noqa: PLC0415  3 ms that recipes without columns do not pay

            try:
                return self.shaped(tomllib.loads(f"columns = {text}")["columns"])
            except (ValueError, RecursionError):
                return text
        parts = [part.partition("=") for part in filter(None, map(str.strip, text.split(",")))]
        if not all(equals for _, equals, _ in parts):
            return text
        pairs = tuple((ours.strip(), column.strip()) for ours, _, column in parts)
        return pairs if len({ours for ours, _ in pairs}) == len(pairs) else text

    def written(self, value: Any) -> str:
        """Write `ours=theirs` with commas between, or a table as TOML has it where a column's name has one in it."""
        if not isinstance(value, tuple) or any(self.wrong(value)):
            return found_value(value) if isinstance(value, tuple) else str(value)
        if all(column == column.strip() and not set(column) & set(",={") for _, column in value):
            return ", ".join(f"{ours}={column}" for ours, column in value)
        quoted = (f'{ours} = "{escaped(column)}"' for ours, column in value)
        return f"{{ {', '.join(quoted)} }}"

    def stored(self, value: Any) -> Any:
        """Return the table."""
        return dict(value) if isinstance(value, tuple) else value


def escaped(text: str) -> str:
    """Return a text as it stands between the quotes of TOML."""
    named = text.replace("\\", "\\\\").replace('"', '\\"')
    return "".join(char if char.isprintable() else f"\\U{ord(char):08X}" for char in named)
