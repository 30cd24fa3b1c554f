"""Splits are those that this program has always made: recorded runs find the same held-out rows."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.probe.data import Conversation, Message, PlainText, Row, row_keys, split, stored_rows, twin_keys
from studio.probe.data.row_keys import keys_of
from studio.probe.data.stored_rows import RowWriter, StoredRows
from studio.probe.data.views import Chain
from tests.probe import split_before

WORDS = ("yes", "Yes!", "no", "No.", "why", "", "?", "é", "É", "ﬁ", "x  y", "X y", "¿", "1+1")
TEXTS = st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join)
ROLES = ("user", "assistant")


def chat(texts: Sequence[str], number: int = 0) -> Conversation:
    return Conversation(tuple(Message(ROLES[n % 2], text) for n, text in enumerate(texts)), number)


CHAT = st.lists(TEXTS, max_size=5).map(chat)


def as_before(rows: Sequence[Row], wanted: int, seed: int) -> None:
    now, before = split(rows, wanted, seed), split_before.split(list(rows), wanted, seed)
    assert (tuple(now.train), tuple(now.held_out)) == (before.train, before.held_out)
    assert now.notes == before.notes


@given(st.lists(st.one_of(CHAT, TEXTS.map(PlainText)), max_size=40), st.integers(0, 30), st.integers(0, 3))
def test_few_rows_much_alike(rows: list[Row], wanted: int, seed: int) -> None:
    as_before(rows, wanted, seed)


@given(CHAT | TEXTS.map(PlainText))
def test_the_keys_of_a_row(row: Row) -> None:
    assert tuple(row_keys(row)) == tuple(split_before.row_keys(row))
    assert tuple(twin_keys(row)) == tuple(split_before.twin_keys(row))
    table = keys_of([row])
    twins = twin_keys(row)
    for name, key in row_keys(row)._asdict().items() | {("twin_prompt", twins.prompt), ("first", twins.first)}:
        assert table.column(name)[0] == key


def made(many: int, kinds: int, seed: int) -> list[Row]:
    """Return rows of which about one in `kinds` is like another in its prompt, first turn or answer."""
    rng = random.Random(seed)  # noqa: S311
    rows: list[Row] = []
    for n in range(many):
        marks = [rng.choice(("", "!", " ?")) for _ in range(rng.choice((2, 2, 4)))]
        texts = [f"text {rng.randrange(many * kinds)}{mark}" for mark in marks]
        if not rng.randrange(3):
            texts[rng.randrange(len(texts))] = f"{rng.choice(('Hi', 'hi', 'No'))}{rng.choice(('', '!', '.'))}"
        rows.append(chat(texts, n))
    return rows


@pytest.mark.parametrize(
    ("many", "kinds", "wanted"), [(3000, 1, 200), (3000, 20, 300), (2000, 1, 20), (1000, 50, 1000)]
)
def test_many_rows(many: int, kinds: int, wanted: int) -> None:
    as_before(made(many, kinds, wanted), wanted, 17)


def test_rows_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "IN_MEMORY_CHARACTERS", 100)
    writer = RowWriter(lambda: tmp_path)
    for row in made(2000, 1, 5):
        writer.add(row)
    rows = writer.done(lambda folder: folder)
    now = split(rows, 150, 3)
    assert isinstance(now.train, StoredRows)
    as_before(rows, 150, 3)
    as_before(now.train, 90, 4)  # of rows that are some of a store
    parts = Chain([now.train, made(500, 1, 6), now.held_out])
    as_before(parts, 90, 4)
    as_before(parts[100:2200:3], 30, 4)
