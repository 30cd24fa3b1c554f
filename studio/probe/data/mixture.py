"""A recipe's data: one file, or a mixture of several that is one data set from here on.

Of each source of a mixture a number of rows is drawn (`studio.core.sources`): all of them, a choice by the recipe's
seed, or all of them several times and then a choice. Which ones follows from the seed and the place of the source and
of the rows alone, so a resumed run draws the same. Training and held-out rows are split after that, all sources
together, so that twins from two sources are on one side.
"""

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from random import Random

from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED, Recipe
from studio.core.sources import Source, drawn_rows
from studio.core.text import plain
from studio.probe.data.lengths import estimated_tokens
from studio.probe.data.opened import Progress
from studio.probe.data.places import find_files, hub_word, known_bytes, same_place
from studio.probe.data.read import read_data
from studio.probe.data.reading import Reading
from studio.probe.data.rows import DataSet, Part, Row
from studio.probe.data.views import Chain, drawn

Read = Callable[..., DataSet]
"""`read_data`, or `inspect_data`, which reports in place of refusing."""
_SAMPLED = 200
"""Rows of a source whose tokens are counted for its mean."""
_NAMED = 3
_LONGEST_NAME = 40


def data_of(recipe: Recipe, *, progress: Progress | None = None, read: Read = read_data) -> DataSet:
    """Return what a recipe trains on, and without a held-out file holds out: its file or its mixture.

    Args:
        recipe: Names the data.
        progress: Gets (done, total).
        read: Reads a file.

    Raises:
        BadInput: A file cannot be used; the message names the field.
    """
    how, data = Reading.of(recipe), recipe.data
    if not data.sources:
        return _read("data.path", data.path, how, progress, read)
    return mixed(
        data.sources,
        how,
        seed=recipe.train.seed,
        base=recipe.model.base,
        by_tokens=data.weigh_by == "tokens",
        progress=progress,
        read=read,
    )


def eval_data_of(recipe: Recipe, *, progress: Progress | None = None) -> DataSet | None:
    """Return the rows of a recipe's held-out file; None where it names none.

    Raises:
        BadInput: It cannot be used.
    """
    return _read("data.eval_path", *_eval_word(recipe), progress) if recipe.data.eval_path else None


def words_of(recipe: Recipe) -> Iterator[tuple[str, str, Reading]]:
    """Yield each file, folder or data set of the hub that a recipe reads: its field, its word, how it is read."""
    how, data = Reading.of(recipe), recipe.data
    for place, source in enumerate(data.sources, 1):
        yield f"data.sources, source {place}", source.path, how.of_source(source)
    if not data.sources:
        yield "data.path", data.path, how
    if data.eval_path:
        yield "data.eval_path", *_eval_word(recipe)


def fetch_data(recipe: Recipe, *, progress: Progress) -> None:
    """Download what a recipe reads of the hub and the cache does not have.

    Args:
        recipe: Names the data.
        progress: Told (done, total) in bytes of one data set after another; may raise to end it.

    Raises:
        BadInput: It cannot be had; the message names the field.
    """
    for field, word, how in words_of(recipe):
        if hub_word(word, how):
            try:
                find_files(Path(word), how, progress=progress)
            except BadInput as error:
                raise BadInput(f"{field}: {error}") from error


def missing_data(recipe: Recipe) -> dict[str, int]:
    """Return the data sets of the hub that are still to be downloaded, with their bytes; asks the hub.

    Raises:
        BadInput: One cannot be had; the message names the field.
    """
    missing = {}
    for field, word, how in words_of(recipe):
        if there := hub_word(word, how):
            from studio.probe.data.hub_data import find  # noqa: PLC0415  only data of the hub need it

            try:
                if size_bytes := find(there).missing_bytes:
                    missing[word] = size_bytes
            except BadInput as error:
                raise BadInput(f"{field}: {error}") from error
    return missing


def at_commits(recipe: Recipe) -> Recipe:
    """Return a recipe with the commits at which its data sets of the hub are now, so that a resume reads the same.

    Raises:
        BadInput: One cannot be had.
    """
    commits, words = {}, {}
    for field, word, how in words_of(recipe):
        if there := hub_word(word, how):
            from studio.probe.data.hub_data import find  # noqa: PLC0415  as above

            commits[field] = find(there).listing.commit
            words[field] = there.exact(there.wanted.config, there.wanted.split, commits[field])
    if commit := commits.get("data.path"):
        recipe = recipe.with_("data.revision", commit)
    if (held := words.get("data.eval_path")) and not same_place(held, recipe.data.path):
        recipe = recipe.with_("data.eval_path", held)
    sources = (
        replace(source, path=words.get(f"data.sources, source {place}", source.path))
        for place, source in enumerate(recipe.data.sources, 1)
    )
    return recipe.with_("data.sources", tuple(sources))


def _eval_word(recipe: Recipe) -> tuple[str, Reading]:
    word = recipe.data.eval_path
    return word, Reading.of(recipe).held_out(same_place=same_place(word, recipe.data.path))


