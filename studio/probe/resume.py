"""With which base, rows and recipe a run may be resumed: checked before the job is started, and again by the job.

A resume promises the result of an uninterrupted run. So everything that decides which numbers are trained on which rows
must be as it was at the run's first start: base, rows, and every field of the recipe that is declared so. Base and data
are compared by content, not by path: a copy in another place is the same.

**Libraries may differ**, and are named in a warning. Another version, even a major one, does the same arithmetic, if in
another order: the last bits differ, the meaning does not. A refusal would strand a run of days behind an update, which
is often the reason to resume (a bug fixed, a security fix, another machine). Whoever reads the warning can still go
back.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.recipe import FIELDS, Recipe
from studio.core.text import plain
from studio.core.value_kinds import ValueKind, found_value
from studio.probe.data import Row, keys_of
from studio.probe.data.mixture import data_of, eval_data_of, words_of
from studio.probe.data.places import known_bytes
from studio.probe.fingerprint import difference, known_fingerprint, other_files
from studio.probe.held_out import hold_out
from studio.probe.models import find_base
from studio.runs.data_cache import sum_of_bytes
from studio.runs.held_out import read_record
from studio.runs.identity import Identity, RowHashes, read_identity
from studio.runs.layout import RunPaths

_BEGAN = "that it began with"
_NAMED = 8
_LONGEST_VALUE = 80
_AT_ONCE_BYTES = 2**26
"""Data up to this size are read before the job is started, in a few seconds at most. The job reads larger ones, and
shows its progress."""


@dataclass(frozen=True, slots=True)
class RowsFound:
    """The rows of a run, by content.

    Attributes:
        hashes: The hash of every training row, in order: 16 characters of XXH3.
        held_out: How many rows are held out.
        held_out_sum: A checksum of the held-out rows, in order.
    """

    hashes: RowHashes
    held_out: int
    held_out_sum: str

    @classmethod
    def of(cls, train: Sequence[Row], held_out: Sequence[Row]) -> "RowsFound":
        """Return the rows as they were read."""
        held = _hashes(held_out)
        return cls(_hashes(train), len(held), _sum(held))

    def table(self) -> dict[str, Any]:
        """Return counts and checksums, ready for JSON."""
        return {
            "train": len(self.hashes),
            "train_sum": _sum(self.hashes),
            "held_out": self.held_out,
            "held_out_sum": self.held_out_sum,
        }


def check_resume(paths: RunPaths, recipe: Recipe) -> None:
    """Refuse another recipe, base or data than the run began with, as far as it is known without a long wait.

    Weights whose checksums are not known yet, and data of more than 64 MiB, are left to the job.

    Raises:
        BadInput: Something differs; the message says what.
    """
    first = read_identity(paths)
    refuse_other_recipe(paths, first, recipe)
    if first.base is not None:
        base = find_base(recipe.model.base, recipe.model.revision)
        if base.path is not None:
            refuse_other_base(paths, first, base.path, known_fingerprint(base.path))
    if first.rows is not None and _data_bytes(recipe) <= _AT_ONCE_BYTES:
        refuse_other_rows(paths, first, RowsFound.of(*_rows_of(paths, recipe)))


def refuse_other_recipe(paths: RunPaths, first: Identity, recipe: Recipe) -> list[str]:
    """Refuse a recipe that trains something else than the run's first one; return what changes only the rounding.

    Raises:
        BadInput: It does; the message names the fields.
    """
    if not first.recipe:
        return []
    trained, rounded = recipe_changes(first.recipe, recipe)
    if trained:
        listed = ", ".join(trained[:_NAMED]) + (f" and {len(trained) - _NAMED} more" if len(trained) > _NAMED else "")
        why = f"its recipe.toml is not the one {_BEGAN}, in what its steps so far have learnt from: {listed}"
        raise _other(paths, why, "Put recipe.toml back as it was")
    return rounded


def refuse_other_base(paths: RunPaths, first: Identity, folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse a base other than the one that the run began with: weights, config, tokenizer, chat template or code.

    Raises:
        BadInput: It is another; the message names tensors and files.
    """
    if first.base is None:
        return
    files = other_files(first.base, found)
    changed = f"{', '.join(files)} {'is' if len(files) == 1 else 'are'} changed" if files else ""
    if differs := "; ".join(filter(None, (difference(first.base, found), changed))):
        shown = plain(str(folder), one_line=True)
        raise _other(paths, f"the base model {shown} is not the one {_BEGAN}: {differs}", "Put it back as it was")


