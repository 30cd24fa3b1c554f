"""The last look before the terminal: no control, no width changed, nothing that the encoding lacks."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color

from widgets.output_filter import SafeOutput, ascii_of, drawable

BLACK = Color(0, 0, 0)
STEERING = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from(["\x1b", "\x9b", "\x07", "\u202e", "\u2066", "\x00", "\x85", "[", "]"]),
    ),
    max_size=60,
)


def written(text: str, safe: SafeOutput) -> str:
    return "".join(segment.text for segment in safe.apply([Segment(text)], BLACK))


@given(STEERING)
def test_nothing_that_steers_a_terminal_is_written(text: str) -> None:
    out = written(text, SafeOutput())
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in out)
    assert not {"\u202e", "\u2066"} & set(out)


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=60))
def test_ascii_takes_the_cells_of_what_it_stands_for(text: str) -> None:
    safe = SafeOutput(drawable("ascii"))
    for character in text:
        out = written(character, safe)
        assert out.isascii()
        if ord(character) not in {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}:
            assert len(out) == cell_len(character)


def test_clean_rows_are_left_as_they_are() -> None:
    row = [Segment("loss ⣿━ 1.5")]
    assert SafeOutput().apply(row, BLACK) is row


def test_glyphs_keep_what_they_say() -> None:
    parts = written("█▓▒░▚≡◦", SafeOutput(drawable("ascii")))
    assert len(set(parts)) == 7, "the parts of a gauge differ without colour"
    assert len(set(written("●◌✓■✗‖", SafeOutput(drawable("ascii"))))) == 6, "so do the marks of a run's status"
    assert written("━━●──", SafeOutput(drawable("ascii"))) == "--O--"
    assert [ascii_of(character) for character in "│┼╭▲é"] == ["|", "+", "+", "^", "e"]
    assert (ascii_of("⠉"), ascii_of("⣀"), ascii_of("⠀"), ascii_of("⡇")) == ("'", ".", " ", "|")


@pytest.mark.parametrize(
    ("encoding", "character", "drawn"),
    [
        ("latin-1", "é", True),
        ("latin-1", "█", False),
        ("cp437", "█", True),
        ("cp437", "⣿", False),
        ("nonsense", "x", False),
    ],
)
def test_an_encoding_draws_what_it_has(encoding: str, character: str, drawn: bool) -> None:
    can_draw = drawable(encoding)
    assert can_draw is not None
    assert can_draw(character) is drawn


def test_utf_8_draws_all_and_the_linux_console_no_braille() -> None:
    assert drawable("UTF-8") is None
    console = drawable("utf-8", braille=False)
    assert console is not None
    assert (console("█"), console("⣿")) == (True, False)
    assert written("⣿█", SafeOutput(console)) == "|█"
