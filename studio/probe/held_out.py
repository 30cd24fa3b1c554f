"""Rows that may be measured: those that a run held out or never saw, and for an untrained base any row.

This one place decides it for training, audits, answers and races. A run's record says which rows it held out and which
it was trained on (`studio.runs.held_out`); here they are found again in a data file.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import chain
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED, Recipe
from studio.core.sources import Source
from studio.core.text import plain
from studio.probe.data import (
    Conversation,
    DataSet,
    Preference,
    Reading,
    Row,
    few_answers,
    keys_of,
    read_data,
    shipped_data,
    split,
)
from studio.probe.data.documents import last_part, split_documents
from studio.probe.data.mixture import mixed, part_of
from studio.probe.data.opened import Progress
from studio.probe.data.row_keys import Column
from studio.probe.data.views import chosen
from studio.runs.held_out import MIXTURE, DrawnFrom, Hashes, HeldOutRecord, TrainedRows


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A training run's rows.

    Attributes:
        train: The rows to train on.
        held_out: The rows to measure on; none of them is trained on.
        notes: What the user should know of the rows, such as that fewer were held out than asked for.
        record: The record that the run keeps of both.
        places: Of the held-out rows among all; empty where they are of a file of their own, or parts of a row.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    notes: tuple[str, ...]
    record: HeldOutRecord
    places: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class RowsToMeasure:
    """Rows that an audit may measure.

    Attributes:
        rows: As many as were asked for, or as there are, in the file's order.
        held_out_rows: How many rows may be called held out; None for a base, with which nothing was trained.
        where: Where they come from, in words.
        format: The format as which they were read.
        notes: What was left out, and what the user should know of the rows.
    """

    rows: Sequence[Row]
    held_out_rows: int | None
    where: str
    format: str
    notes: tuple[str, ...]

    @property
    def hashes(self) -> list[str]:
        """The hash of each row, as a run's record has it."""
        return list(_contents(self.rows))


def hold_out(
    recipe: Recipe,
    data: DataSet,
    eval_data: DataSet | None,
    kept: HeldOutRecord | None = None,
    progress: Progress | None = None,
) -> HeldOut:
    """Return what a run trains on and what it holds out: rows split off, or the rows of a file of their own.

    Args:
        recipe: Says how many rows are held out, and by which seed. Of a file of their own, 0 means all rows.
        data: The rows to train on and, without a file of their own, to hold out.
        eval_data: The rows of `data.eval_path`; those that are trained on too are left out.
        kept: What the run held out when it began. A resumed run holds out the same rows, even if an earlier version
            of this program chose them, which would choose others now.
        progress: Gets (rows looked at, rows in all); may raise to end it.

    Raises:
        BadInput: Every row of `data.eval_path` is trained on.
    """
    if not isinstance(data.rows, tuple):
        keys_of(data.rows, progress)  # of stored rows they are kept from here on
    if eval_data is None:
        if any(part.data.format == "text" for part in data.parts) or data.format == "text":
            parts = split_documents(data.rows, recipe, cuts=not data.parts)
        else:
            parts = split(data.rows, recipe.eval.rows, recipe.train.seed)
        train, held, notes, places, last = parts.train, parts.held_out, parts.notes, parts.places, parts.last
    else:
        train, trained, places, last = data.rows, trained_on(data.rows), (), 0
        unseen = _unseen(eval_data, trained)
        if not unseen.rows:
            raise BadInput(
                f"data.eval_path: all {len(eval_data.rows)} rows of {_name(eval_data)} are trained on: "
                f"{_name(data)} holds them too, so none is held out. Name a file of other rows, or leave "
                "data.eval_path empty."
            )
        held = _chosen(unseen.rows, recipe.eval.rows or len(unseen.rows), recipe.train.seed)
        notes = (*unseen.notes, *_answers_note(held))
    if kept is not None and (recipe.eval.rows or eval_data) and _contents(held) != kept.held_out:
        again, others, where = _matching((eval_data or data).rows, kept)
        if again:
            held, train, last = again, train if eval_data else others, 0
            places = () if eval_data else where
            notes = ("the rows held out are those of the run's first start", *_answers_note(held))
    word = MIXTURE if data.parts else data.word or recipe.data.path
    drawn = _drawn_from(recipe, data, places)
    if held and drawn and eval_data is None:
        notes += (f"held out of {', '.join(f'{Path(one.path).name} {one.held_out} rows' for one in drawn)}",)
    record = HeldOutRecord(
        data=word,
        held_from=(eval_data.word or recipe.data.eval_path) if eval_data else word,
        format=recipe.data.format,
        held_out=_contents(held),
        trained=trained_on(train),
        sources=drawn,
        last_part=last,
        reading=Reading.of(recipe).table(),
    )
    return HeldOut(train, held, notes, record, () if last else places)


