"""Adds up encoded rows: lengths, what is learnt, what is cut at any row length, rows that repeat others.

Of each example a few numbers are kept and no token, so that another row length needs no second encoding.

Rows that say nearly the same are found without comparing all of them with each other. A row is the set of its runs of
three words. The least of 64 hashes of these (MinHash, Broder 1997) agree in two rows as often as their sets overlap.
Rows that agree in one of 16 groups of four are compared exactly. Of pairs that share 80 % one in 5000 is missed, since
1 - (1 - 0.8^4)^16 = 0.9998.
"""

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from studio.core.left_out import LEFT_OUT
from studio.core.schedule import total_steps_of
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.rows import Example
from studio.jobs.show.pieces import trained_ranges
from studio.probe.data import Row, row_keys
from studio.probe.data.lengths import spread_of
from studio.runs.show import Filter, Summary

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

BARS = 40
_MOST_COMPARED = 50_000
"""Rows that are compared for near duplicates: each takes some 2 kB."""
_LONGEST_COMPARED = 50_000
_PAIRS = 100
_REFUSED, _NOTHING, _SIDE = "refused_by_template", "nothing_to_learn", "side_left_out"


class Tally:
    """What is known of the rows that were encoded so far, in their order.

    Attributes:
        done: How many they are.
        report: What happened to them on their way to tokens.
        rows_per_step: Rows of an optimizer step.
    """

    def __init__(
        self,
        row_at: Callable[[int], Row],
        held_out: Callable[[int], bool],
        left_out: Mapping[str, int],
        *,
        rows: int,
        rows_per_step: int,
        both_sides: bool,
    ) -> None:
        """Begin without a row.

        Args:
            row_at: Returns the row at a place.
            held_out: Returns whether the row at a place is held out.
            left_out: Rows that the reading left out, by reason.
            rows: How many rows there will be.
            rows_per_step: Rows of an optimizer step.
            both_sides: Whether two examples, the chosen and the rejected one, count as one row of a step.
        """
        self._row_at, self._held_out, self._left_out = row_at, held_out, left_out
        self._rows, self.rows_per_step, self._both_sides = rows, rows_per_step, both_sides
        self.done = 0
        self.report = RowReport()
        self._first = array("Q", [0])  # of each row the place of its first example, and at the end their number
        self._length = array("Q")
        self._held = array("B")
        self._begin, self._end, self._of = array("Q"), array("Q"), array("Q")  # learnt ranges, and of which example
        self._contents: dict[bytes, int] = {}
        self._near = NearRows(lambda place: said_in(row_at(place)))
        self._repeat_of: dict[int, tuple[int, float]] = {}
        self._no_pair: Counter[str] = Counter()
        self._last_learnt: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def add(self, rows: Sequence[Row], made: Sequence[Sequence[Example]], report: RowReport) -> None:
        """Take the next rows with their examples, which are not cut yet."""
        self.report.add(report)
        for row, examples in zip(rows, made, strict=True):
            held = self._held_out(self.done)
            for example in self._counted(examples):
                ranges = trained_ranges(example)
                self._begin.extend(begin for begin, _ in ranges)
                self._end.extend(end for _, end in ranges)
                self._of.extend([len(self._length)] * len(ranges))
                self._length.append(len(example.input_ids))
                self._held.append(held)
            self._first.append(len(self._length))
            self._compare(row)
            self.done += 1

    def _counted(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return the examples that are trained on: of pairs both sides or none."""
        if self._both_sides and (why := why_no_pair(examples)):
            self._no_pair[why] += 1
            return ()
        return examples

    def _compare(self, row: Row) -> None:
        earlier = self._contents.setdefault(row_keys(row).content, self.done)
        if earlier != self.done:
            self._repeat_of[self.done] = earlier, 1.0
        elif self.done < _MOST_COMPARED and (near := self._near.add(self.done)):
            self._repeat_of[self.done] = near

    def repeat_of(self, place: int) -> int | None:
        """Return the place of the first row that says the same as this one or nearly so; None for none."""
        return self._repeat_of[place][0] if place in self._repeat_of else None

    def matches(self, place: int, only: Filter, seq_len: int) -> bool:
        """Return whether a row that was added is `cut`, `left out`, or one of the `repeats`."""
        first, last = self._first[place], self._first[place + 1]
        if only == "cut":
            return any(length > seq_len for length in self._length[first:last])
        return place in self._repeat_of if only == "repeats" else not self._learnt_at(seq_len)[first:last].any()

    def _learnt_at(self, seq_len: int) -> NDArray[np.int64]:
        """Return the same as `_learnt`, kept until there are more rows or another row length."""
        asked = seq_len, self.done
        if self._last_learnt is None or self._last_learnt[0] != asked:
            self._last_learnt = asked, self._learnt(seq_len)
        return self._last_learnt[1]

    def _learnt(self, seq_len: int | None) -> NDArray[np.int64]:
        """Return how many tokens of each example are learnt within a row length; None cuts nothing."""
        most = np.iinfo(np.int64).max if seq_len is None else seq_len
        begin, end = (np.frombuffer(one, np.uint64).astype(np.int64) for one in (self._begin, self._end))
        # Nothing precedes the first token, so it is never predicted.
        tokens = np.clip(np.minimum(end, most) - np.maximum(begin, 1), 0, None)
        of = np.frombuffer(self._of, np.uint64).astype(np.int64)
        return np.bincount(of, weights=tokens, minlength=len(self._length)).astype(np.int64)

    def summary(self, seq_len: int, end_token: str) -> Summary:
        """Return all that was added up, for a row length in tokens."""
        length = np.frombuffer(self._length, np.uint64).astype(np.int64)
        held = np.frombuffer(self._held, np.uint8).astype(bool)
        learnt, whole = self._learnt_at(seq_len), self._learnt(None)
        good = learnt > 0
        kept, first = np.minimum(length, seq_len), np.frombuffer(self._first, np.uint64).astype(np.int64)
        row_of = np.repeat(np.arange(self.done), np.diff(first))
        left = Counter(self._left_out)
        if self._both_sides:  # a side without anything to learn takes the other one with it
            broken = np.isin(row_of, row_of[~good])
            good &= ~broken
            left.update(self._no_pair)
            left[_SIDE] += len(np.unique(row_of[broken]))
        else:
            left[_REFUSED] += self.report.refused
            left[_NOTHING] += int(np.count_nonzero(~good)) + self.report.dropped
        edges, counts = _bars(length, seq_len)
        train = good & ~held
        units = len(np.unique(row_of[train])) if self._both_sides else int(np.count_nonzero(train))
        repeats = {place: found for place, found in self._repeat_of.items() if found[1] == 1.0}
        number = self._number
        return Summary(
            done=self.done,
            rows=self._rows,
            seq_len=seq_len,
            made=len(length),
            examples=int(np.count_nonzero(good)),
            held_out_examples=int(np.count_nonzero(good & held)),
            lengths=spread_of(length.tolist()),
            learnt=spread_of(learnt[good].tolist()),
            edges=edges,
            counts=counts,
            cut=int(np.count_nonzero(length > seq_len)),
            cut_tokens=int((length - kept).sum()),
            cut_learnt=int((whole - learnt).sum()),
            tokens=int(kept[good].sum()),
            loss_tokens=int(learnt[good].sum()),
            left_out={reason: left[reason] for reason in (*LEFT_OUT, *sorted(left.keys() - LEFT_OUT)) if left[reason]},
            train_tokens=int(kept[train].sum()),
            steps=total_steps_of(steps=0, epochs=1, rows=units, rows_per_step=self.rows_per_step) if units else 0,
            repeats=len(repeats),
            near=len(self._repeat_of) - len(repeats),
            pairs=tuple(
                (number(place), number(other), round(share, 3))
                for place, (other, share) in sorted(self._repeat_of.items())[:_PAIRS]
            ),
            compared=min(self.done, _MOST_COMPARED),
            said=self._said(length, good, seq_len, end_token),
        )

    def _number(self, place: int) -> int:
        return self._row_at(place).number

    def _said(
        self, length: NDArray[np.int64], good: NDArray[np.bool_], seq_len: int, end_token: str
    ) -> tuple[str, ...]:
        """Return what a training would warn of: its own sentences, with the counts at this row length."""
        report, said = RowReport(), list[str]()
        report.add(self.report)
        report.cut = int(np.count_nonzero(length > seq_len))
        report.dropped += int(np.count_nonzero(~good))
        report.longest = int(length.max(initial=0))
        report.say(seq_len, end_token, said.append)
        return tuple(said)


def why_no_pair(examples: Sequence[Example]) -> str:
    """Return why the examples of both sides of a preference are no pair, a reason of `LEFT_OUT`; empty where they are.

    The same as `studio.jobs.train.objectives.pairs` decides. An empty example stands for a side that is left out.
    """
    if any(not len(one.input_ids) for one in examples):
        return _SIDE
    if len(examples) != 2:
        return "side_split"
    one, other = (side.input_ids[: int(np.argmax(side.labels != IGNORED))] for side in examples)
    return "" if np.array_equal(one, other) else "prompts_differ"


def said_in(row: Row) -> str:
    """Return what a row is compared by: what was asked and answered, without system prompts, which files share."""
    return f"{row.prompt}\n{row.answer}"[:_LONGEST_COMPARED]


def _bars(length: NDArray[np.int64], seq_len: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return edges and counts of a histogram. No bar holds both examples that are cut and examples that are not."""
    if not len(length):
        return (), ()
    beyond, cut = int(length.max()) + 1, seq_len + 1
    width = max(1, -(-beyond // BARS))
    edges = list(range(0, beyond + width, width))
    if cut < beyond:
        edges = [*range(0, cut, -(-cut // max(1, cut // width))), *range(cut, beyond + width, width)]
    counts = np.histogram(length, edges)[0]
    return tuple(edges), tuple(int(count) for count in counts)


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
