"""Foreign text made harmless."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.text import plain, plain_path


@pytest.mark.parametrize(
    "attack",
    [
        "\x1b]52;c;ZXZpbA==\x07",  # clipboard
        "\x1b]0;title\x1b\\",
        "\x1b[6n",  # report to stdin
        "\x1bc",  # full reset
        "\x9b31m",  # 8-bit CSI
        "\u202egnp.exe",  # right-to-left override
        "\ud800",  # lone surrogate
        "a\rb\x08",
    ],
)
def test_attacks_become_visible(attack: str) -> None:
    shown = plain(attack)
    assert "\\" in shown
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in shown)


@given(st.text())
def test_nothing_but_newlines_and_tabs_controls(text: str) -> None:
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in plain(text))
    assert "\n" not in plain(text, one_line=True)


@given(st.text(), st.integers(1, 20))
def test_limit(text: str, limit: int) -> None:
    assert len(plain(text, limit=limit)) <= 8 * limit


def test_ordinary_text_is_untouched() -> None:
    text = "Grüße, 漢字 🙂 [bold]not markup[/bold]\n\tend"
    assert plain(text) == text


@pytest.mark.parametrize(
    ("path", "cells", "shown"),
    [
        ("/a/model", 40, "/a/model"),
        ("/home/someone/models/Llama-3.1-8B", 33, "/home/someone/models/Llama-3.1-8B"),
        ("/home/someone/models/Llama-3.1-8B", 32, "…/someone/models/Llama-3.1-8B"),
        ("/home/someone/models/Llama-3.1-8B", 15, "…/Llama-3.1-8B"),
        ("/home/someone/models/Llama-3.1-8B", 11, "Llama….1-8B"),
        ("a-very-long-name.jsonl", 12, "a-ver….jsonl"),
        ("/data/漢字漢字/rows.jsonl", 21, "…/漢字漢字/rows.jsonl"),
        ("/data/漢字漢字/rows.jsonl", 20, "…/rows.jsonl"),
        ("/a\x1b[31m/rows.jsonl", 40, "/a\\x1b[31m/rows.jsonl"),
        ("/long/folder/", 9, "…/folder/"),
    ],
)
def test_a_path_that_is_too_long_shows_its_name(path: str, cells: int, shown: str) -> None:
    assert plain_path(path, cells) == shown


@given(st.text(), st.integers(2, 30))
def test_a_path_has_room(text: str, cells: int) -> None:
    wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in plain_path(text, cells))
    assert wide <= cells
