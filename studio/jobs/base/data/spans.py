"""Finds where the answers stand in a rendered conversation, stop tokens included.

A template with `{% generation %}` blocks marks them itself, unless its blocks hold the header of the turn too: nobody
generates that, the generation prompt has written it. Otherwise three texts are rendered: the whole conversation;
for each answer the turns before it with a generation prompt, at whose end the answer begins; and for each answer the
turns up to it, at whose end the answer ends. The latter two must be prefixes of the whole. They are not if the template
rewrites earlier turns: if it drops old reasoning, or writes another end token after the last answer. Then each answer
becomes an example of its own, a conversation that ends with that answer, as the model will see it in use.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studio.jobs.base.data.bounded import apply_template
from studio.jobs.base.data.template import Turns, render, table_of
from studio.jobs.base.tokenizer import stop_ids
from studio.probe.data import Message


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and its answers as character ranges `[begin, end)`, each with its stop token if any."""

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Located:
    """Where the answers of one conversation were found.

    Attributes:
        rendered: One text, or one per answer where the template rewrites earlier turns; empty where no answer is found.
        split: Whether the template rewrites earlier turns.
        moved: Whether an answer does not begin where the generation prompt ends.
        stop_added: Whether the template left a stop token out and it was added.
        lost: Answers that became no example where each was to become one: the template refuses or does not write them.
    """

    rendered: tuple[Rendered, ...]
    split: bool = False
    moved: bool = False
    stop_added: bool = False
    lost: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """One answer: its place among the turns, and the rendered text up to its beginning and up to its end."""

    place: int
    opened: str | None
    closed: str | None


_NOWHERE = Located(())
_LONGEST_TAG = 64
_UNCLOSED = re.compile(r"[<\[][^<>\[\]\s]*\Z")


