"""Holds out rows for evaluation, none of which repeats the prompt or the answer of a row that is trained on."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from studio.probe.data.rows import Row

LARGEST_SHARE = 5  # at most one row in five is held out, even if more are asked for, so that enough is left to train on


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to train on and held-out rows, both in the file's order, with notes where fewer are held out than asked."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def split(rows: Sequence[Row], held_out_rows: int, seed: int) -> Split:
    """Return a split in which no prompt and no answer is on both sides.

    Which rows are held out depends on their text and the seed, not on their order. Where answers repeat so often that
    there is no such split (labels, yes and no), only prompts are kept apart, and a note says so.

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
        held = _choose(_groups(rows, (_prompt_key, _answer_key)), wanted, seed)
        if len(held) < (wanted + 1) // 2:
            by_prompt = _choose(_groups(rows, (_prompt_key,)), wanted, seed)
            if len(by_prompt) > len(held):
                held = by_prompt
                notes.append("answers repeat too often to keep them apart: only prompts differ between the two sides")
        if len(held) < wanted:
            notes.append(f"{len(held)} rows are held out instead of {wanted}: the others repeat one another")
    train = tuple(row for place, row in enumerate(rows) if place not in held)
    held_out = tuple(rows[place] for place in sorted(held))
    if note := few_answers(held_out):
        notes.append(note)
    return Split(train, held_out, tuple(notes))


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


def _blake2b(data: bytes, key: bytes = b"") -> bytes:
    import hashlib  # noqa: PLC0415  OpenSSL: 3 ms and 5 MiB that a plan has no use for

    return hashlib.blake2b(data, key=key, digest_size=12).digest()


def _groups(rows: Sequence[Row], keys: Sequence[Callable[[Row], bytes]]) -> list[tuple[bytes, list[int]]]:
    """Return (name, places) of the sets of rows that share a prompt or an answer, directly or through other rows."""
    parent = list(range(len(rows)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[bytes, int] = {}
    names: list[bytes] = []
    for place, row in enumerate(rows):
        digests = [key(row) for key in keys]
        names.append(b"".join(digests))
        for digest in filter(None, digests):
            parent[root(place)] = root(first.setdefault(digest, place))
    members: defaultdict[int, list[int]] = defaultdict(list)
    for place in range(len(rows)):
        members[root(place)].append(place)
    return [(min(names[place] for place in places), places) for places in members.values()]


def _choose(groups: list[tuple[bytes, list[int]]], wanted: int, seed: int) -> set[int]:
    salt = str(seed).encode()
    order = sorted(groups, key=lambda group: _blake2b(group[0], key=salt))
    held: set[int] = set()
    for _, places in order:
        if len(held) + len(places) <= wanted:
            held.update(places)
    return held
