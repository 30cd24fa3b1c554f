"""The card of the catalogue that the user plans for, kept from one visit to the next."""

import json

from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.home import studio_home

_FILE = "planned_card.json"


def recall_planned_card() -> str:
    """Return the name of the card, empty where none is planned for or the file does not tell."""
    try:
        name = json.loads((studio_home() / _FILE).read_bytes())["card"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return plain(name, one_line=True, limit=60) if isinstance(name, str) else ""


def keep_planned_card(name: str) -> None:
    """Keep the name of the card; empty plans for this machine again.

    Raises:
        OSError: It cannot be written.
    """
    home = studio_home()
    home.mkdir(parents=True, exist_ok=True)
    write_whole(home / _FILE, json.dumps({"card": name}) + "\n")
