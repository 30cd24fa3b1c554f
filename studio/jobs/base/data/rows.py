"""Turns rows of text into token ids and labels.

The labels are the answers, each with the stop token after it, or every token where `answers_only` is off. The stop
token is always among them, even if it is also the pad token, and it is added where the template leaves it out. Padding
is added later. A rendered chat is tokenised without adding special tokens, because the template has written them
already: it would begin with two start tokens. A plain text may have been rendered before too: if it begins with the
start token, the tokenizer's own is left out.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studio.core.errors import JobFailed
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.spans import Located, Locator, Marks, Rendered
from studio.jobs.base.data.template import Warn, left_out, render, starts_with_bos, why_refused, with_system_folded
from studio.probe.data import Conversation, PlainText, Preference, Row

_CHUNK_ROWS = 256
"""Rows that are tokenised in one call; progress is told after each call."""
_UNFOUND = "its answer is not found in what the chat template writes"

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


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


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    seq_len: int,
    answers_only: bool = True,
    warn: Warn,
    progress: Callable[[float], None] | None = None,
) -> tuple[list[Example], RowReport]:
    """Return the rows as examples of at most `seq_len` tokens, and a report of what happened to them.

    The tokenizer must have a chat template where the rows are conversations (see `template.ensure_template`).

    Args:
        rows: Conversations that end with an answer, or plain texts.
        tokenizer: A fast tokenizer.
        seq_len: Longest example in tokens; what is longer loses its end.
        answers_only: Label only the answers.
        warn: Told what the user should know, each thing once.
        progress: Told the fraction done, 0 to 1.

    Raises:
        JobFailed: No row is left with anything to learn, or the tokenizer cannot say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise JobFailed(
            "slow_tokenizer",
            f"The tokenizer ({type(tokenizer).__name__}) cannot say where its tokens stand in the text.",
            "Use a model folder that has a tokenizer.json.",
        )
    report = RowReport(rows=len(rows))
    encoder = _Encoder(tokenizer, report)
    examples: list[Example] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        for ids, labelled in encoder.encode(rows[start : start + _CHUNK_ROWS]):
            labels = np.where(labelled, ids, np.int32(IGNORED)) if answers_only else ids
            if example := _kept(ids, labels, seq_len, report):
                examples.append(example)
        if progress:
            progress(min(start + _CHUNK_ROWS, len(rows)) / len(rows))
    report.say(seq_len, tokenizer.eos_token or "", warn)
    if rows and not examples:
        raise report.nothing_left(seq_len)
    return examples, report


def sample_prompts(rows: Iterable[Row], tokenizer: Any, count: int, *, seq_len: int) -> list[Prompt]:
    """Return prompts for the first rows whose prompt is shorter than `seq_len` tokens, at most `count`.

    The prompt of a conversation is everything before its last answer; that of a plain text is its first half.
    """
    found: list[Prompt] = []
    for row in rows:
        if len(found) >= count:
            break
        asked = _half(row) if isinstance(row, PlainText) else _question(row, tokenizer)
        if asked is None:
            continue
        text, shown, expected = asked
        plain = isinstance(row, PlainText)
        ids = tuple(_text_ids([text], tokenizer)[0] if plain else tokenizer(text, add_special_tokens=False).input_ids)
        if 0 < len(ids) < seq_len:
            found.append(Prompt(ids, shown, expected))
    return found


def _half(row: PlainText) -> tuple[str, str, str]:
    middle = len(row.text) // 2
    return row.text[:middle], row.text[:middle], row.text[middle:]


def _question(row: Conversation | Preference, tokenizer: Any) -> tuple[str, str, str] | None:
    turns = row.messages if isinstance(row, Conversation) else row.asked + row.chosen
    before, answer = turns[:-1], turns[-1].content
    if not before:
        return None
    for turns in (before, with_system_folded(before)):
        if (text := render(tokenizer, [turns], ask=True)[0]) is not None:
            return text, before[-1].content, answer
    return None