def refuse_other_rows(paths: RunPaths, first: Identity, found: RowsFound) -> None:
    """Refuse other rows than the run began with; their files may lie elsewhere now.

    Raises:
        BadInput: They are others; the message says how they changed.
    """
    if first.rows is None:
        return
    now = found.table()
    # The checksum is over the rows in order, since the order of the rows decides which steps they are in.
    if now["train_sum"] != first.rows.get("train_sum"):
        words = f"the training rows are not those {_BEGAN}: {row_changes(first.train_hashes, found.hashes)}"
        raise _other(paths, words, "Put the data back as they were")
    if now["held_out_sum"] != first.rows.get("held_out_sum"):
        counts = f"{first.rows.get('held_out')} then, {now['held_out']} now"
        words = f"the held-out rows are not those {_BEGAN} ({counts}), and their losses could not be compared"
        raise _other(paths, words, "Put the data back as they were")


def changed_libraries(first: Identity, versions: Mapping[str, str]) -> list[str]:
    """Return in words which libraries have another version than when the run began; libraries may differ, see above."""
    return version_changes(first.versions, versions) if first.versions else []


def _rows_of(paths: RunPaths, recipe: Recipe) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the rows to train on and the held-out rows, split as the training splits them."""
    data, eval_data = data_of(recipe), eval_data_of(recipe)
    try:
        kept = read_record(paths)
    except BadInput:
        kept = None
    parts = hold_out(recipe, data, eval_data, kept)
    return parts.train, parts.held_out


def _data_bytes(recipe: Recipe) -> float:
    """Return the size of the data in bytes, without end where it must be downloaded first; a missing file has none."""
    sizes = [known_bytes(word, how) for _, word, how in words_of(recipe)]
    return math.inf if None in sizes else sum(size for size in sizes if size)


def _other(paths: RunPaths, what: str, way_back: str) -> BadInput:
    name = plain(paths.name, one_line=True)
    return BadInput(
        f"the run {name} cannot go on: {what}. {way_back} and resume it, or start a new run. Its checkpoints are "
        "untouched."
    )


def _hashes(rows: Sequence[Row]) -> RowHashes:
    """Return a hash of all that is trained of each row, to the letter; its place in the file does not matter."""
    return RowHashes(keys_of(rows).column("row").content.hex())


def _sum(hashes: RowHashes) -> str:
    return sum_of_bytes(hashes.text.encode())


def recipe_changes(before: Mapping[str, Any], now: Recipe) -> tuple[list[str], list[str]]:
    """Return in words which fields change what is trained, and which only how it is rounded.

    Args:
        before: The tables of the recipe at the first start; a field that they lack had its default.
        now: The recipe of the resume.
    """
    trained: list[str] = []
    rounded: list[str] = []
    first = {**_flat(Recipe().to_dict()), **_flat(before)}
    for path, (was, now_is) in fields_changed(before, now).items():
        if (how := FIELDS[path].resume) in ("same", "rounded"):
            (rounded if how == "rounded" else trained).append(f"{path}: {was} -> {now_is}")
    rows = [first[f"train.{name}"] for name in ("micro_batch", "accumulation")]
    before_rows = rows[0] * rows[1] if all(type(count) is int for count in rows) else 0
    if before_rows != now.rows_per_step:
        trained.append(f"rows of a step (train.micro_batch x train.accumulation): {before_rows} -> {now.rows_per_step}")
    return trained, rounded


def fields_changed(before: Mapping[str, Any], now: Recipe) -> dict[str, list[str]]:
    """Return the fields that differ, each with both values in words; none where the recipe before is not known.

    Args:
        before: As for `recipe_changes`; empty where there was no start before.
        now: As there.
    """
    if not before:
        return {}
    first, table = {**_flat(Recipe().to_dict()), **_flat(before)}, _flat(now.to_dict())
    changed = {}
    for path, place in FIELDS.items():
        was, now_is = first[path], table[path]
        # Of the names in a pattern the first that fits a module counts, so another order is another pattern.
        if was != now_is or (isinstance(was, dict) and list(was) != list(now_is)):
            changed[path] = [_told(place.kind, was), _told(place.kind, now_is)]
    return changed


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


def _told(kind: ValueKind, value: Any) -> str:
    text = kind.written(kind.shaped(value)) if isinstance(value, dict) else found_value(value)
    return plain(text or "none", one_line=True, limit=_LONGEST_VALUE)


def _word(text: object) -> str:
    return plain(str(text), one_line=True, limit=_LONGEST_VALUE)
