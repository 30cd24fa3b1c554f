"""What is typed into a chat besides questions: commands that begin with a slash."""

from dataclasses import dataclass
from typing import Any

HELP = """/reset            begin a new conversation
/temperature 0.7  how freely tokens are chosen; 0 takes the likeliest (also /top_p, /top_k, /repetition_penalty, /seed)
/max 512          longest answer in tokens
/quit             leave (Ctrl-D too)"""
_NUMBERS = {
    "temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "seed": int, "max_new_tokens": int,
}  # fmt: skip
_OTHER_NAMES = {"exit": "quit", "q": "quit", "new": "reset", "max": "max_new_tokens", "temp": "temperature"}


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its name, the number given with it, or what to answer where it is none that can be done."""

    name: str
    value: Any = 0
    text: str = ""


def read_command(line: str) -> Command | None:
    """Return the command of a line; None for a question."""
    if not line.startswith("/"):
        return None
    word, _, rest = line[1:].partition(" ")
    name = _OTHER_NAMES.get(word, word).replace("-", "_")
    if name in ("quit", "reset"):
        return Command(name)
    if name in _NUMBERS:
        try:
            return Command(name, _NUMBERS[name](rest))
        except ValueError:
            return Command("help", text=f"/{word} wants a number, as in: /temperature 0.7")
    return Command("help", text=HELP)