def _drawn_from(recipe: Recipe, data: DataSet, held_out: Sequence[int]) -> tuple[DrawnFrom, ...]:
    """Return the sources of a mixture, with how many rows are drawn from each and held out; nothing for one file."""
    held = Counter(part_of(data, place) for place in held_out)
    return tuple(
        DrawnFrom(
            *(part.data.word or source.path, source.format or recipe.data.format, part.drawn, held[place]),
            columns=source.columns,
            prompt=source.prompt,
        )
        for place, (source, part) in enumerate(zip(recipe.data.sources, data.parts, strict=True))
    )


def _contents(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(content.hex() for content in keys_of(rows).column("content"))


def _matching(rows: Sequence[Row], record: HeldOutRecord) -> tuple[Sequence[Row], Sequence[Row], tuple[int, ...]]:
    """Return the rows that a record calls held out, the others, and the places of the former."""
    # Counted, because a row that stands twice in the file may have been held out once or twice.
    left = Counter(map(bytes.fromhex, record.held_out))
    held = []
    for place, content in enumerate(keys_of(rows).column("content")):
        if left.get(content):
            left[content] -= 1
            held.append(place)
    among = set(held)
    others = chosen(rows, (place for place in range(len(rows)) if place not in among))
    return chosen(rows, held), others, tuple(held)


def trained_on(rows: Sequence[Row]) -> TrainedRows:
    """Return the hashes that a record keeps of rows that are trained on.

    Among those of prompts are the ones that twins share, so that twins are known too.
    """
    keys = keys_of(rows)

    def hashes(*names: Column) -> Hashes:
        return Hashes(filter(None, chain.from_iterable(keys.column(name).short() for name in names)))

    return TrainedRows(len(rows), hashes("content"), hashes("prompt", "twin_prompt", "first"), hashes("answer"))


def rows_of_base(data: Path, *, format: str, wanted: int, seed: int) -> RowsToMeasure:  # noqa: A002
    """Return rows to measure a model on that was not trained here: any rows of the file.

    Args:
        data: A data file.
        format: The format as which it is read.
        wanted: Most rows; where there are more, the seed chooses.
        seed: Another seed gives another choice.

    Raises:
        BadInput: The file cannot be used.
    """
    found = read_data(data, Reading(format, wants="measured"))
    rows = _chosen(found.rows, wanted, seed)
    where = _share(rows, found.rows, len(found.rows), f"rows of {_name(found)}", seed)
    notes = (*found.notes(), *_pairs_note(rows), *_answers_note(rows, "rows"))
    return RowsToMeasure(rows, None, where, found.format, notes)


def rows_of_run(
    record: HeldOutRecord,
    name: str,
    data: Path,
    *,
    format: str,  # noqa: A002
    wanted: int,
    seed: int,
) -> RowsToMeasure:
    """Return rows to measure a trained model on: of its own file those that it held out, of others those it never saw.

    Args:
        record: The run's record.
        name: The run for messages, such as `the run mine`, or several runs that share the record.
        data: The file that the run's held-out rows are in, or any other.
        format: The format of another file; the run's own file is read as it was read then.
        wanted: Most rows; where there are more, the seed chooses.
        seed: Another seed gives another choice.

    Raises:
        BadInput: The file cannot be used, or no row of it may be called held out.
    """
    run = plain(name, one_line=True)
    mixture = data.name == MIXTURE == record.held_from
    own = mixture or _same_file(data, Path(record.held_from))
    # Read in another format, the same lines would give other rows, and none would be found in the record.
    found = _mixture(record, run) if mixture else _read(data, record.format if own else format, record)
    shown = _name(found)
    if own:
        if not record.held_out:
            raise BadInput(
                f"{run} held out no row: all {record.trained.rows} rows of {shown} were trained on, and "
                "figures on them would show memory. Name rows that it has not seen (--data FILE), or train again with "
                "eval.rows above 0."
            )
        held, notes = _held_again(found, record, run)
        many = len(record.held_out)
        rows = _chosen(held, wanted, seed)
        where = _share(rows, held, many, f"rows that {run} held out of {shown}", seed)
        notes = (*found.notes(), *notes, *_pairs_note(rows), *_answers_note(rows))
        return RowsToMeasure(rows, many, where, found.format, notes)
    unseen = _unseen(found, record.trained)
    if not unseen.rows:
        raise BadInput(
            f"all {len(found.rows)} rows of {shown} were trained on by {run}: none may be called held out. "
            "Name rows that it has not seen, or leave --data out to measure on those that it held out."
        )
    rows = _chosen(unseen.rows, wanted, seed)
    where = _share(rows, unseen.rows, len(unseen.rows), f"rows of {shown} that {run} was not trained on", seed)
    notes = (*found.notes(), *unseen.notes, *_pairs_note(rows), *_answers_note(rows))
    return RowsToMeasure(rows, len(unseen.rows), where, found.format, notes)


def _mixture(record: HeldOutRecord, run: str) -> DataSet:
    """Return all rows of the sources of a run's mixture, each as often as it lies in its file or was drawn."""
    sources = [Source(one.path, 0.0, one.drawn, one.format, one.columns, one.prompt) for one in record.sources]
    try:
        how = Reading.of_table(record.reading, format="auto", on_bad_row="skip", wants="measured")
        return mixed(sources, how, seed=0, whole=True)
    except BadInput as error:
        raise BadInput(f"{error} {run} held out rows of it: put it back where it was.") from error


def _read(data: Path, format: str, record: HeldOutRecord) -> DataSet:  # noqa: A002
    own = _same_file(data, Path(record.held_from))
    # A run may have left out bad rows, and its own rows are known again by their content.
    how = Reading.of_table(record.reading, format=format, on_bad_row="skip" if own else "stop", wants="measured")
    try:
        if own or not how.prompt:
            return read_data(data, how)
        try:
            return read_data(data, how)
        except BadInput as error:
            # Another file need not have the columns that the run's prompts were written from.
            with suppress(BadInput):
                return read_data(data, replace(how, prompt=""))
            raise error from None
    except BadInput as error:
        if not own or data.exists():
            raise
        raise BadInput(
            f"{error} The run's held-out rows were in it: put it back, or name where it lies now with --data; its rows "
            "are known again by their text."
        ) from error


def _held_again(found: DataSet, record: HeldOutRecord, run: str) -> tuple[Sequence[Row], tuple[str, ...]]:
    """Return the recorded rows that are still in the file, and a note where some are not."""
    rows = last_part(found.rows, record.last_part).held_out if record.last_part else found.rows
    contents, known = keys_of(rows).column("content"), record.trained.contents
    unseen = chosen(rows, (place for place, short in enumerate(contents.short()) if not known.holds(short)))
    held = _matching(unseen, record)[0]
    many, shown = len(record.held_out), _name(found)
    if not held:
        raise BadInput(
            f"{shown} was changed since {run} was trained: none of the {many} rows that it held out is in it "
            "any more. Put the file back as it was, or name other rows with --data FILE."
        )
    if len(held) == many:
        return held, ()
    return held, (
        f"{shown} was changed since the run was trained: {len(held)} of the {many} rows that it held out are still "
        "there, and only they are measured",
    )


@dataclass(frozen=True, slots=True)
class _Unseen:
    rows: Sequence[Row]
    notes: tuple[str, ...]


def _unseen(data: DataSet, trained: TrainedRows) -> _Unseen:
    """Return the rows of a file that were not trained on, and how many were left out.

    A row is left out if its prompt was trained on, even with another answer or punctuation, or if it begins as a
    conversation that was trained on, as it would be in a split. Where that would leave no row (all begin alike, or one
    prompt has many answers), rows stay that begin so, or whose prompt, but not the whole row, was trained on.
    """
    shown, keys = _name(data), keys_of(data.rows)

    def there(known: Hashes, *names: Column) -> bytearray:
        """Return for each row 1 if one of these hashes is known."""
        found = bytearray(len(keys))
        for name in names:
            for place, short in enumerate(keys.column(name).short()):
                found[place] |= bool(short) and known.holds(short)
        return found

    same, first, answer = (
        there(trained.contents, "content"), there(trained.prompts, "first"), there(trained.answers, "answer")
    )  # fmt: skip
    asked = there(trained.prompts, "prompt", "twin_prompt")
    fresh = array("q", (place for place in range(len(keys)) if not same[place]))
    other_prompts = array("q", (place for place in fresh if not asked[place]))
    apart = array("q", (place for place in other_prompts if not first[place]))
    if apart or other_prompts:
        kept, why = apart or other_prompts, "they, or their prompts, are trained on"
    else:
        kept, why = fresh, "they are trained on"
    left_out = len(keys) - len(kept)
    notes = [f"{left_out} of the {len(keys)} rows of {shown} are left out: {why}"] if kept and left_out else []
    if alike := sum(asked[place] or first[place] or answer[place] for place in kept):
        notes.append(f"{alike} of {len(kept)} held-out rows have a prompt or an answer that is also trained on")
    return _Unseen(chosen(data.rows, kept), tuple(notes))


def _pairs_note(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return what is measured of rows that are pairs of answers, or are marked as undesired."""
    notes = []
    if any(isinstance(row, Preference) for row in rows):
        notes.append("of each pair of answers the chosen one is measured, as a supervised row; the other is not")
    if undesired := sum(isinstance(row, Conversation) and row.desirable is False for row in rows):
        notes.append(f"{undesired} of the {len(rows)} rows are marked as undesired, and are measured like the others")
    return tuple(notes)


def _answers_note(rows: Sequence[Row], called: str = "held-out rows") -> tuple[str, ...]:
    return tuple(filter(None, [few_answers(rows, called)]))


def _chosen(rows: Sequence[Row], wanted: int, seed: int) -> Sequence[Row]:
    """Return at most `wanted` rows, which ones following from their text and the seed, in the file's order."""
    if len(rows) <= wanted:
        return tuple(rows) if isinstance(rows, list) else rows
    from hashlib import blake2b  # noqa: PLC0415  OpenSSL: 3 ms and 5 MiB that a plan has no use for

    salt, column = str(seed).encode(), keys_of(rows).column("content")
    order = nsmallest(wanted, ((blake2b(key, key=salt).digest(), place) for place, key in enumerate(column)))
    return chosen(rows, sorted(place for _, place in order))


def _share(rows: Sequence[Row], among: Sequence[Row], there: int, what: str, seed: int) -> str:
    if len(rows) == there:
        return f"all {there} {what}"
    return f"{len(rows)} of the {there} {what}{f', chosen by seed {seed}' if len(rows) < len(among) else ''}"


def _same_file(one: Path, other: Path) -> bool:
    one, other = (shipped_data() if str(path) == EMBEDDED else path.expanduser() for path in (one, other))
    try:
        return one.samefile(other)
    except OSError:
        return one.absolute() == other.absolute()


def _name(data: DataSet) -> str:
    return plain(data.path.name, one_line=True)
