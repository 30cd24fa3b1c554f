"""What a person writes into the adapter's text fields: ranks and alphas per module, layers, whole modules."""

import re
from collections.abc import Iterator

MOST_LAYERS = 10_000
"""A layer number above this is a slip of the finger; no decoder is a tenth as deep."""

MOST_REPEATS = 4
"""A regular expression with more, or with a repeated group, can take hours on the path of one module."""

PATTERN_FORM = (
    "name=number with commas between, such as down_proj=32, layers.0.self_attn.q_proj=8; in a regular expression no "
    f"repeated group and at most {MOST_REPEATS} repeats"
)
MODULES_FORM = "module names with commas between, such as lm_head, embed_tokens; empty for none"
LAYERS_FORM = "numbers and ranges from 0, such as 0-7, 12; empty for all"

_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEAT = re.compile(r"[*+?{]")
_NAME = re.compile(r"\w+(\.\w+)*")
_RANGE = re.compile(r"(\d{1,5})(?:\s*-\s*(\d{1,5}))?")


def pattern_of(text: str) -> dict[str, float]:
    """Return the numbers by module name of a text such as `down_proj=32, q_proj=8`; empty for an empty text.

    A name is the end of a module's dotted path, or a regular expression for it (peft's `rank_pattern`).

    Raises:
        ValueError: A part has no number, names nothing, is no regular expression, one that could take for ever, or
            comes twice; says which.
    """
    found: dict[str, float] = {}
    for part in _parts(text):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if not name or name in found or _REPEATED_GROUP.search(name) or len(_REPEAT.findall(name)) > MOST_REPEATS:
            raise ValueError(part)
        try:
            re.compile(name)
            found[name] = float(number)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(part) from error
    return found


def layers_of(text: str) -> tuple[int, ...]:
    """Return the layer numbers of a text such as `0-7, 12`, ascending; empty for an empty text, which means all.

    Raises:
        ValueError: A part is neither a number nor a range from low to high; says which.
    """
    numbers: set[int] = set()
    for part in _parts(text):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(part)
        first = int(match[1])
        last = int(match[2] or first)
        if last < first or last > MOST_LAYERS:
            raise ValueError(part)
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def modules_of(text: str) -> tuple[str, ...]:
    """Return the module names of a text such as `lm_head, embed_tokens`; empty for an empty text, which means none.

    Raises:
        ValueError: A part is no dotted name, or comes twice; says which.
    """
    names: list[str] = []
    for part in _parts(text):
        if not _NAME.fullmatch(part) or part in names:
            raise ValueError(part)
        names.append(part)
    return tuple(names)


def _parts(text: str) -> Iterator[str]:
    return (part.strip() for part in text.split(",") if part.strip())
