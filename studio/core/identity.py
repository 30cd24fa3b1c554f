"""What may differ between a run's first start and its resume, and the words for what may not.

A resume promises the result of an uninterrupted run. So everything that decides which numbers are trained on which rows
must be as it was: base, rows, and every field of the recipe that is declared so. Base and data are compared by content,
not by path: a copy in another place is the same.

**Libraries may differ**, and are named in a warning. Another version, even a major one, does the same arithmetic, if in
another order: the last bits differ, the meaning does not. A refusal would strand a run of days behind an update, which
is often the reason to resume (a bug fixed, a security fix, another machine). Whoever reads the warning can still go
back.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from studio.core.recipe import FIELDS, Recipe
from studio.core.text import plain
from studio.core.value_kinds import ValueKind, found_value

_LONGEST = 80


def recipe_changes(before: Mapping[str, Any], now: Recipe) -> tuple[list[str], list[str]]:
    """Return in words which fields change what is trained, and which only how it is rounded.

    Args:
        before: The tables of the recipe at the first start; a field that they lack had its default.
        now: The recipe of the resume.
    """
    trained: list[str] = []
    rounded: list[str] = []
    first, table = {**_flat(Recipe().to_dict()), **_flat(before)}, _flat(now.to_dict())
    for path, place in FIELDS.items():
        was, now_is = first[path], table[path]
        # Of the names in a pattern the first that fits a module counts, so another order is another pattern.
        same = was == now_is and (not isinstance(was, dict) or list(was) == list(now_is))
        if not same and place.resume in ("same", "rounded"):
            told = rounded if place.resume == "rounded" else trained
            told.append(f"{path}: {_shown(place.kind, was)} -> {_shown(place.kind, now_is)}")
    rows = [first[f"train.{name}"] for name in ("micro_batch", "accumulation")]
    before_rows = rows[0] * rows[1] if all(type(count) is int for count in rows) else 0
    if before_rows != now.rows_per_step:
        trained.append(f"rows of a step (train.micro_batch x train.accumulation): {before_rows} -> {now.rows_per_step}")
    return trained, rounded


def version_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return in words which libraries have another version than at the first start."""
    names = sorted({*before, *now})
    pairs = ((name, before.get(name, "none"), now.get(name, "none")) for name in names)
    return [f"{_word(name)} {_word(was)} -> {_word(there)}" for name, was, there in pairs if was != there]


def row_changes(before: Sequence[str] | None, now: Sequence[str]) -> str:
    """Return in words how training rows differ from those of the first start.

    Args:
        before: A hash of each row then, in order; None where they are not known one by one.
        now: The same now.
    """
    if before is None:
        return "they have another content or order"
    gone, new = Counter(before) - Counter(now), Counter(now) - Counter(before)
    first = next((place for place, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(before), len(now)) if first is None else first
    where = f"the first difference is at training row {place + 1}"
    if not gone and not new:
        return f"the same {len(now)} rows in another order; {where}"
    counts = f"{len(before)} rows then, {len(now)} now" if len(before) != len(now) else f"{len(now)} rows as before"
    parts = [f"{sum(rows.values())} {word}" for rows, word in ((gone, "no longer there"), (new, "new")) if rows]
    return f"{counts}: {', '.join(parts)}; {where}"


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _shown(kind: ValueKind, value: Any) -> str:
    text = kind.written(kind.shaped(value)) if isinstance(value, dict) else found_value(value)
    return plain(text or "none", one_line=True, limit=_LONGEST)


def _word(text: object) -> str:
    return plain(str(text), one_line=True, limit=_LONGEST)
