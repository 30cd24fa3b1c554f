"""The rows of a data file: conversations or plain text, in one form for all formats of files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from studio.core.left_out import LEFT_OUT, reason
from studio.core.text import plain


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the assistant makes; `arguments` is the text of a JSON object."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: What is said; may be empty where an assistant calls tools.
        reasoning: What an assistant thinks before it answers.
        calls: The tools that an assistant calls.
        name: Of the tool whose result this is, or of who speaks.
        call_id: Of the call whose result this is.
        learnt: Whether the row lets this answer be learnt; weights and train flags of a file may forbid it.
        spans: The character ranges `[begin, end)` of `content` that are learnt; None for all of it.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""
    learnt: bool = True
    spans: tuple[tuple[int, int], ...] | None = None

    @property
    def words(self) -> str:
        """All that is thought, said and called in this turn."""
        calls = [f"{call.name} {call.arguments}" for call in self.calls]
        return (
            "\n".join(filter(None, (self.reasoning, self.content, *calls))) if calls or self.reasoning else self.content
        )


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, and what their chat template is told besides.

    Attributes:
        messages: The turns.
        number: The row's line in a JSONL file, else its place from 1.
        tools: The tools that may be called, as the text of a JSON list; empty for none.
        template_kwargs: Other variables for the chat template, as the text of a JSON object; empty for none.
        desirable: Whether the answer is a wanted one (KTO); None where the row does not say.
    """

    messages: tuple[Message, ...]
    number: int = 0
    tools: str = ""
    template_kwargs: str = ""
    desirable: bool | None = None

    @property
    def turns(self) -> tuple[Message, ...]:
        """Every turn of the row."""
        return self.messages

    @property
    def prompt(self) -> str:
        """All that the user and tools say, without the system prompt, which whole files share."""
        return _said(self.messages, "user", "tool")

    @property
    def answer(self) -> str:
        """All that the assistant says."""
        return _said(self.messages, "assistant")


@dataclass(frozen=True, slots=True)
class Preference:
    """Two ways to go on from the same turns, of which one is preferred.

    Attributes:
        asked: The turns that both share; ends with the user's or a tool's.
        chosen: The preferred continuation, which ends with an answer.
        rejected: The other one.
        number: The row's line in a JSONL file, else its place from 1.
        tools: As in `Conversation`.
        template_kwargs: As in `Conversation`.
    """

    asked: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    number: int = 0
    tools: str = ""
    template_kwargs: str = ""

    @property
    def turns(self) -> tuple[Message, ...]:
        """Every turn of the row: those asked, the preferred ones, the others."""
        return self.asked + self.chosen + self.rejected

    @property
    def prompt(self) -> str:
        """All that the user and tools say before the two part."""
        return _said(self.asked, "user", "tool")

    @property
    def answer(self) -> str:
        """All that the assistant says in the preferred continuation."""
        return _said(self.chosen, "assistant")

    @property
    def other_answer(self) -> str:
        """All that the assistant says in the rejected continuation."""
        return _said(self.rejected, "assistant")

    @property
    def sides(self) -> tuple[Conversation, Conversation]:
        """The preferred and the rejected conversation, each with the turns that they share, which are not learnt."""
        asked = tuple(replace(message, learnt=False) for message in self.asked)
        chosen, rejected = (
            Conversation(asked + side, self.number, self.tools, self.template_kwargs)
            for side in (self.chosen, self.rejected)
        )
        return chosen, rejected


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text to continue, trained from its first token to its end.

    Attributes:
        text: A document, or a section of a long one.
        number: The row's line in a JSONL file, else its place from 1; sections of a document share it.
        before: The end of the text before this section, which gives it context and is not trained; empty where the
            document begins.
        after: The beginning of the text after it, as above; empty where the document ends.
    """

    text: str
    number: int = 0
    before: str = ""
    after: str = ""

    @property
    def turns(self) -> tuple[Message, ...]:
        """The text as a turn of nobody's."""
        return (Message("", self.text),)

    @property
    def prompt(self) -> str:
        """Empty: a plain text has no prompt."""
        return ""

    @property
    def answer(self) -> str:
        """The text itself."""
        return self.text


Row = Conversation | PlainText | Preference


def _said(messages: Sequence[Message], *roles: str) -> str:
    return "\n".join(message.words for message in messages if message.role in roles)


_KEPT = {
    "unused_context": "a column such as context, which is not used, may hold what the answer rests on; it is learnt "
    "without",
    "calls_as_text": "calls of tools stand in the texts and are trained as these characters, because they cannot be "
    "taken apart or no tools are named",
    "long_document": "the text is longer than a million characters: it is read in sections, which count as rows here "
    "and follow one another without a gap in what is learnt",
    "last_turn_not_assistant": "what follows the last answer is left out",
    "media_placeholder": "'<image>' stands in the text, or another mark of a picture's place, and is trained as these "
    "characters; no picture is read",
}
"""Words for the findings that neither keep a file from being used nor leave the row out."""
_NAMED_UNUSED = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """Something found in one row. If it is fatal, the file must be corrected before training.

    Attributes:
        kind: Short stable name, such as `unknown_role`.
        row: Line of a JSONL file, else the row's place from 1.
        field: Column, or a place in it such as `messages[2].content`; empty for the whole row.
        message: What was found and what was wanted, safe to print.
        fatal: Whether `read_data` refuses the file for it.
        file: The file where there are several; then `row` counts within it.
    """

    kind: str
    row: int
    field: str
    message: str
    fatal: bool
    file: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """What a mixture draws of one of its sources.

    Attributes:
        data: The source, with all its rows.
        drawn: How many rows are drawn.
        row_tokens: Mean tokens of its rows' texts, by a sample; 0 where they cannot be counted.
    """

    data: "DataSet"
    drawn: int
    row_tokens: float = 0.0

    @property
    def tokens(self) -> int:
        """About how many tokens of text are drawn; 0 where they cannot be counted."""
        return round(self.drawn * self.row_tokens)


