"""Turns rendered conversations into token ids, and says which tokens are learnt.

What stands before an answer must be the very tokens that the model is served with: those of its prompt, tokenised by
itself. Tokenised with the answer behind it, its last characters may join the answer's first ones in one token. Then the
answer is tokenised by itself from there on, in an example of its own.

Where each token stands in its text takes a tokenizer a third more time to say. Most texts do without it: special tokens
cut them, and the short pieces before and behind an answer have the same tokens by themselves.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from studio.jobs.base.data.blocks import Ids, Mask
from studio.jobs.base.data.spans import Answer, Rendered

_MOST_KEPT = 256
"""Characters of a prompt's end that is kept with its token ids: nearly all rows have the same."""


class Labeller:
    """Tokenises rendered conversations with one tokenizer.

    Attributes:
        joined: Answers whose first token holds characters of the prompt, as no other way to write it was found.
    """

    def __init__(self, tokenizer: Any, special: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.joined = 0
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._kept: dict[str, list[int]] = {}
        self._kept_pieces: dict[str, tuple[list[int], int]] = {}
        self._ids_of = {word: tokenizer.convert_tokens_to_ids(word) for word in special}
        ids = [found for found in self._ids_of.values() if isinstance(found, int)]
        self._quick = _tokenises_plainly(tokenizer) and len(set(ids)) == len(self._ids_of)
        self._is_special = np.zeros(max(ids, default=0) + 2, np.bool_)  # the last stands for all ids from there on
        self._is_special[ids] = True

    def label(self, rendered: Sequence[Rendered]) -> list[list[tuple[Ids, Mask]]]:
        """Return for each text its examples: token ids and whether each token is learnt, `[seq]` each."""
        if not rendered:
            return []
        texts = [one.text for one in rendered]
        made: list[list[tuple[Ids, Mask]] | None] = [None] * len(rendered)
        if self._quick:
            self.tokenizer("", add_special_tokens=False)  # it turns cutting and padding off
            plain = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            made = [self._by_pieces(found.ids, one) for found, one in zip(plain, rendered, strict=True)]
        left = [place for place, examples in enumerate(made) if examples is None]
        encoded = self.tokenizer([texts[place] for place in left], add_special_tokens=False) if left else None
        for row, place in enumerate(left):
            made[place] = list(self._examples(encoded, row, rendered[place]))
        return [examples for examples in made if examples is not None]

    def _by_pieces(self, ids: list[int], one: Rendered) -> list[tuple[Ids, Mask]] | None:
        """Return what `_examples` does without knowing where each token stands; None where that must be known."""
        found = np.array(ids, np.int32)
        text, learnt = one.text, np.zeros(len(ids), np.bool_)
        cuts = list(self._special.finditer(text))
        places = np.flatnonzero(self._is_special[np.minimum(found, len(self._is_special) - 1)]).tolist()
        if [self._ids_of[cut[0]] for cut in cuts] != [ids[place] for place in places]:
            return None
        starts = [cut.start() for cut in cuts]
        for answer in one.answers:
            last = bisect_left(starts, answer.begin) - 1
            start, at = (starts[last], places[last]) if last >= 0 else (0, 0)
            before = self._ids(text[start : answer.begin])
            inside = last >= 0 and cuts[last].end() > answer.begin
            if not answer.served or inside or ids[at : at + len(before)] != before:
                return None
            for begin, end in answer.learnt:
                stop = bisect_left(starts, end) - 1
                high: int | None = len(ids)
                if end < len(text):
                    high = None
                    if stop >= 0 and cuts[stop].end() == end:
                        piece = text[starts[stop] : starts[stop + 1] if stop + 1 < len(cuts) else len(text)]
                        high = self._behind(ids, places[stop], piece, end - starts[stop])
                if begin != answer.begin or high is None:
                    return None
                learnt[at + len(before) : high] = True
        return [(found, learnt)]

    def _behind(self, ids: list[int], at: int, piece: str, end: int) -> int | None:
        """Return the index of the first token behind a special token; None if what follows has other ids by itself.

        Args:
            ids: Of a whole text.
            at: The index of the special token.
            piece: The special token with what follows it up to the next one.
            end: Where it ends in the piece.
        """
        if piece in self._kept_pieces:
            alone, first = self._kept_pieces[piece]
        else:
            encoded = self.tokenizer([piece], add_special_tokens=False)
            alone = encoded["input_ids"][0]
            behind = _token_from(encoded, 0, end, len(piece))
            first = len(alone) if behind is None else behind
            if len(piece) <= _MOST_KEPT and len(self._kept_pieces) < _MOST_KEPT:
                self._kept_pieces[piece] = alone, first
        return at + first if ids[at : at + len(alone)] == alone else None

    def _examples(self, encoded: Any, row: int, one: Rendered) -> Iterator[tuple[Ids, Mask]]:
        ids = encoded["input_ids"][row]
        learnt = np.zeros(len(ids), np.bool_)
        own: list[tuple[Ids, Mask]] = []
        for answer in one.answers:
            first = self._first(encoded, row, one.text, answer)
            if first is None:
                made = self._by_itself(encoded, row, one.text, answer)
                if made:
                    own.append(made)
                    continue
                self.joined += 1
            for begin, end in answer.learnt:
                low = _token_from(encoded, row, begin, len(one.text))
                high = _token_from(encoded, row, end, len(one.text))
                low = len(ids) if low is None else low
                low = first if begin == answer.begin and first is not None else max(low, first or 0)
                learnt[low : len(ids) if high is None else high] = True
        yield from own
        if learnt.any() or not own:
            yield np.array(ids, np.int32), learnt

    def _first(self, encoded: Any, row: int, text: str, answer: Answer) -> int | None:
        """Return the index of an answer's first token; None where the tokens before it are not those of the prompt.

        Special tokens cut a text: what follows the last of them is tokenised by itself. So only that is compared.
        """
        begin = answer.begin
        if not answer.served:
            found = _token_from(encoded, row, begin, len(text))
            return len(encoded["input_ids"][row]) if found is None else found
        start = 0
        for match in self._special.finditer(text, max(0, begin - _MOST_KEPT), begin):
            start = match.start()
        if not start:
            start = max((match.start() for match in self._special.finditer(text, 0, begin)), default=0)
        at = encoded.char_to_token(row, start) if start else 0
        ids = self._ids(text[start:begin])
        if at is None or encoded["input_ids"][row][at : at + len(ids)] != ids:
            return None
        return int(at) + len(ids)

    def _by_itself(self, encoded: Any, row: int, text: str, answer: Answer) -> tuple[Ids, Mask] | None:
        """Return an example of one answer whose tokens begin where its prompt ends; None if they cannot."""
        prompt = self._ids(text[: answer.begin])
        said = text[answer.begin : answer.end]
        for before in ("", "\n"):  # some tokenizers put a space before a text, but none after a new line
            encoded = self.tokenizer(before + said, add_special_tokens=False)
            skipped = self._ids(before) if before else []
            ids: list[int] = encoded["input_ids"]
            shift = answer.begin - len(before)
            if ids[: len(skipped)] == skipped and self._decoded([*prompt, *ids[len(skipped) :]]) == text[: answer.end]:
                break
        else:
            return None
        learnt = np.zeros(len(ids), np.bool_)
        for begin, end in answer.learnt:
            first = _token_from(encoded, 0, begin - shift, len(before + said))
            last = _token_from(encoded, 0, end - shift, len(before + said))
            learnt[len(ids) if first is None else first : len(ids) if last is None else last] = True
        mask = np.concatenate([np.zeros(len(prompt), np.bool_), learnt[len(skipped) :]])
        return np.array([*prompt, *ids[len(skipped) :]], np.int32), mask

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _ids(self, text: str) -> list[int]:
        if text in self._kept:
            return self._kept[text]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(text) <= _MOST_KEPT and len(self._kept) < _MOST_KEPT:
            self._kept[text] = ids
        return ids


def _tokenises_plainly(tokenizer: Any) -> bool:
    """Return whether a tokenizer's class leaves it to its backend to tokenise a text, as nearly all do."""
    ways = (getattr(type(tokenizer), name, None) for name in ("__call__", "_encode_plus"))
    return all(getattr(way, "__module__", "").startswith("transformers.tokenization_utils_") for way in ways)


def _token_from(encoded: Any, row: int, begin: int, stop: int) -> int | None:
    """Return the index of the first token that begins in the characters `[begin, stop)`, or None.

    Characters are tried one by one, because some tokenizers have no token for white space.
    """
    for character in range(begin, stop):
        token = encoded.char_to_token(row, character)
        if token is not None and encoded.token_to_chars(row, token).start >= begin:
            return int(token)
    return None
