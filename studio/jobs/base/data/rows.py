"""Turns rows of text into token ids and labels.

The labels are the answers, each with the stop token after it, or every token where `answers_only` is off. The stop
token is always among them, even if it is also the pad token, and it is added where the template leaves it out. Padding
is added later. A rendered chat is tokenised without adding special tokens, because the template has written them
already: it would begin with two start tokens. A plain text may have been rendered before too: if it begins with the
start token, the tokenizer's own is left out.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from studio.core.chat_options import PARTS
from studio.core.errors import JobFailed
from studio.core.recipe import Recipe
from studio.jobs.base.data.blocks import Ids, Mask, blocks, start_of, text_ids
from studio.jobs.base.data.labelled import Labeller
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.seen import missing
from studio.jobs.base.data.spans import Located, Locator
from studio.jobs.base.data.spelling import Renderer, Wanted
from studio.jobs.base.data.template import starts_with_bos, with_system_folded
from studio.probe.data import Conversation, PlainText, Preference, Row

_MOST_CHARACTERS = 2**24
"""Of rendered texts that are held at a time."""
_UNFOUND = "its answer is not found in what the chat template writes"


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row as the model sees it: token ids and labels, `[seq]` each; unlabelled places hold `IGNORED`."""

    input_ids: Ids
    labels: Ids


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row up to where its answer begins, and the answer in the data.

    Attributes:
        input_ids: Token ids of the prompt.
        text: What a user is shown of the prompt: the last turn before the answer.
        expected: The answer in the data.
    """

    input_ids: tuple[int, ...]
    text: str
    expected: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows are encoded.

    Attributes:
        seq_len: Longest example in tokens; what is longer loses its end, except plain texts in blocks.
        answers_only: Label only the answers.
        blocks: Make several examples of a plain text that is longer.
        stride: Tokens that such a block repeats from before it.
        document_ends: End every plain text with the end token.
        learn: The parts of an answer that are learnt.
        last_answer_only: Label only the last answer of a conversation.
    """

    seq_len: int
    answers_only: bool = True
    blocks: bool = True
    stride: int = 0
    document_ends: bool = True
    learn: tuple[str, ...] = PARTS
    last_answer_only: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Return how a recipe's rows are encoded."""
        data = recipe.data
        return cls(
            recipe.train.seq_len,
            data.answers_only,
            data.blocks,
            data.stride,
            data.document_ends,
            data.learn,
            data.last_answer_only,
        )


def sample_prompts(rows: Iterable[Row], tokenizer: Any, count: int, *, seq_len: int) -> list[Prompt]:
    """Return prompts for the first rows whose prompt is shorter than `seq_len` tokens, at most `count`.

    The prompt of a conversation is everything before its last answer; that of a plain text is its first half.
    """
    found: list[Prompt] = []
    renderer = Renderer(tokenizer)
    for row in rows:
        if len(found) >= count:
            break
        plain = isinstance(row, PlainText)
        asked = _half(row, seq_len) if isinstance(row, PlainText) else _question(_chat(row), renderer)
        if asked is None:
            continue
        text, shown, expected = asked
        ids = tuple(_text_ids([text], tokenizer)[0] if plain else tokenizer(text, add_special_tokens=False).input_ids)
        if 0 < len(ids) < seq_len:
            found.append(Prompt(ids, shown, expected))
    return found


