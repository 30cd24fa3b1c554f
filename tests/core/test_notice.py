"""What makes a terminal show a desktop notification: never anything that the text itself says to a terminal."""

import pytest

from studio.core.notice import desktop_notice

HOSTILE = "\x1b]0;title\x07 a;b \x9c \\ \x1b[31m\u202eend\nsecond"


@pytest.mark.parametrize(
    ("environment", "begin", "end"),
    [
        ({"TERM": "xterm-256color"}, "\x1b]9;", "\x07"),
        ({"TERM": "xterm-kitty", "COLORTERM": "truecolor"}, "\x1b]9;", "\x07"),
        ({"TERM": "xterm-256color", "VTE_VERSION": "7600"}, "\x1b]777;notify;lora-studio;", "\x07"),
        ({"TERM": "rxvt-unicode-256color"}, "\x1b]777;notify;lora-studio;", "\x07"),
        ({"TERM": "tmux-256color", "TMUX": "/run/tmux,1,0"}, "\x1bPtmux;\x1b\x1b]9;", "\x07\x1b\\"),
    ],
)
def test_the_text_stands_in_one_sequence(environment: dict[str, str], begin: str, end: str) -> None:
    assert desktop_notice("docs-1 finished after 12 min", environment) == f"{begin}docs-1 finished after 12 min{end}"
    said = desktop_notice(HOSTILE, environment)
    text = said.removeprefix(begin).removesuffix(end)
    assert (begin + text + end, "second" in text) == (said, False)
    assert all(sign.isprintable() and sign not in ";\\" for sign in text)
    assert len(desktop_notice("x" * 5000, environment)) < 260


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TERM": "dumb"},
        {"TERM": "linux"},
        {"TERM": "screen", "STY": "1.x"},
        {"TERM": "xterm", "TEXTUAL_DRIVER": "w"},
    ],
)
def test_nothing_is_sent_where_it_might_be_printed(environment: dict[str, str]) -> None:
    assert desktop_notice("done", environment) == ""
