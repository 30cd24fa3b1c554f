"""The split as the program made it while all rows were in memory: what it must still give."""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from studio.core.text import plain
from studio.probe.data.rows import Row

LARGEST_SHARE = 5  # at most one row in five is held out, even if more are asked for, so that enough is left to train on
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to train on and held-out rows, both in the file's order, with notes where fewer are held out than asked.

    `places` are those of the held-out rows among all rows.
    """

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    places: tuple[int, ...] = ()


def split(rows: Sequence[Row], held_out_rows: int, seed: int) -> Split:
    """Return a split in which twins are on the same side.

    Which rows are held out depends on their text and the seed, not on their order. Where twins are so many that there
    is no such split (labels, yes and no), at least no prompt is on both sides, and a note says so.

    Args:
        rows: All rows.
        held_out_rows: How many to hold out; fewer where the rows are too few or too alike.
        seed: Another seed gives another choice.
    """
    wanted = most_held_out(len(rows), held_out_rows)
    notes = (
        [f"{held_out_rows} held-out rows were asked for; {wanted} of {len(rows)} are held out"]
        if wanted < held_out_rows
        else []
    )
    held: set[int] = set()
    if wanted:
        twins = [twin_keys(row) for row in rows]
        names = [b"".join((_prompt_key(row), _answer_key(row))) for row in rows]
        groups = _groups(range(len(rows)), twins, names, wanted)
        held = _choose(groups, wanted, seed)
        if len(held) < (wanted + 1) // 2:
            # What is left over are groups of more than half the rows wanted: they are taken apart as well.
            smaller = _groups(range(len(rows)), twins, names, wanted // 2)
            held = max(held, _choose(smaller, wanted, seed), key=len)
        notes += _twins_parted(rows, twins, held)
        largest = max((places for _, places in groups), key=len)
        if len(largest) > wanted:
            row = rows[largest[0]]
            what = "prompt" if row.prompt else "text"
            shown = plain(row.prompt or row.answer, one_line=True, limit=_SHOWN)
            notes.append(f"{len(largest)} rows have one {what} and are all trained on: '{shown}'")
        if len(held) < wanted:
            notes.append(f"{len(held)} rows are held out instead of {wanted}: the others repeat one another")
    train = tuple(row for place, row in enumerate(rows) if place not in held)
    held_out = tuple(rows[place] for place in sorted(held))
    if note := few_answers(held_out):
        notes.append(note)
    return Split(train, held_out, tuple(notes), tuple(sorted(held)))


def most_held_out(rows: int, wanted: int) -> int:
    """Return how many rows a split holds out at most; fewer where they repeat one another.

    Args:
        rows: All rows.
        wanted: How many were asked for.
    """
    return min(wanted, rows // LARGEST_SHARE or int(rows > 1))


class RowKeys(NamedTuple):
    """Short hashes by which a row is found again, whatever its letter case and white space.

    A prompt is what the user and tools say, an answer what the assistant says. System prompts, which whole files share,
    are in neither. `content` is both together; `prompt` is empty for plain text.
    """

    content: bytes
    prompt: bytes
    answer: bytes


def row_keys(row: Row) -> RowKeys:
    """Return the hashes by which a row is found again."""
    prompt, answer = _prompt_key(row), _answer_key(row)
    return RowKeys(_blake2b(b"\0".join((prompt, answer))), prompt, answer)


class TwinKeys(NamedTuple):
    """Short hashes that two rows share if they are twins, whatever their letter case, white space and punctuation.

    Attributes:
        prompt: Of all that the user and tools say; of a plain text, of the text.
        first: Of the user's first turn; empty for plain text.
        answer: Of all that the assistant says.
        same_prompt: Of the prompt, punctuation included.
    """

    prompt: bytes
    first: bytes
    answer: bytes
    same_prompt: bytes


def twin_keys(row: Row) -> TwinKeys:
    """Return the hashes that a row shares with its twins."""
    answer = _digest("a", _letters(row.answer))
    if not row.prompt:
        return TwinKeys(answer, b"", answer, _digest("a", row.answer))
    prompt, first = _letters(row.prompt), _first_turn(row)
    return TwinKeys(
        _digest("p", prompt),
        _digest("p", prompt if first == row.prompt else _letters(first)) if first else b"",
        answer,
        _digest("p", row.prompt),
    )


def _first_turn(row: Row) -> str:
    """Return what the user says first; empty for plain text."""
    return next((turn.content for turn in row.turns if turn.role == "user"), "")


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
    return len({_answer_key(row) for row in rows})


def _prompt_key(row: Row) -> bytes:
    return _digest("p", row.prompt) if row.prompt else b""


def _answer_key(row: Row) -> bytes:
    return _digest("a", row.answer)


def _digest(kind: str, text: str) -> bytes:
    """Return a short hash of a text, equal for texts that differ in letter case and white space alone."""
    return _blake2b(f"{kind}\0{' '.join(text.casefold().split())}".encode())


def _letters(text: str) -> str:
    """Return a text without white space and punctuation; one that holds nothing else stays as it is."""
    folded = text.casefold()
    if folded.isascii():
        return folded.translate(_ASCII_MARKS) or text
    folded = unicodedata.normalize("NFKC", folded)
    for mark in filter(_is_mark, set(folded)):  # a third of the time of one look at each character
        folded = folded.replace(mark, "")
    return folded or text


@cache
def _is_mark(character: str) -> bool:
    """Return whether a character is white space, punctuation, a control or a lone accent; signs such as + stay."""
    kind = unicodedata.category(character)
    return kind[0] in "PZ" or kind in ("Cc", "Cf", "Sk")


_ASCII_MARKS = {code: None for code in range(128) if _is_mark(chr(code))}


def _blake2b(data: bytes, key: bytes = b"") -> bytes:
    import hashlib

    return hashlib.blake2b(data, key=key, digest_size=12).digest()


_STEPS: tuple[Callable[[TwinKeys], tuple[bytes, ...]], ...] = (
    lambda keys: (keys.prompt, keys.first, keys.answer),
    lambda keys: (keys.prompt, keys.answer),
    lambda keys: (keys.prompt, keys.first),
    lambda keys: (keys.prompt,),
    lambda keys: (keys.same_prompt,),
)
"""What keeps rows together: first all that makes twins, then less and less, for groups that are too large."""


def _groups(
    places: Sequence[int], twins: Sequence[TwinKeys], names: Sequence[bytes], largest: int, step: int = 0
) -> list[tuple[bytes, list[int]]]:
    """Return (name, places) of sets of twins; those with more rows than `largest` are taken apart as far as can be."""
    groups: list[tuple[bytes, list[int]]] = []
    for members in _joined(places, [_STEPS[step](twins[place]) for place in places]):
        if len(members) > largest and step + 1 < len(_STEPS):
            groups += _groups(members, twins, names, largest, step + 1)
        else:
            groups.append((min(names[place] for place in members), members))
    return groups


def _joined(places: Sequence[int], keys: Sequence[tuple[bytes, ...]]) -> list[list[int]]:
    """Return the sets of places that share a key, directly or through other places."""
    parent = list(range(len(places)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    first: dict[tuple[int, bytes], int] = {}
    for at, shared in enumerate(keys):
        for kind, key in enumerate(shared):
            if key:
                parent[root(at)] = root(first.setdefault((kind, key), at))
    members: defaultdict[int, list[int]] = defaultdict(list)
    for at, place in enumerate(places):
        members[root(at)].append(place)
    return list(members.values())


def _twins_parted(rows: Sequence[Row], twins: Sequence[TwinKeys], held: set[int]) -> list[str]:
    """Return in words how many held-out rows have a twin that is trained on, for each thing in which they agree."""

    def parted(key: Callable[[TwinKeys], bytes]) -> list[int]:
        trained = {key(keys) for place, keys in enumerate(twins) if place not in held}
        return sorted(place for place in held if key(twins[place]) and key(twins[place]) in trained)

    notes = []
    prompts = parted(lambda keys: keys.prompt)
    if firsts := sorted(set(parted(lambda keys: keys.first)) - set(prompts)):
        shown = plain(_first_turn(rows[firsts[0]]), one_line=True, limit=_SHOWN)
        notes.append(
            f"too many conversations begin alike to keep them apart: {len(firsts)} of {len(held)} held-out rows begin "
            f"as rows that are trained on do, such as '{shown}'"
        )
    if answers := parted(lambda keys: keys.answer):
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


def _choose(groups: list[tuple[bytes, list[int]]], wanted: int, seed: int) -> set[int]:
    salt = str(seed).encode()
    order = sorted(groups, key=lambda group: _blake2b(group[0], key=salt))
    held: set[int] = set()
    for _, places in order:
        if len(held) + len(places) <= wanted:
            held.update(places)
    return held
