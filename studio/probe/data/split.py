"""Holds out rows for evaluation, none of which repeats a row that is trained on, as far as the rows allow it.

Two rows are twins if their prompts, their first questions or their answers are equal but for letter case, white space
and punctuation. Twins go to the same side, as long as there are not more of them than rows to hold out: a refusal that
a thousand rows share, a greeting with which every conversation begins. Such rows are told apart by less, step by step
(`_STEPS`), and a note says so.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from studio.core.evidence import LEAST_ROWS
from studio.core.text import plain
from studio.probe.data.opened import Progress
from studio.probe.data.row_keys import Column, Keys, answer_key, blake2b, first_turn, keys_of
from studio.probe.data.rows import Row
from studio.probe.data.views import chosen

LARGEST_SHARE = 5  # at most one row in five is held out, even if more are asked for, so that enough is left to train on
_SMALL_SHARE = 4  # one in four where a verdict on the run needs it: 60 rows have 15 to judge by, which is the least
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to train on and held-out rows, both in the file's order, with notes where fewer are held out than asked.

    `places` are those of the held-out rows among all rows. `last` counts the characters of the last part of a document
    that was cut in two; 0 where none was.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    notes: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    last: int = 0


def split(rows: Sequence[Row], held_out_rows: int, seed: int, progress: Progress | None = None) -> Split:
    """Return a split in which twins are on the same side.

    Which rows are held out depends on their text and the seed, not on their order. Where twins are so many that there
    is no such split (labels, yes and no), at least no prompt is on both sides, and a note says so.

    Args:
        rows: All rows.
        held_out_rows: How many to hold out; fewer where the rows are too few or too alike.
        seed: Another seed gives another choice.
        progress: Gets (rows looked at, rows in all); may raise to end it.
    """
    wanted = most_held_out(len(rows), held_out_rows)
    notes = (
        [f"{held_out_rows} held-out rows were asked for; {wanted} of {len(rows)} are held out"]
        if wanted < held_out_rows
        else []
    )
    if not wanted:
        return Split(rows if not isinstance(rows, list) else tuple(rows), (), tuple(notes))
    twins, places = _Twins(keys_of(rows, progress)), range(len(rows))
    groups = _groups(twins, places, wanted)
    held = _choose(twins, groups, wanted, seed)
    if len(held) < (wanted + 1) // 2:
        # What is left over are groups of more than half the rows wanted: they are taken apart as well.
        held = max(held, _choose(twins, _groups(twins, places, wanted // 2), wanted, seed), key=len)
    notes += _twins_parted(rows, twins, held)
    largest = max(range(len(groups)), key=groups.size)
    if groups.size(largest) > wanted:
        row = rows[groups.of(largest)[0]]
        what = "prompt" if row.prompt else "text"
        shown = plain(row.prompt or row.answer, one_line=True, limit=_SHOWN)
        notes.append(f"{groups.size(largest)} rows have one {what} and are all trained on: '{shown}'")
    if len(held) < wanted:
        notes.append(f"{len(held)} rows are held out instead of {wanted}: the others repeat one another")
    held_out = chosen(rows, held)
    if note := few_answers(held_out):
        notes.append(note)
    among = set(held)
    train = chosen(rows, (place for place in places if place not in among))
    return Split(train, held_out, tuple(notes), tuple(held))


def most_held_out(rows: int, wanted: int) -> int:
    """Return how many rows a split holds out at most; fewer where they repeat one another.

    Args:
        rows: All rows.
        wanted: How many were asked for.
    """
    most = rows // LARGEST_SHARE or int(rows > 1)
    if most < LEAST_ROWS <= rows // _SMALL_SHARE:
        most = LEAST_ROWS
    return min(wanted, most)


def few_answers(rows: Sequence[Row], called: str = "held-out rows") -> str:
    """Return a warning where many rows have one answer, or a few; empty where they do not.

    Such rows test little more than their different answers. The limit is two rows for each different answer.

    Args:
        rows: Rows to measure on.
        called: What they are called in the warning, in the plural.
    """
    answers = different_answers(rows)
    if len(rows) < 2 or answers * 2 > len(rows):
        return ""
    held = f"the {len(rows)} {called} have"
    if answers == 1:
        return f"{held} one and the same answer: they tell nothing about any other"
    return (
        f"{held} only {answers} different answers: where answers are learnt, they tell little more than {answers} rows"
    )


def different_answers(rows: Sequence[Row]) -> int:
    """Return how many different answers rows have."""
    return len({answer_key(row.answer) for row in rows})


_STEPS: tuple[tuple[Column, ...], ...] = (
    ("twin_prompt", "first", "twin_answer"),
    ("twin_prompt", "twin_answer"),
    ("twin_prompt", "first"),
    ("twin_prompt",),
    ("prompt",),
)
"""What keeps rows together: first all that makes twins, then less and less, for groups that are too large.

