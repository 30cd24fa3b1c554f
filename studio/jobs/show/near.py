"""Finds rows that say nearly the same as an earlier one, without comparing all of them with each other.

A row is the set of its runs of three words. The least of 64 hashes of these (MinHash, Broder 1997) agree in two rows as
often as their sets overlap. Rows that agree in one of 16 groups of four are compared exactly. Of pairs that share 80 %
one in 5000 is missed, since 1 - (1 - 0.8^4)^16 = 0.9998.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ALIKE = 0.8
"""Two rows are near duplicates if of all runs of words in either so much is in both (Jaccard). Lee et al. 2021
(arXiv:2107.06499) took the same share for documents."""
_RUN_WORDS = 3
_GROUPS, _GROUP = 16, 4
_KEPT_PER_GROUP = 4
_WORDS = re.compile(r"\w+|[^\w\s]")

_PRIME = np.uint64(2**61 - 1)
_MIXER = np.random.default_rng(0)
_TIMES = _MIXER.integers(1, 2**31, _GROUPS * _GROUP, dtype=np.uint64)
_PLUS = _MIXER.integers(0, 2**61 - 1, _GROUPS * _GROUP, dtype=np.uint64)

Runs = NDArray[np.uint64]


def runs_of(text: str) -> Runs:
    """Return the hashes of a text's runs of three words, each once and sorted; a shorter text is one run."""
    from zlib import crc32  # noqa: PLC0415  fast, and the same in every process

    words = np.array([crc32(word.encode("utf-8", "replace")) for word in _WORDS.findall(text.casefold())], np.uint64)
    if not len(words):
        return words
    length = min(_RUN_WORDS, len(words))
    runs = np.zeros(len(words) - length + 1, np.uint64)
    for place in range(length):
        # Bits are spread so that the order of words counts; what is too large for 64 bits is dropped.
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + words[place : place + len(runs)]
    return np.unique(runs >> np.uint64(33))


def alike(one: Runs, other: Runs) -> float:
    """Return the share of all runs in either text that is in both, 0 to 1."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / max(1, len(one) + len(other) - both)


class NearRows:
    """Takes rows one by one and tells which earlier one is nearly the same."""

    def __init__(self, text_of: Callable[[int], str]) -> None:
        """Compare rows whose texts `text_of` returns by their places."""
        self._runs = lru_cache(maxsize=1024)(lambda place: runs_of(text_of(place)))
        self._known: list[defaultdict[bytes, list[int]]] = [defaultdict(list) for _ in range(_GROUPS)]

    def add(self, place: int) -> tuple[int, float] | None:
        """Take a row; return the place of the earlier one that is most like it and how much, None without one."""
        runs = self._runs(place)
        if not len(runs):
            return None
        # [hashes, runs]: all below 2^62, so that no product overflows.
        mixed = (runs[None, :] * _TIMES[:, None] + _PLUS[:, None]) % _PRIME
        least = mixed.min(axis=1).reshape(_GROUPS, _GROUP)
        candidates: dict[int, None] = {}
        for group, known in zip(least, self._known, strict=True):
            members = known[group.tobytes()]
            candidates.update(dict.fromkeys(members))
            if len(members) < _KEPT_PER_GROUP:
                members.append(place)
        best = max(((alike(runs, self._runs(other)), -other) for other in candidates), default=(0.0, 0))
        return (-best[1], best[0]) if best[0] >= ALIKE else None