class Locator:
    """Finds answers with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)

    def locate(self, conversations: Sequence[Turns]) -> list[Located]:
        """Return where the answers of each conversation stand; each conversation must end with an assistant turn."""
        places = [[i for i, turn in enumerate(turns) if turn.role == "assistant"] for turns in conversations]
        found: list[Located] = []
        for turns, answers, located in zip(conversations, places, self._attempt(conversations, places), strict=True):
            if located is None:
                own = self._attempt([turns[: i + 1] for i in answers], [[i] for i in answers])
                found.append(_joined([part or _NOWHERE for part in own]))
            else:
                found.append(located)
        return found

    def _attempt(self, conversations: Sequence[Turns], places: Sequence[Sequence[int]]) -> list[Located | None]:
        """Locate the answers that are the given turns; None for conversations whose earlier turns are rewritten."""
        pairs = [(row, i) for row, answers in enumerate(places) for i in answers]
        # The last answer ends where the whole text ends, which is rendered anyway.
        inner = [(row, i) for row, i in pairs if i + 1 < len(conversations[row])]
        whole = render(self.tokenizer, conversations)
        opened = render(self.tokenizer, [conversations[row][:i] for row, i in pairs], ask=True)
        closed = render(self.tokenizer, [conversations[row][: i + 1] for row, i in inner])
        begins, ends = dict(zip(pairs, opened, strict=True)), dict(zip(inner, closed, strict=True))
        found: list[Located | None] = []
        for row, text in enumerate(whole):
            parts = [_Part(i, begins[row, i], ends.get((row, i), text)) for i in places[row]]
            if text is None:
                found.append(_NOWHERE)
            elif len(parts) > 1 and _rewritten(text, parts):
                found.append(None)
            else:
                found.append(self._spans(conversations[row], text, parts))
        return found

    def _spans(self, turns: Turns, text: str, parts: Sequence[_Part]) -> Located:
        made, at, answers, moved, added = "", 0, [], False, False
        for part in parts:
            opened, closed = part.opened or "", part.closed or text
            begin = self._beginning(turns, part.place, text, opened, closed)
            # White space after the stop token belongs to the template, not to the answer.
            stop = begin + len(text[begin : len(closed)].rstrip())
            if begin == stop:
                return _NOWHERE
            made += text[at:begin]
            first, at = len(made), stop
            made += text[begin:stop]
            if not text[begin:stop].endswith(self.special):
                made, added = made + (self.tokenizer.eos_token or ""), True
            answers.append((first, len(made)))
            moved |= part.place > 0 and begin != len(opened)
        return Located((Rendered(made + text[at:], tuple(answers)),), moved=moved, stop_added=added)

    def _beginning(self, turns: Turns, place: int, text: str, opened: str, closed: str) -> int:
        """Return where an answer begins, as an index into the text; the text's length means "not found".

        That is where the generation prompt ends, if the text begins with it. It does not where the prompt opens
        reasoning that the template leaves out of the whole, or where the answer is the very first turn. Then the
        answer's own words are searched for behind the part that both texts share.
        """
        if place and opened and text.startswith(opened):
            return len(opened)
        shared = next(
            (n for n, (one, other) in enumerate(zip(opened, text, strict=False)) if one != other), len(opened)
        )
        # `<think>` of the prompt and `<tool_call>` of an answer share `<t`, which is the answer's all the same.
        shared = _before_tag(text, shared)
        asked = turns[place - 1].content.strip() if place else ""
        if asked not in text[:shared]:
            return len(text)
        end = len(text[: len(closed)].rstrip())
        end -= next((len(token) for token in self.special if text.endswith(token, 0, end)), 0)
        for words in (turns[place].content.rstrip(), turns[place].content.strip()):
            if words and text.endswith(words, shared, len(text[:end].rstrip())):
                return len(text[:end].rstrip()) - len(words)
        found = text.rfind(turns[place].content.strip(), shared, len(closed))
        if found < 0 and asked:
            return shared
        return found if found >= 0 else len(text)


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the tokens that can open or end a turn: those marked special (`</think>` and similar ones are not)."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(filter(None, special | set(tokenizer.all_special_tokens))))


def _before_tag(text: str, end: int) -> int:
    """Return where a tag begins that is not closed before `end`; `end` where there is none."""
    found = _UNCLOSED.search(text[:end], max(0, end - _LONGEST_TAG))
    return found.start() if found else end


def _rewritten(text: str, parts: Sequence[_Part]) -> bool:
    """Return whether the text rendered for the first turns is not how the text of the whole conversation begins."""
    beginnings = [part.opened for part in parts if part.place] + [part.closed for part in parts]
    return not all(beginning is not None and text.startswith(beginning) for beginning in beginnings)


def _joined(parts: Sequence[Located]) -> Located:
    return Located(
        tuple(one for part in parts for one in part.rendered),
        split=True,
        moved=any(part.moved for part in parts),
        stop_added=any(part.stop_added for part in parts),
        lost=sum(not part.rendered for part in parts),
    )


_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SAMPLE = (Message("user", "QUESTION"), Message("assistant", "ANSWER"))


class Marks:
    """Takes the answers from the generation blocks of one tokenizer's chat template.

    Attributes:
        usable: Whether the template has such blocks and they begin behind the turn's header.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = {tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)}
        self.usable = isinstance(tokenizer.chat_template, str) and bool(_BLOCK.search(tokenizer.chat_template))
        text = render(tokenizer, [_SAMPLE])[0] if self.usable else None
        if text is None:
            self.usable = False
            return
        encoded = self._encoded([_SAMPLE])
        begin = next((place for place, inside in enumerate(encoded["assistant_masks"][0]) if inside), None)
        opened = render(tokenizer, [_SAMPLE[:1]], ask=True)[0]
        if begin is None or (opened and text.startswith(opened) and _begins(encoded, begin) < len(opened)):
            self.usable = False
        self.stop_ids = set(stop_ids(tokenizer, None))

    def rows(self, conversations: Sequence[Turns]) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Return token ids and whether each is part of an answer, `[seq]` each.

        The stop token belongs to the answer, in the block or behind it; if the template writes none, one is added.
        White space that a block holds behind its stop token does not.
        """
        encoded = self._encoded(conversations)
        rows = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        return [self._with_stops(ids, mask) for ids, mask in rows]

    def _encoded(self, conversations: Sequence[Turns]) -> Any:
        tables = [table_of(turns) for turns in conversations]
        return apply_template(
            self.tokenizer, tables, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )

    def _with_stops(self, ids: Sequence[int], mask: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        made: list[int] = []
        labelled: list[bool] = []
        at, eos = 0, self.tokenizer.eos_token_id
        for begin, end in _runs(mask):
            stop = end
            while stop > begin and self.tokenizer.decode([ids[stop - 1]]).isspace():
                stop -= 1
            stopped = stop > begin and ids[stop - 1] in self.special_ids
            if not stopped and end < len(ids) and ids[end] in self.stop_ids:
                stop, stopped = end + 1, True
            made += ids[at:stop]
            labelled += [False] * (begin - at) + [True] * (stop - begin)
            if not stopped and eos is not None:
                made.append(eos)
                labelled.append(True)
            at = stop
        made += ids[at:]
        labelled += [False] * (len(ids) - at)
        return np.array(made, np.int32), np.array(labelled, np.bool_)


def _begins(encoded: Any, place: int) -> int:
    """Return the character at which a token of the first row begins."""
    return int(encoded.token_to_chars(0, place).start)


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges `[begin, end)` of tokens inside blocks."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(mask) != 0, [0]))))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]
