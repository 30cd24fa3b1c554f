"""Settings that chats alone have: which parts of an answer are learnt, and what the chat template is told."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from studio.core.text import plain
from studio.core.value_kinds import ValueKind, found_value

PARTS = ("reasoning", "answer", "calls")
"""The parts of an answer, in the order in which they are generated."""
Variable = bool | int | float | str
Variables = tuple[tuple[str, Variable], ...]
NOT_VARIABLES = frozenset(
    (
        *("messages", "conversation", "conversations", "tools", "documents", "chat_template", "self"),
        *("add_generation_prompt", "sanitize_control_tokens"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"),
    )
)
"""What transformers' `apply_chat_template` takes for itself (5.24), and what the rows give."""
_PAIR = re.compile(r'\s*([^\s=,]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^",]*)\s*(?:,|\Z)')
_NUMBER = re.compile(r"[-+]?\d+")
_MOST = 50


@dataclass(frozen=True, slots=True)
class Several(ValueKind):
    """One or more of some words, in their order; with `none` also none of them."""

    words: tuple[str, ...]
    none: bool = False

    @property
    def allowed(self) -> str:
        """The list."""
        quoted = ", ".join(f'"{word}"' for word in self.words)
        return f"a list of {'none, ' * self.none}one or more of [{quoted}]; on one line: {', '.join(self.words)}"

    def shaped(self, value: Any) -> Any:
        """Return a list as a tuple, known words in their order."""
        if not isinstance(value, (list, tuple)):
            return value
        known = all(word in self.words for word in value) and len(set(value)) == len(value)
        return tuple(sorted(value, key=self.words.index)) if known else tuple(value)

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no list, is empty, or holds another word or one twice."""
        sound = isinstance(value, tuple) and (value or self.none) and all(word in self.words for word in value)
        if not sound or len(set(value)) < len(value):
            yield found_value(value), self.allowed

    def read(self, text: str) -> Any:
        """Read words with commas between, or a list as TOML has it."""
        return self.shaped([part.strip(" \t\"'") for part in text.strip().strip("[]").split(",") if part.strip()])


@dataclass(frozen=True, slots=True)
class TemplateVariables(ValueKind):
    """A table of variables for a chat template: names, and a text, a number or a truth for each."""

    @property
    def allowed(self) -> str:
        """The table."""
        return (
            "a table of names and texts, numbers or true and false, such as { enable_thinking = false, date_string = "
            '"1 May 2025" }; on one line: enable_thinking=false, reasoning_effort=low'
        )

    def shaped(self, value: Any) -> Any:
        """Return a table as pairs."""
        return tuple(value.items()) if isinstance(value, Mapping) else value

    def wrong(self, value: Any) -> Iterator[tuple[str, str]]:
        """Yield a value that is no table, and each pair without a usable name or value."""
        if not isinstance(value, tuple) or len(value) > _MOST:
            yield found_value(value), self.allowed
            return
        for name, inner in value:
            if not isinstance(name, str) or not name.isidentifier() or name in NOT_VARIABLES:
                yield plain(f"the name {name!r}", limit=100), f"{self.allowed}; not what the rows themselves give"
            elif not isinstance(inner, bool | int | float | str) or (isinstance(inner, str) and not _storable(inner)):
                yield plain(f"{name} = {found_value(inner)}", limit=100), self.allowed

    def read(self, text: str) -> Any:
        """Read `name=value` with commas between, texts in quotes or bare, or a table as TOML has it."""
        text = text.strip()
        if text.startswith("{"):
            import tomllib  # noqa: PLC0415  3 ms that recipes without variables do not pay

            with suppress(ValueError, RecursionError):  # texts without quotes may stand in braces, too
                return self.shaped(tomllib.loads(f"variables = {text}")["variables"])
        inner = text[1:-1].strip() if text.startswith("{") and text.endswith("}") else text
        pairs: dict[str, Variable] = {}
        at = 0
        while at < len(inner):
            found = _PAIR.match(inner, at)
            if found is None or found[1] in pairs:
                return text
            pairs[found[1]] = _value(found[2].strip())
            at = found.end()
        return tuple(pairs.items())

    def written(self, value: Any) -> str:
        """Write `name=value` with commas between, texts in quotes where they would be read as something else."""
        if not isinstance(value, tuple) or any(self.wrong(value)):
            return found_value(value) if isinstance(value, tuple) else str(value)
        return ", ".join(f"{name}={_text(inner)}" for name, inner in value)

    def stored(self, value: Any) -> Any:
        """Return the table."""
        return dict(value) if isinstance(value, tuple) else value


def _value(text: str) -> Variable:
    if text.startswith('"'):
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if text in ("true", "false"):
        return text == "true"
    if _NUMBER.fullmatch(text):
        return int(text)
    try:
        return float(text) if any(letter.isdigit() for letter in text) else text
    except ValueError:
        return text


def _text(value: Variable) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        bare = value and value == value.strip() and not set(value) & set('",\\{}=') and _value(value) == value
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return value if bare else f'"{escaped}"'
    return repr(value)


def _storable(text: str) -> bool:
    """Return whether a text has no NUL character and no lone surrogate, which TOML cannot hold."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)
