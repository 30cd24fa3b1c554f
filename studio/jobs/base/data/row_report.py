"""What became of the rows on their way to token ids: counts for the run, sentences for the user."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.jobs.base.data.template import Warn

_MANY = 3
"""From so many times the tokens of one pass on, the way out is named: it costs the answers before the last."""


@dataclass(slots=True)
class Missing:
    """What of the rows is missing in what the chat template writes.

    Attributes:
        rows: Rows of which something is missing.
        first: The number of the first of them.
        counts: How much of each kind is missing: of a role, `reasoning` or `answers`.
    """

    rows: int = 0
    first: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, number: int, counts: Mapping[str, int]) -> None:
        """Count one more row."""
        self.first = self.first if self.rows else number
        self.rows += 1
        self.counts.update(counts)

    def join(self, other: "Missing") -> None:
        """Add what is missing in rows that come after these."""
        self.first = self.first if self.rows else other.first
        self.rows += other.rows
        self.counts.update(other.counts)

    def __str__(self) -> str:
        return ", ".join(f"{count} x {plain(kind, one_line=True)}" for kind, count in sorted(self.counts.items()))


@dataclass(slots=True)
class RowReport:
    """What happened to the rows, as counts.

    Attributes:
        rows: Rows that were given.
        examples: Examples that were made of them; more than the rows where a template rewrites earlier turns.
        refused: Rows that the chat template refuses, or whose answer is not found in the rendered text.
        cut: Examples longer than the limit, cut on the right.
        dropped: Examples without a label, most often because the cut took the whole answer.
        tokens: Tokens of the kept examples.
        loss_tokens: Those with a label.
        longest: Tokens of the longest example before cutting.
        split: Rows whose answers became several examples.
        moved: Rows whose answers do not begin where the generation prompt ends.
        stop_added: Rows in which a stop token was added after an answer.
        endless: Rows after whose answer no stop token could be added, because the tokenizer has none.
        folded: Rows whose system prompt was put before the user's first words.
        special: Conversations whose own text contains one of the tokenizer's special tokens.
        special_token: One of those tokens.
        once: Tokens of the longest example of each split row, added up: what one pass over the rows would take.
        apart: Tokens of all examples of split rows.
        apart_learnt: Those that are learnt.
        ended_within: Answers that the template interrupts with the end token.
        mixed: Answers of which only some parts are to be learnt, and the parts cannot be told apart.
        joined: Answers whose first token holds characters of the prompt.
        lost: Answers that the template refuses or does not write, of rows that have others.
        unseen: Messages and reasoning that stand in none of the examples made of their row.
        long_texts: Plain texts that are longer than a row.
        blocks: Examples that were made of them.
        seams: Sections of long texts whose first tokens depend on how much is known of the text before them.
        reason: Why the first refused row was refused, with its number.
    """

    rows: int = 0
    examples: int = 0
    refused: int = 0
    cut: int = 0
    dropped: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    split: int = 0
    moved: int = 0
    stop_added: int = 0
    endless: int = 0
    folded: int = 0
    special: int = 0
    special_token: str = ""
    once: int = 0
    apart: int = 0
    apart_learnt: int = 0
    ended_within: int = 0
    mixed: int = 0
    joined: int = 0
    lost: Missing = field(default_factory=Missing)
    unseen: Missing = field(default_factory=Missing)
    long_texts: int = 0
    blocks: int = 0
    seams: int = 0
    reason: str = ""

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """Return the report that `dataclasses.asdict` made a table of, and JSON a text of that."""
        made = cls(**table)
        for place in fields(cls):
            if isinstance(value := getattr(made, place.name), dict):
                setattr(made, place.name, Missing(value["rows"], value["first"], Counter(value["counts"])))
        return made

    def add(self, other: "RowReport") -> None:
        """Add the report of rows that come after these."""
        for place in fields(self):
            mine, theirs = getattr(self, place.name), getattr(other, place.name)
            if isinstance(mine, Missing):
                mine.join(theirs)
            elif isinstance(mine, str):
                setattr(self, place.name, mine or theirs)
            else:
                setattr(self, place.name, max(mine, theirs) if place.name == "longest" else mine + theirs)

    def say(self, seq_len: int, end_token: str, warn: Warn) -> None:
        """Warn of everything that the user should know, in one sentence each.

        Args:
            seq_len: The longest that an example may be, in tokens.
            end_token: The tokenizer's end token.
            warn: Called with each sentence.
        """
        end = plain(end_token, one_line=True)
        reason = plain(self.reason, one_line=True, limit=300)
        said = {
            f"The chat template knows no system prompt: in {self.folded} rows it was put before the user's first "
            "words.": self.folded,
            f"The chat template rewrites earlier turns: in {self.split} rows answers became examples of their "
            f"own{self._cost()}.": self.split,
            f"In {self.lost.rows} rows the chat template refuses or leaves out {self.lost.counts['answers']} answers, "
            f"which are not learnt (the first: row {self.lost.first}).": self.lost.rows,
            f"The chat template leaves out parts of {self.unseen.rows} rows, which the model does not see: "
            f"{self.unseen} (the first: row {self.unseen.first}).": self.unseen.rows,
            f"In {self.moved} rows the chat template leaves out what its generation prompt opens with (reasoning, as a "
            "rule).": self.moved,
            f"The chat template ends answers without a stop token: {end} was added in {self.stop_added} rows, so that "
            "the model learns to stop.": self.stop_added,
            f"In {self.special} rows the text itself holds special tokens such as {plain(self.special_token)}. If the "
            "data was rendered with a chat template already, give it as plain text.": self.special,
            f"In {self.ended_within} answers the chat template writes {end} before their end, where generation stops: "
            "what follows it is learnt, and seldom reached.": self.ended_within,
            f"{self.joined} answers share their first token with what is asked; it is not learnt.": self.joined,
            f"In {self.mixed} answers the parts that data.learn names cannot be told apart from the others; nothing of "
            "these answers is learnt.": self.mixed,
            f"The tokenizer has no end token: {self.endless} rows do not teach the model to stop.": self.endless,
            f"{self.refused} of {self.rows} rows are left out: {reason}.": self.refused,
            f"Texts longer than train.seq_len = {seq_len} tokens: {self.long_texts}, which became {self.blocks} "
            "blocks; no token is lost.": self.long_texts,
            f"At {self.seams} places where a long text is read in sections, the tokenizer makes a few tokens other "
            "than those of the whole text.": self.seams,
            f"{self.cut} rows are longer than train.seq_len = {seq_len} tokens and lose their end; the longest has "
            f"{self.longest}.": self.cut,
            f"{self.dropped} rows are left out: no token of an answer is left in them to learn from.": self.dropped,
        }
        for sentence, count in said.items():
            if count:
                warn(sentence)

    def _cost(self) -> str:
        """Return what splitting multiplies: the tokens that go through the model in place of one pass over the rows."""
        if self.apart <= self.once:
            return ""
        times = f"{self.apart / self.once:.1f} times as many"
        advice = "; with data.last_answer_only = true it is one pass" if self.apart > _MANY * self.once else ""
        return (
            f": {self.apart} tokens in place of {self.once} ({times}) for {self.apart_learnt} that are learnt{advice}"
        )

    def nothing_left(self, seq_len: int) -> JobFailed:
        """Return the error for data of which no row can be trained on."""
        if self.refused == self.rows:
            reason = plain(self.reason, one_line=True, limit=300)
            message = f"The chat template refuses every row: {reason}."
            return JobFailed("template_refused", message, "Correct the roles or the order of the turns in the data.")
        return JobFailed(
            "all_labels_masked",
            f"No row has a token left to learn from: {self.cut} of {self.rows} are cut at train.seq_len = {seq_len}; "
            f"the longest has {self.longest} tokens.",
            f"Raise train.seq_len towards {self.longest}, or shorten the prompts.",
        )
