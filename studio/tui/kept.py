"""What the user chose and keeps from one visit to the next: the card that is planned for, the theme."""

import json

from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.home import studio_home

_CARD = ("planned_card.json", "card")
_THEME = ("theme.json", "theme")
_LONGEST = 60


def recall_planned_card() -> str:
    """Return the name of the card, empty where none is planned for or the file does not tell."""
    return _recall(*_CARD)


def keep_planned_card(name: str) -> None:
    """Keep the name of the card; empty plans for this machine again.

    Raises:
        OSError: It cannot be written.
    """
    _keep(*_CARD, name)


def recall_theme() -> str:
    """Return the name of the theme, empty where none was chosen or the file does not tell."""
    return _recall(*_THEME)


def keep_theme(name: str) -> None:
    """Keep the name of the theme.

    Raises:
        OSError: It cannot be written.
    """
    _keep(*_THEME, name)


def _recall(file: str, key: str) -> str:
    try:
        word = json.loads((studio_home() / file).read_bytes())[key]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return plain(word, one_line=True, limit=_LONGEST) if isinstance(word, str) else ""


def _keep(file: str, key: str, word: str) -> None:
    home = studio_home()
    home.mkdir(parents=True, exist_ok=True)
    write_whole(home / file, json.dumps({key: word}) + "\n")
