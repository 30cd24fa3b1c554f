"""An example as pieces of text, one a token, made of the token ids alone: exactly what the model reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.runs.show import MOST_TOKENS, ShownExample

_UNKNOWN = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8: after so many tokens of a byte each, what still is no character is none."""


def shown_example(example: Example, tokenizer: Any, *, part: str, seq_len: int) -> ShownExample:
    """Return an example token by token.

    Args:
        example: Not cut yet.
        tokenizer: A fast tokenizer.
        part: Which one of its row it is, in words.
        seq_len: The row length at which it will be cut.
    """
    ids = [int(number) for number in example.input_ids[:MOST_TOKENS]]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return ShownExample(
        part=part,
        ids=tuple(ids),
        tokens=tuple(token_texts(ids, tokenizer)),
        trained=tuple(trained_ranges(example)),
        special=tuple(place for place, number in enumerate(ids) if number in special),
        length=len(example.input_ids),
        kept=min(len(example.input_ids), seq_len),
    )


def trained_ranges(example: Example) -> list[tuple[int, int]]:
    """Return the ranges `[begin, end)` of tokens that have a label."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(example.labels) != IGNORED, [0]))))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token; joined they are the text of all.

    A token's text depends on those before it: some decoders write no space before the first word, and the bytes of one
    character may be several tokens. Of these the last has the character.
    """
    decode = tokenizer.backend_tokenizer.decode
    texts: list[str] = []
    # `ids[first:done]` is the token whose text was told last: what is decoded behind it has its space.
    first = done = 0
    for end in range(1, len(ids) + 1):
        before = len(decode(ids[first:done], skip_special_tokens=False)) if done > first else 0
        text = decode(ids[first:end], skip_special_tokens=False)
        waits = text.endswith(_UNKNOWN) and end - done < _LONGEST_CHARACTER and end < len(ids)
        if waits or (len(text) <= before and end < len(ids)):
            texts.append("")
            if not waits:
                first, done = done, end
            continue
        texts.append(text[before:])
        first, done = done, end
    return texts
