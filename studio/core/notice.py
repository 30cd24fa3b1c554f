"""Desktop notifications by way of the terminal, which shows them even where the program runs on another machine.

There are two widespread sequences, and no terminal answers whether it knows one; one that does not ignores it.

    OSC 9     iTerm2, kitty, WezTerm, Ghostty, foot, Windows Terminal (which ignores it)
    OSC 777   urxvt with its notify extension, VTE with the patch that Fedora ships
"""

from collections.abc import Mapping

from studio.core.text import plain

_ESCAPE, _BELL = "\x1b", "\x07"
_LONGEST = 200


def desktop_notice(words: str, environment: Mapping[str, str]) -> str:
    """Return what makes a terminal show a notification; empty for terminals that may print it as text.

    tmux hands it on where its option allow-passthrough is on, and drops it elsewhere; GNU screen is not asked to.

    Args:
        words: What is shown: its first line, harmless and at most 200 characters long.
        environment: That of the process, which says what terminal it is.
    """
    term = environment.get("TERM", "")
    if term in ("", "dumb", "linux") or environment.get("STY") or environment.get("TEXTUAL_DRIVER"):
        return ""
    # A semicolon would end the title, and a backslash might end the sequence.
    line = plain(words.partition("\n")[0], one_line=True, limit=_LONGEST).translate({ord(";"): ",", ord("\\"): "/"})
    by_name = environment.get("VTE_VERSION") or term.startswith("rxvt")
    sequence = f"{_ESCAPE}]777;notify;lora-studio;{line}{_BELL}" if by_name else f"{_ESCAPE}]9;{line}{_BELL}"
    if environment.get("TMUX"):
        return f"{_ESCAPE}Ptmux;{sequence.replace(_ESCAPE, _ESCAPE * 2)}{_ESCAPE}\\"
    return sequence