class _Encoder:
    """Tokenises chunks of rows, and counts in the report what templates do to them."""

    def __init__(self, tokenizer: Any, report: RowReport) -> None:
        self.tokenizer = tokenizer
        self.report = report
        self.locator = Locator(tokenizer)
        self.marks = Marks(tokenizer)
        self.special = re.compile("|".join(map(re.escape, self.locator.special)) or r"(?!)")  # (?!) matches nothing

    def encode(self, rows: Sequence[Row]) -> Iterator[tuple[Ids, Mask]]:
        """Yield for each example its token ids and whether each token is learnt, `[seq]` each; texts come first."""
        texts = [row.text for row in rows if isinstance(row, PlainText)]
        chats = [row for row in rows if isinstance(row, Conversation)]
        for row in chats:
            found = next(filter(None, (self.special.search(message.content) for message in row.messages)), None)
            if found:
                self.report.special += 1
                self.report.special_token = found.group()
        if texts:
            yield from self._texts(texts)
        if chats and self.marks.usable:
            yield from self._masked(chats)
        elif chats:
            yield from self._located(chats)

    def _texts(self, texts: Sequence[str]) -> Iterator[tuple[Ids, Mask]]:
        eos = self.tokenizer.eos_token_id
        self.report.endless += len(texts) if eos is None else 0
        for ids in _text_ids(texts, self.tokenizer):
            whole = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
            yield np.array(whole, np.int32), np.ones(len(whole), np.bool_)

    def _masked(self, rows: Sequence[Conversation]) -> list[tuple[Ids, Mask]]:
        texts = self._rendered(rows)
        usable = self._without_refused(rows, [text is not None for text in texts])
        if list(usable) != list(rows):
            texts = self._rendered(usable)
        for row, text in zip(usable, texts, strict=True):
            self._compare(row, [text or ""])
        return self.marks.rows([row.messages for row in usable]) if usable else []

    def _located(self, rows: Sequence[Conversation]) -> list[tuple[Ids, Mask]]:
        located = self._locate(rows)
        usable = self._without_refused(rows, [bool(found.rendered) for found in located])
        if list(usable) != list(rows):
            located = self._locate(usable)
        self.report.split += sum(found.split for found in located)
        self.report.moved += sum(found.moved for found in located)
        for row, found in zip(usable, located, strict=True):
            if found.lost:
                self.report.lost.add(row.number, {"answers": found.lost})
            self._compare(row, [one.text for one in found.rendered])
        added = sum(found.stop_added for found in located)
        if self.tokenizer.eos_token:
            self.report.stop_added += added
        else:
            self.report.endless += added
        return _labelled([one for found in located for one in found.rendered], self.tokenizer)

    def _compare(self, row: Conversation, texts: Sequence[str]) -> None:
        """Count what of a row's messages stands in none of the texts that were made of it."""
        if missing := left_out(row.messages, texts):
            self.report.unseen.add(row.number, missing)

    def _without_refused(self, rows: Sequence[Conversation], usable: Sequence[bool]) -> list[Conversation]:
        """Return the usable rows, and of the others those that become usable when their system turn is folded in."""
        if all(usable):
            return list(rows)
        folded = [
            row if good else replace(row, messages=with_system_folded(row.messages))
            for row, good in zip(rows, usable, strict=True)
        ]
        good_now = [bool(found.rendered) for found in self._locate(folded)]
        self.report.folded += sum(now and not before for now, before in zip(good_now, usable, strict=True))
        self.report.refused += good_now.count(False)
        if not all(good_now) and not self.report.reason:
            row = rows[good_now.index(False)]
            self.report.reason = f"row {row.number}: {why_refused(self.tokenizer, row.messages) or _UNFOUND}"
        return [row for row, good in zip(folded, good_now, strict=True) if good]

    def _rendered(self, rows: Sequence[Conversation]) -> list[str | None]:
        return render(self.tokenizer, [row.messages for row in rows])

    def _locate(self, rows: Sequence[Conversation]) -> list[Located]:
        return self.locator.locate([row.messages for row in rows])


def _text_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of plain texts with the special tokens that the tokenizer adds, but one start token only."""
    rows: list[list[int]] = tokenizer(list(texts)).input_ids
    twice = [tokenizer.bos_token_id] * 2
    # A text without a start token gets one at most, so the second is its own.
    return [ids[1:] if ids[:2] == twice and starts_with_bos(tokenizer) else ids for ids in rows]


def _labelled(rendered: Sequence[Rendered], tokenizer: Any) -> list[tuple[Ids, Mask]]:
    """Return token ids of rendered chats, and which tokens begin inside an answer, `[seq]` each."""
    if not rendered:
        return []
    encoded = tokenizer([one.text for one in rendered], add_special_tokens=False)
    made = []
    for row, one in enumerate(rendered):
        ids = np.array(encoded["input_ids"][row], np.int32)
        labelled = np.zeros(len(ids), np.bool_)
        for begin, stop in one.answers:
            first, last = _token_from(encoded, row, begin, stop), _token_from(encoded, row, stop, len(one.text))
            labelled[len(ids) if first is None else first : len(ids) if last is None else last] = True
        made.append((ids, labelled))
    return made


def _token_from(encoded: Any, row: int, begin: int, stop: int) -> int | None:
    """Return the index of the first token that begins in the characters `[begin, stop)`, or None.

    Characters are tried one by one, because some tokenizers have no token for white space.
    """
    for character in range(begin, stop):
        token = encoded.char_to_token(row, character)
        if token is not None and encoded.token_to_chars(row, token).start >= begin:
            return int(token)
    return None


def _kept(ids: Ids, labels: Ids, seq_len: int, report: RowReport) -> Example | None:
    """Return the example cut to `seq_len`, or None where nothing can be learnt from it; count it either way."""
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