def _half(row: PlainText, seq_len: int) -> tuple[str, str, str]:
    """Return the first half of a text, or of its beginning where it is longer than a row, and the other half."""
    middle = min(len(row.text) // 2, 2 * seq_len)  # a token has about four characters
    return row.text[:middle], row.text[:middle], row.text[middle : 4 * seq_len]


def _question(row: Conversation, renderer: Renderer) -> tuple[str, str, str] | None:
    before, answer = row.messages[:-1], row.messages[-1]
    for turns in (row.messages, with_system_folded(row.messages)) if before else ():
        wanted = Wanted(replace(row, messages=turns), len(turns) - 1, ask=True)
        for spelling in (None, renderer.best(wanted.row)):
            if (text := renderer.texts([wanted], spelling)[0]) is not None:
                return text, before[-1].content, answer.content or answer.words
    return None


class Encoder:
    """Turns chunks of rows into examples. It can be pickled; what it makes of a row depends on that row alone.

    Raises:
        JobFailed: The tokenizer cannot say where its tokens stand.
    """

    def __init__(self, tokenizer: Any, how: Encoding) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise JobFailed(
                "slow_tokenizer",
                f"The tokenizer ({type(tokenizer).__name__}) cannot say where its tokens stand in the text.",
                "Use a model folder that has a tokenizer.json.",
            )
        self.tokenizer = tokenizer
        self.how = how
        self.report = RowReport()
        # The last answer's example holds the whole conversation: with every token learnt there is no other.
        self.locator = Locator(tokenizer, how.learn, last_only=how.last_answer_only or not how.answers_only)
        self.labeller = Labeller(tokenizer, self.locator.special)
        self.start = start_of(tokenizer)
        self.special = re.compile("|".join(map(re.escape, self.locator.special)) or r"(?!)")  # (?!) matches nothing

    def encode(self, rows: Sequence[Row]) -> tuple[list[tuple[Example, ...]], RowReport]:
        """Return the examples of each row, none where the row is left out, and what happened to these rows.

        Of a preference it is the preferred conversation; `sides` returns both.
        Reports of several chunks are added up by `RowReport.add`; `RowReport.say` tells the user.
        """
        self.report = RowReport(rows=len(rows))
        texts = self._texts([row for row in rows if isinstance(row, PlainText)])
        chats = iter(self._chats([_chat(row) for row in rows if not isinstance(row, PlainText)]))
        found = [next(texts if isinstance(row, PlainText) else chats) for row in rows]
        made = [
            tuple(filter(None, (self._kept(row, ids, labelled) for ids, labelled in parts)))
            for row, parts in zip(rows, found, strict=True)
        ]
        return made, self.report

    def sides(
        self, rows: Sequence[Preference]
    ) -> tuple[list[tuple[tuple[Example, ...], tuple[Example, ...]]], RowReport]:
        """Return the examples of the preferred and of the rejected side of each row, and what happened to the sides.

        Each side is encoded as a conversation of its own, in which nothing is learnt that the other side shares. It has
        several examples where the template splits it, and none where it is left out.
        """
        sides = [side for row in rows for side in row.sides]
        made, report = self.encode(sides)
        return list(zip(made[::2], made[1::2], strict=True)), report

    def _texts(self, rows: Sequence[PlainText]) -> Iterator[list[tuple[Ids, Mask]]]:
        how, report = self.how, self.report
        if how.document_ends and self.tokenizer.eos_token_id is None:
            report.endless += sum(not row.after for row in rows)
        for row, text in zip(
            rows, text_ids(rows, self.tokenizer, start=self.start, ends=how.document_ends), strict=True
        ):
            report.seams += not text.agrees
            if how.blocks:
                made = list(blocks(text, start=self.start, seq_len=how.seq_len, stride=how.stride))
                report.long_texts += len(made) > 1 and not row.before
                report.blocks += len(made) if len(made) > 1 or row.before else 0
            else:  # of a document in sections, the first has more than is kept
                whole = np.concatenate([np.array(self.start, np.int32), text.ids])
                made = [] if row.before else [(whole, np.ones(len(whole), np.bool_))]
            yield made

    def _chats(self, rows: Sequence[Conversation]) -> list[list[tuple[Ids, Mask]]]:
        for row in rows:
            if match := next(filter(None, (self.special.search(message.content) for message in row.messages)), None):
                self.report.special += 1
                self.report.special_token = self.report.special_token or match.group()
        return [examples for few in self._apart(rows) for examples in self._examples(few)]

    def _apart(self, rows: Sequence[Conversation]) -> Iterator[list[Conversation]]:
        """Yield rows, so many at a time as are rendered in bounded memory: a row once and twice for each answer."""
        few, characters = list[Conversation](), 0
        for row in rows:
            said = sum(len(turn.words) for turn in row.messages) + len(row.tools)
            size = said * (1 + 2 * len(self.locator.places(row)))
            if few and characters + size > _MOST_CHARACTERS:
                yield few
                few, characters = [], 0
            few.append(row)
            characters += size
        if few:
            yield few

    def _examples(self, rows: Sequence[Conversation]) -> list[list[tuple[Ids, Mask]]]:
        located = self._located(rows)
        before = self.labeller.joined
        flat = iter(self.labeller.label([one for found in located for one in found.rendered]))
        made = []
        for found in located:
            examples = [example for _ in found.rendered for example in next(flat)]
            self.report.split += len(examples) > 1
            if len(examples) > 1:
                self.report.once += max(len(ids) for ids, _ in examples)
                self.report.apart += sum(len(ids) for ids, _ in examples)
                self.report.apart_learnt += sum(int(learnt.sum()) for _, learnt in examples)
            made.append(examples)
        self.report.joined += self.labeller.joined - before
        return made

    def _located(self, rows: Sequence[Conversation]) -> list[Located]:
        """Return where the answers of each row stand, in another spelling where only that makes a row usable."""
        report = self.report
        rows, located = list(rows), self.locator.locate(rows)
        for place, row in enumerate(rows):
            wanted = self.locator.places(row)
            if wanted and not located[place].rendered:
                rows[place], located[place] = self._mended(row)
            found = located[place]
            report.moved += found.moved
            if self.tokenizer.eos_token:
                report.stop_added += found.stop_added
            else:
                report.endless += found.stop_added
            report.mixed += found.mixed
            report.ended_within += found.ended_within
            if not wanted:
                report.dropped += 1
            elif found.rendered:
                if found.lost:
                    report.lost.add(row.number, {"answers": found.lost})
                absent = missing(rows[place], [one.text for one in found.rendered], found.said)
                for name in self.locator.renderer.unknown(row):
                    absent["documents" if name == "documents" else "variables"] += 1
                if absent:
                    report.unseen.add(row.number, absent)
        return located

    def _mended(self, row: Conversation) -> tuple[Conversation, Located]:
        """Return a row that the template refuses in another spelling, or with its system turn folded in; count it."""
        found = self.locator.locate([row], self.locator.renderer.best(row))[0]
        if found.rendered:
            return row, found
        folded = replace(row, messages=with_system_folded(row.messages))
        if folded != row:
            found = self.locator.locate([folded])[0]
            if found.rendered:
                self.report.folded += 1
                return folded, found
        self.report.refused += 1
        if not self.report.reason:
            self.report.reason = f"row {row.number}: {self.locator.renderer.why_refused(row) or _UNFOUND}"
        return row, found

    def _kept(self, row: Row, ids: Ids, labelled: Mask) -> Example | None:
        """Return the example cut to its length, or None where nothing can be learnt from it; count it either way."""
        report, seq_len = self.report, self.how.seq_len
        # What a block of a text repeats is never learnt again.
        masked = self.how.answers_only or isinstance(row, PlainText)
        labels = np.where(labelled, ids, np.int32(IGNORED)) if masked else ids
        report.longest = max(report.longest, len(ids))
        report.cut += len(ids) > seq_len
        # Nothing precedes the first token, so it is never predicted: a label there teaches nothing.
        loss_tokens = int(np.count_nonzero(labels[1:seq_len] != IGNORED))
        if not loss_tokens:
            report.dropped += 1
            return None
        report.examples += 1
        report.tokens += min(len(ids), seq_len)
        report.loss_tokens += loss_tokens
        # Copies: a slice would keep the whole long row in memory.
        return Example(ids[:seq_len].copy(), labels[:seq_len].copy())


def _chat(row: Conversation | Preference) -> Conversation:
    return row.sides[0] if isinstance(row, Preference) else row


def _text_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of plain texts with the special tokens that the tokenizer adds, but one start token only."""
    rows: list[list[int]] = tokenizer(list(texts)).input_ids
    twice = [tokenizer.bos_token_id] * 2
    # A text without a start token gets one at most, so the second is its own.
    return [ids[1:] if ids[:2] == twice and starts_with_bos(tokenizer) else ids for ids in rows]
