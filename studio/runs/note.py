"""The user's note on a run, in a file of its own: written by verbs and screens, never by the worker."""

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.layout import RunPaths

MOST_CHARACTERS = 500
_MOST_BYTES = 4 * MOST_CHARACTERS


def read_note(paths: RunPaths) -> str:
    """Return the note on a run, empty without one. It is foreign text: pass it through `plain` to show it."""
    try:
        with paths.note.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "replace").strip()[:MOST_CHARACTERS]
    except OSError:
        return ""


def write_note(paths: RunPaths, text: str) -> None:
    """Keep a note on a run; an empty text deletes the note.

    Raises:
        BadInput: The text is too long, the folder is no run, or it cannot be written.
    """
    text = check_note(text)
    if not paths.exists:
        raise BadInput(f"{plain(paths.name, one_line=True)} is no run folder: a note needs a run.")
    try:
        if text:
            write_whole(paths.note, text + "\n")
        else:
            paths.note.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(
            f"the note on {plain(paths.name, one_line=True)} cannot be kept: {error.strerror or error}."
        ) from error


def check_note(text: str) -> str:
    """Return a note without the white space around it.

    Raises:
        BadInput: The note is too long.
    """
    text = text.strip()
    if len(text) > MOST_CHARACTERS:
        raise BadInput(f"found {len(text)} characters; wanted a note of at most {MOST_CHARACTERS}.")
    return text