@dataclass(frozen=True, slots=True)
class DataSet:
    """A whole data file, or a mixture of several, normalised.

    Attributes:
        path: The file that was read.
        format: `chat`, `prompt_completion`, `alpaca` or `text`.
        columns: The columns that were used, as the file calls them.
        ignored_columns: Columns of the file that were not used, and fields of messages as `messages[].name`.
        rows: The usable rows, in the file's order.
        findings: The first findings of each kind, in the file's order.
        finding_counts: How often each kind was found, in all.
        size_bytes: Size of the file, or of all files.
        files: How many files were read.
        skipped: How many rows are left out because they are wrong, by what is wrong (`data.on_bad_row`).
        beside: The columns that were used as well, in some rows at least, as the file calls them.
        place_notes: What the user should know of which files were read, in a sentence each.
        word: The word that means exactly these files, see `studio.probe.data.places`.
        commit: Of a data set of the hub, the commit that was read.
        parts: Of a mixture, what is drawn of each source; rows and findings are then those of all of them.
    """

    path: Path
    format: str
    columns: tuple[str, ...]
    ignored_columns: tuple[str, ...]
    rows: Sequence[Row]
    findings: tuple[Finding, ...]
    finding_counts: Mapping[str, int]
    size_bytes: int
    parts: tuple[Part, ...] = ()
    files: int = 1
    skipped: Mapping[str, int] = field(default_factory=dict)
    place_notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    word: str = ""
    commit: str = ""

    @property
    def left_out(self) -> dict[str, int]:
        """How many rows are left out, for each reason in `studio.core.left_out`, then for each kind of bad row."""
        known = {kind: self.finding_counts[kind] for kind in LEFT_OUT if kind in self.finding_counts}
        return known | dict(self.skipped)

    def described(self) -> str:
        """Return what was recognised, in words: `chat (messages), 591 rows`."""
        rows = _rows(len(self.rows))
        if self.parts:
            return f"a mixture of {len(self.parts)} files, {rows}: {'; '.join(self.shares())}"
        columns = ", ".join(plain(column, one_line=True, limit=40) for column in self.columns)
        return f"{self.format.replace('_', '/')} ({columns}), {rows}"

    def beside_words(self) -> str:
        """Return in words which columns were used as well; empty for none."""
        named = [plain(column, one_line=True, limit=40) for column in self.beside[:_NAMED_UNUSED]]
        return f"used as well: {', '.join(named)}" if named else ""

    def shares(self) -> tuple[str, ...]:
        """Return in words how much of a mixture each source is: in rows and, where they can be counted, in tokens."""
        rows, tokens = (max(1, sum(counts)) for counts in zip(*((p.drawn, p.tokens) for p in self.parts), strict=True))
        counted_all = all(part.tokens for part in self.parts)
        said = []
        for part in self.parts:
            name, there = plain(part.data.path.name, one_line=True, limit=40), len(part.data.rows)
            times = f", each about {part.drawn / there:.1f} times" if part.drawn > there else ""
            share = f"{part.drawn:,} of {there:,} rows{times} ({part.drawn / rows:.0%} of the rows"
            share += f", about {part.tokens / tokens:.0%} of the tokens)" if counted_all else ")"
            said.append(f"{name} {share}")
        return tuple(said)

    def notes(self) -> tuple[str, ...]:
        """Return what must be corrected, what is left out, and what is not used of the file, in a sentence each."""
        if self.parts:
            return tuple(note for part in self.parts for note in part.data.notes())
        name = plain(self.path.name, one_line=True)
        fatal = {finding.kind for finding in self.findings if finding.fatal}
        counts = self.finding_counts
        said = [f"{name}: {note}." for note in self.place_notes]
        if wrong := {kind: count for kind, count in counts.items() if kind in fatal}:
            said.append(f"{name}: {_rows(sum(wrong.values()))} must be corrected: {counted(wrong)}.")
        if left := self.left_out:
            total = sum(left.values())
            reasons = ", ".join(f"{count} {reason(kind)}{self._first(kind)}" for kind, count in left.items())
            are = "is" if total == 1 else "are"
            said.append(f"{name}: {_rows(total)} {are} left out, {_rows(len(self.rows))} kept: {reasons}.")
        said += [
            f"{name}: in {_rows(counts[kind])} {words}{self._first(kind)}."
            for kind, words in _KEPT.items()
            if kind in counts
        ]
        if self.ignored_columns:
            named = [plain(column, one_line=True, limit=40) for column in self.ignored_columns[:_NAMED_UNUSED]]
            more = len(self.ignored_columns) - len(named)
            said.append(f"{name}: columns not used: {', '.join(named)}{f' and {more} more' if more else ''}.")
        return tuple(said)

    def _first(self, kind: str) -> str:
        first = next((finding for finding in self.findings if finding.kind == kind), None)
        if first is None:
            return ""
        return f" (the first: {f'{first.file}, ' if first.file else ''}row {first.row})"


def counted(kinds: Mapping[str, int]) -> str:
    """Return how often each kind was found: `2 x no_answer, 1 x not_text`."""
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