The last is the prompt with its punctuation; a plain text counts as its own prompt.
"""


class _Twins:
    """Rows by number; for each thing in which they may agree another number, equal where they do."""

    def __init__(self, keys: Keys) -> None:
        self.rows = len(keys)
        self._prompts, self._answers = keys.column("prompt"), keys.column("answer")
        self.alike: dict[Column, array[int]] = {
            name: keys.column(name).numbered() for name in ("twin_prompt", "first", "twin_answer", "prompt")
        }
        if -1 in self.alike["prompt"]:
            texts = self._answers.numbered()
            for row, number in enumerate(self.alike["prompt"]):
                if number < 0:
                    self.alike["prompt"][row] = self.rows + texts[row]

    def name(self, row: int) -> bytes:
        """Return the name of a row: its prompt and its answer. Of a group it is the least of its rows' names."""
        return self._prompts[row] + self._answers[row]


@dataclass(frozen=True, slots=True)
class _Groups:
    """Sets of rows, `members[starts[n]:starts[n + 1]]` is one: a million of them as lists would take ten times that."""

    members: "array[int]"
    starts: "array[int]"

    def __len__(self) -> int:
        return len(self.starts) - 1

    def size(self, group: int) -> int:
        return self.starts[group + 1] - self.starts[group]

    def of(self, group: int) -> "array[int]":
        return self.members[self.starts[group] : self.starts[group + 1]]

    def add(self, members: "array[int]") -> None:
        self.members.extend(members)
        self.starts.append(len(self.members))


def _groups(twins: _Twins, places: Sequence[int], largest: int, step: int = 0) -> _Groups:
    """Return the sets of twins; those with more rows than `largest` are taken apart as far as can be."""
    groups = _joined(places, [twins.alike[name] for name in _STEPS[step]])
    if step + 1 == len(_STEPS) or all(groups.size(group) <= largest for group in range(len(groups))):
        return groups
    made = _Groups(array("q"), array("q", [0]))
    for group in range(len(groups)):
        if groups.size(group) <= largest:
            made.add(groups.of(group))
            continue
        smaller = _groups(twins, groups.of(group), largest, step + 1)
        for part in range(len(smaller)):
            made.add(smaller.of(part))
    return made


def _joined(places: Sequence[int], alike: "Sequence[array[int]]") -> _Groups:
    """Return the sets of places that share a number, directly or through other places; by their first places."""
    parent = array("q", range(len(places)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for numbers in alike:
        first: dict[int, int] = {}
        for at, place in enumerate(places):
            number = numbers[place]
            if number >= 0 and (before := first.setdefault(number, at)) != at:
                one, other = root(before), root(at)
                parent[max(one, other)] = min(one, other)
    # The root of a set is its first place.
    sizes = array("q", bytes(8 * len(places)))
    for at in range(len(places)):
        parent[at] = root(at)
        sizes[parent[at]] += 1
    starts, begins = array("q", [0]), array("q", bytes(8 * len(places)))
    for at, size in enumerate(sizes):
        if size:
            begins[at] = starts[-1]
            starts.append(starts[-1] + size)
    members = array("q", bytes(8 * len(places)))
    for at, place in enumerate(places):
        members[begins[parent[at]]] = place
        begins[parent[at]] += 1
    return _Groups(members, starts)


def _twins_parted(rows: Sequence[Row], twins: _Twins, held: Sequence[int]) -> list[str]:
    """Return in words how many held-out rows have a twin that is trained on, for each thing in which they agree."""
    among = set(held)

    def parted(name: Column) -> list[int]:
        numbers = twins.alike[name]
        wanted = {numbers[row] for row in held} - {-1}
        trained = {number for row, number in enumerate(numbers) if number in wanted and row not in among}
        return [row for row in held if numbers[row] in trained]

    notes = []
    prompts = parted("twin_prompt")
    if firsts := sorted(set(parted("first")) - set(prompts)):
        shown = plain(first_turn(rows[firsts[0]]), one_line=True, limit=_SHOWN)
        notes.append(
            f"too many conversations begin alike to keep them apart: {len(firsts)} of {len(held)} held-out rows begin "
            f"as rows that are trained on do, such as '{shown}'"
        )
    if answers := parted("twin_answer"):
        shown = plain(rows[answers[0]].answer, one_line=True, limit=_SHOWN)
        notes.append(
            "answers repeat too often to keep them apart: only prompts differ between the two sides for "
            f"{len(answers)} of {len(held)} held-out rows, such as those with the answer '{shown}'"
        )
    if prompts:
        notes.append(
            "too many prompts differ in punctuation alone to keep them apart: "
            f"{len(prompts)} of {len(held)} held-out rows have such a twin among those that are trained on"
        )
    return notes


def _choose(twins: _Twins, groups: _Groups, wanted: int, seed: int) -> list[int]:
    """Return the rows of as many groups as hold at most `wanted` rows together, in order."""
    salt = str(seed).encode()
    shuffled = [blake2b(min(map(twins.name, groups.of(group))), key=salt) for group in range(len(groups))]
    held: list[int] = []
    for group in sorted(range(len(groups)), key=shuffled.__getitem__):
        if len(held) == wanted:
            break
        if len(held) + groups.size(group) <= wanted:
            held += groups.of(group)
    return sorted(held)
