"""Which column of a file is which of ours: by `data.columns`, by `data.prompt`, or but for the case of its letters."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from studio.core.columns import FIELD_NAMES, Pairs
from studio.core.text import plain
from studio.probe.data.beside import CONTEXT_COLUMNS, LABEL_COLUMNS
from studio.probe.data.formats import ANSWER_COLUMNS, known_columns, recognise, wrong_columns
from studio.probe.data.preferences import PAIR_COLUMNS, PROMPT_COLUMNS, TURN_COLUMNS, pair_shape
from studio.probe.data.reading import Reading
from studio.probe.data.written_prompt import columns_of

_ASKING = frozenset({*PROMPT_COLUMNS, *TURN_COLUMNS, *CONTEXT_COLUMNS, "text"})
"""Columns in whose place a written prompt stands."""


def folded_names(value: Mapping[str, Any]) -> Pairs:
    """Return our names for columns that have them but for upper case and spaces, if they make a row that is known."""
    if recognise(value) or pair_shape(value):
        return ()
    known = known_columns()
    pairs: dict[str, str] = {}
    for column in value:
        ours = column.strip().lower()
        if ours in known and ours not in value:
            pairs.setdefault(ours, column)
    found = tuple(pairs.items())
    named = Reading(columns=found).renamed(dict(value))
    return found if recognise(named) or pair_shape(named) else ()


def with_prompt(value: Mapping[str, Any], prompt: str, used: Collection[str] | None, how: Reading) -> dict[str, Any]:
    """Return a row with a prompt that was written from its columns, in place of all columns that ask.

    Args:
        value: The row, with the file's names.
        prompt: The prompt.
        used: The columns that were used for it; None where any may have been.
        how: How the file is read.
    """
    answers = {how.key(name) for name in (*ANSWER_COLUMNS, *PAIR_COLUMNS)}
    gone = _ASKING | set(used or ())
    return {name: part for name, part in value.items() if name in answers or name not in gone} | {"prompt": prompt}


def read_columns(columns: Iterable[str], how: Reading, flat: Collection[str]) -> tuple[str, ...]:
    """Return which columns of a table are read.

    Args:
        columns: Its columns.
        how: How it is read.
        flat: Those that hold neither lists nor tables.
    """
    known = known_columns() | {column for _, column in how.columns}
    used = columns_of(how.prompt) if how.prompt else frozenset()
    return tuple(
        column
        for column in columns
        if used is None
        or column in used
        or column in known
        or column.strip().lower() in known
        or (column in LABEL_COLUMNS and column in flat)
    )


def misfit(value: Mapping[str, Any], wanted: str, how: Reading) -> str:
    """Return the message for a row that is no known one: what was found and what was wanted.

    Args:
        value: The row, with our names.
        wanted: The format that it must have.
        how: How the file is read.
    """
    found = [name if name == "prompt" and how.prompt else how.key(name) for name in value]
    if missing := [
        f"{ours} = '{column}'" for ours, column in how.columns if ours not in FIELD_NAMES and column not in found
    ]:
        gone = plain(", ".join(missing), one_line=True, limit=200)
        return f"{wrong_columns(found, wanted)}. data.columns names {gone}, which the row does not have"
    if how.prompt:
        rest = ", ".join(plain(name, one_line=True, limit=40) for name in found[:12] if name != "prompt")
        return (
            f"found {f'the columns {rest}' if rest else 'nothing'} beside the prompt that data.prompt writes; wanted "
            f"an answer: {', '.join(ANSWER_COLUMNS)}, or chosen and rejected. Name the file's column in data.columns: "
            "completion=..."
        )
    return wrong_columns(found, wanted)
