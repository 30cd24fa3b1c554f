"""Plain texts as blocks of the row length: every token is learnt once, however long the text.

A block after the first begins with the last tokens of the block before it, one at least, which are context and are not
learnt again: without any, its first token would follow nothing and never be predicted. Where the tokenizer begins a
text with its start token, every block begins with it, as a served prompt does.

A section of a long document (`studio.probe.data.documents`) is tokenised together with a little of the text around it,
and keeps the tokens that begin in it. So its tokens are those of the whole document, provided that a tokenizer soon
agrees with itself, wherever it began to read. Whether it does is looked at where each section begins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studio.probe.data import PlainText

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

_AGREED = 16
"""Tokens at the beginning of a section that must not depend on how much of the text before it is known."""


@dataclass(frozen=True, slots=True)
class TextIds:
    """The tokens of a text.

    Attributes:
        ids: Its own, `[tokens]`, with an end token where it has one.
        before: Those of the text before it, as far as it is known.
        agrees: Whether the first ones are the same with less of the text before it.
    """

    ids: Ids
    before: Ids
    agrees: bool = True


def start_of(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer itself puts before a text: its start token, as a rule, or none."""
    bare, whole = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    places = (place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return list(whole[: next(places, 0)])


def text_ids(rows: Sequence[PlainText], tokenizer: Any, *, start: Sequence[int], ends: bool) -> Iterator[TextIds]:
    """Yield the tokens of each text, without start tokens; with an end token if `ends`, where a document ends.

    A text that was rendered before may begin or end with these tokens itself: it gets no second ones.

    Args:
        rows: Documents, or sections of them.
        tokenizer: A fast tokenizer.
        start: As `start_of` returns it.
        ends: Whether a document's end is learnt.
    """
    eos = tokenizer.eos_token_id
    if not rows:
        return
    encoded = tokenizer([row.before + row.text + row.after for row in rows], add_special_tokens=False, verbose=False)
    for number, row in enumerate(rows):
        ids = np.array(encoded["input_ids"][number], np.int32)
        begin, stop = len(row.before), len(row.before) + len(row.text)
        first = _first_from(encoded, number, begin, stop + len(row.after))
        last = _first_from(encoded, number, stop, stop + len(row.after)) if row.after else len(ids)
        own, before = ids[first:last], ids[:first]
        if start and not row.before and own[: len(start)].tolist() == list(start):
            own = own[len(start) :]
        if ends and not row.after and eos is not None and own[-1:].tolist() != [eos]:
            own = np.append(own, np.int32(eos))
        late = _late(encoded, number, first, begin)
        yield TextIds(own, before, not row.before or _agrees(row, tokenizer, own, late))


def blocks(text: TextIds, *, start: Sequence[int], seq_len: int, stride: int) -> Iterator[tuple[Ids, Mask]]:
    """Yield a text's blocks of at most `seq_len` tokens: token ids and whether each token is learnt, `[block]` each.

    Args:
        text: The tokens of a document, or of a section of one.
        start: The tokens that begin every block.
        seq_len: Most tokens of a block; there must be room for the start and two more.
        stride: Tokens that a block repeats from before it: one at least, and half of a block at most, because an audit
            may have shorter rows than the training whose stride it takes.
    """
    head = np.array(start, np.int32)
    done, whole = len(text.before), np.concatenate([text.before, text.ids])
    room = max(1, seq_len - len(head))
    while done < len(whole):
        repeated = min(max(1, stride), seq_len // 2, room - 1, done)
        stop = min(len(whole), done + room - repeated)
        ids = np.concatenate([head, whole[done - repeated : stop]])
        learnt = np.ones(len(ids), np.bool_)
        if done:
            learnt[: len(head) + repeated] = False
        yield ids, learnt
        done = stop


def _first_from(encoded: Any, number: int, begin: int, stop: int) -> int:
    """Return the index of the first token that begins at `begin` or later; how many there are if none does.

    Characters are tried one by one, because some tokenizers have no token for white space.
    """
    for character in range(begin, stop) if begin else ():
        token = encoded.char_to_token(number, character)
        if token is not None and encoded.token_to_chars(number, token).start >= begin:
            return int(token)
    return len(encoded["input_ids"][number]) if begin else 0


def _late(encoded: Any, number: int, token: int, begin: int) -> int:
    """Return how many characters after `begin` a token begins; there may be no such token."""
    known = token < len(encoded["input_ids"][number])
    return int(encoded.token_to_chars(number, token).start) - begin if known else -1


def _agrees(row: PlainText, tokenizer: Any, own: Ids, late: int) -> bool:
    """Return whether a section's first tokens are the same if only half of the text before it is known.

    Tried with one character more as well: in a run of one letter every second beginning might agree by chance.
    """
    half = len(row.before) // 2
    ahead = (row.text + row.after)[: len(row.before)]
    for less in (row.before[half:], row.before[half + 1 :]):
        encoded = tokenizer([less + ahead], add_special_tokens=False)
        ids = encoded["input_ids"][0]
        first = _first_from(encoded, 0, len(less), len(less) + len(ahead))
        # Not up to where the shorter text ends: its last tokens would be others.
        again = ids[first : first + min(_AGREED, max(1, len(ids) - first - 1))]
        if own[: len(again)].tolist() != again or _late(encoded, 0, first, len(less)) != late:
            return False
    return True
