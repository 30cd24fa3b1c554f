"""What a data file becomes: conversations or plain text, in one form whatever the file's columns were called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. The role is `system`, `user`, `assistant` or `tool`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; `number` is the row's line in a JSONL file, else its place from 1."""

    messages: tuple[Message, ...]
    number: int = 0

    @property
    def prompt(self) -> str:
        """All that the user (or a tool) says, without the system prompt, which whole files share."""
        return "\n".join(message.content for message in self.messages if message.role in ("user", "tool"))

    @property
    def answer(self) -> str:
        """All that the assistant says."""
        return "\n".join(message.content for message in self.messages if message.role == "assistant")


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text to continue, trained from its first token to its end."""

    text: str
    number: int = 0

    @property
    def prompt(self) -> str:
        """Nothing asks for a plain text."""
        return ""

    @property
    def answer(self) -> str:
        """The text itself."""
        return self.text


Row = Conversation | PlainText


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know about one row. A fatal one means that the file must be corrected before training.

    Attributes:
        kind: Short stable name, such as `unknown_role`.
        row: Line of a JSONL file, else the row's place from 1.
        field: Column, or place in it such as `messages[2].content`; empty where the whole row is meant.
        message: What was found and what was wanted, safe to print.
        fatal: Whether `read_data` refuses the file for it.
    """

    kind: str
    row: int
    field: str
    message: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class DataSet:
    """A whole data file, normalised.

    Attributes:
        path: The file that was read.
        format: `chat`, `prompt_completion`, `alpaca` or `text`.
        columns: The columns that were used, as the file calls them.
        ignored_columns: Columns of the file that were not used.
        rows: The usable rows, in the file's order.
        findings: The first findings of each kind, in the file's order.
        finding_counts: How often each kind was found, in all.
        size_bytes: Size of the file.
    """

    path: Path
    format: str
    columns: tuple[str, ...]
    ignored_columns: tuple[str, ...]
    rows: Sequence[Row]
    findings: tuple[Finding, ...]
    finding_counts: Mapping[str, int]
    size_bytes: int

    def described(self) -> str:
        """Return what was recognised, for a person: `chat (messages), 591 rows`."""
        rows = "1 row" if len(self.rows) == 1 else f"{len(self.rows)} rows"
        return f"{self.format.replace('_', '/')} ({', '.join(self.columns)}), {rows}"