def mixed(
    sources: Sequence[Source],
    how: Reading,
    *,
    seed: int,
    base: str = "",
    by_tokens: bool = False,
    whole: bool = False,
    progress: Progress | None = None,
    read: Read = read_data,
) -> DataSet:
    """Return the rows that are drawn of several files, as one data set.

    Args:
        sources: The files, and how much of each is wanted.
        how: How they are read, where they do not say otherwise themselves.
        seed: Chooses the rows of those that give only some.
        base: The model whose tokens are counted; empty counts none.
        by_tokens: Whether weights are shares of tokens; where these cannot be counted yet, of bytes of text.
        whole: Whether no row is left out: those of a source of which only some are drawn are all taken.
        progress: Gets (done, total) in bytes.
        read: Reads a file.

    Raises:
        BadInput: One of the files cannot be used.
    """
    found = []
    sizes = [max(1, known_bytes(source.path, how.of_source(source)) or 1) for source in sources]
    for place, source in enumerate(sources):

        def told(done: int, total: int, before: int = sum(sizes[:place]), here: int = sizes[place]) -> None:
            if progress:
                progress(before + here * done // max(1, total), sum(sizes))

        found.append(_read(f"data.sources, source {place + 1}", source.path, how.of_source(source), told, read))
    tokens = [_mean_tokens(data.rows, base) for data in found]
    means = None
    if by_tokens:
        means = tokens if all(tokens) else [_mean_bytes(data.rows) for data in found]
    counts = drawn_rows(sources, [len(data.rows) for data in found], means)
    if whole:
        counts = [
            len(data.rows) * -(-count // max(1, len(data.rows))) for data, count in zip(found, counts, strict=True)
        ]
    chosen = [
        _draw(data.rows, count, Random(f"{seed}:{place}"))  # noqa: S311  no secret
        for place, (data, count) in enumerate(zip(found, counts, strict=True))
    ]
    parts = tuple(map(Part, found, counts, tokens))
    formats = {data.format for data in found if data.format != "text"} or {"text"}
    return DataSet(
        path=Path(_names(found)),
        format=formats.pop() if len(formats) == 1 else "chat",
        columns=tuple(dict.fromkeys(column for data in found for column in data.columns)),
        ignored_columns=tuple(dict.fromkeys(column for data in found for column in data.ignored_columns)),
        rows=Chain(chosen),
        findings=tuple(finding for data in found for finding in data.findings),
        finding_counts=dict(sum((Counter(data.finding_counts) for data in found), Counter())),
        size_bytes=sum(data.size_bytes for data in found),
        parts=parts,
        files=sum(data.files for data in found),
        skipped=dict(sum((Counter(data.skipped) for data in found), Counter())),
    )


def part_of(data: DataSet, place: int) -> int:
    """Return which source of a mixture the row at this place was drawn from, from 0."""
    return bisect_right(list(accumulate(part.drawn for part in data.parts)), place)


def _draw(rows: Sequence[Row], count: int, random: Random) -> Sequence[Row]:
    """Return so many of the rows, in their order: each as often as it goes, then a choice of them."""
    if not rows:
        return rows
    whole, rest = divmod(count, len(rows))
    if whole == 1 and not rest:
        return rows
    # `random()` alone draws the same with every version of Python, by its documentation.
    order = sorted(range(len(rows)), key=[random.random() for _ in rows].__getitem__) if rest else []
    more = set(order[:rest])
    return drawn(rows, array("q", (at for at in range(len(rows)) for _ in range(whole + (at in more)))))


def _read(field: str, word: str, how: Reading, progress: Progress | None, read: Read = read_data) -> DataSet:
    try:
        return read(Path(word) if word == EMBEDDED else Path(word).expanduser(), how, progress=progress)
    except BadInput as error:
        raise BadInput(f"{field}: {error}") from error


def _sample(rows: Sequence[Row]) -> list[Row]:
    """Return rows from everywhere in a source; the same ones every time."""
    every = max(1, len(rows) // _SAMPLED)
    return [rows[place] for place in range(0, len(rows), every)[:_SAMPLED]]


def _mean_tokens(rows: Sequence[Row], base: str) -> float:
    """Return the mean tokens of a row's texts, by a sample; 0 where they cannot be counted on this machine yet."""
    if not base or not rows:
        return 0.0
    try:
        counts = estimated_tokens(_sample(rows), base)
    except BadInput:
        return 0.0
    return max(1.0, sum(counts) / len(counts))


def _mean_bytes(rows: Sequence[Row]) -> float:
    sizes = [sum(len(turn.words.encode("utf-8", "replace")) for turn in row.turns) for row in _sample(rows)]
    return max(1.0, sum(sizes) / max(1, len(sizes)))


def _names(found: Sequence[DataSet]) -> str:
    names = [plain(data.path.name, one_line=True, limit=_LONGEST_NAME) for data in found[:_NAMED]]
    more = len(found) - len(names)
    return " + ".join(names) + (f" + {more} more" if more else "")
