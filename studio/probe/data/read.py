"""Reads a data file: recognises its format, normalises every row, and reports everything that is wrong with it."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from studio.core.errors import BadInput
from studio.core.recipe import DataFormat
from studio.core.text import plain
from studio.probe.data.documents import SECTION, sections
from studio.probe.data.findings import Findings, json_kind
from studio.probe.data.formats import beside_columns, is_pair, normalised, recognise, unused_columns
from studio.probe.data.json_rows import json_rows
from studio.probe.data.meant import DataFiles
from studio.probe.data.misreads import refuse_media
from studio.probe.data.named import folded_names, misfit, with_prompt
from studio.probe.data.opened import Progress, kind_of, opened
from studio.probe.data.parquet_rows import arrow_rows, parquet_rows
from studio.probe.data.places import find_files
from studio.probe.data.preferences import pair_shape, refuse_pair
from studio.probe.data.raw_row import Shape
from studio.probe.data.reading import AS_IT_IS, Reading
from studio.probe.data.row_cache import RowCache
from studio.probe.data.rows import DataSet, PlainText, Row, counted
from studio.probe.data.stored_rows import RowWriter
from studio.probe.data.table_rows import table_rows, text_row
from studio.probe.data.written_prompt import WHOLE_ROW, PromptWriter

BY_BYTES = {"json": json_rows, "table": table_rows, "text": text_row}
COLUMNAR = {"parquet": parquet_rows, "arrow": arrow_rows}


def read_data(path: Path, how: Reading = AS_IT_IS, *, progress: Progress | None = None) -> DataSet:
    """Return the usable rows of a data file, and what was found on the way.

    Args:
        path: A file, a folder of files, or a data set of the hub, see `studio.probe.data.places`.
        how: How it is read.
        progress: Gets (done, total), in bytes, or rows of a Parquet file; may raise to end it.

    Raises:
        BadInput: A file is missing or unreadable, or rows in it must be corrected; says where, and what is wanted.
    """
    data, findings = _inspected(path, how, progress)
    findings.refuse(plain(data.path.name, one_line=True))
    if not data.rows:
        raise BadInput(f"{plain(data.path.name, one_line=True)}: no row can be used. {_summary(data)}")
    return data


def inspect_data(path: Path, how: Reading = AS_IT_IS, *, progress: Progress | None = None) -> DataSet:
    """Return the same as `read_data`, but with fatal findings in the result instead of an exception.

    Raises:
        BadInput: The file cannot be read at all.
    """
    return _inspected(path, how, progress)[0]


def first_row(path: Path) -> dict[str, Any]:
    """Return the first row of a file as it is, with all its columns; empty where it has none.

    Raises:
        BadInput: The file cannot be read.
        OSError: The same, as the system says it.
    """
    whole = Reading(prompt=f"{{{{ {WHOLE_ROW} }}}}")  # every column of a table is read for it
    rows = _raw_rows(find_files(path, whole), whole, Findings(), None)
    return next((value for _, value in rows if isinstance(value, dict)), {})


@dataclass(slots=True)
class _Taken:
    """What is known so far of a file that is being read."""

    how: Reading
    findings: Findings
    rows: RowWriter
    prompt: PromptWriter | None = None
    shape: Shape | None = None
    beside: dict[str, None] = field(default_factory=dict)

    def take(self, number: int, value: Any) -> None:
        """Normalise one raw row; a section of a long text file is one already."""
        if isinstance(value, PlainText):
            shape = self.shape or recognise({"text": value.text}, self.how.format)
            if shape and shape.format == "text" and self.how.wants not in ("pairs", "labels") and not self.prompt:
                self.shape = shape
                self._add_section(value)
                return
            value = {"text": value.text}
        if not isinstance(value, dict):
            self.findings.add("not_an_object", number, f"found {json_kind(value)}; wanted an object with columns")
            return
        named = self._named(number, value)
        if named is None:
            return
        value = named
        pair = pair_shape(value)
        if pair and self.how.wants in ("answers", "labels"):
            refuse_pair(number, self.findings, pair, self.how)
            return
        if self.shape is None:
            self.shape = (
                pair if pair and self.how.format in ("auto", pair.format) else recognise(value, self.how.format)
            )
        if self.how.wants == "pairs" and not pair:
            self._without_pair(number, value)
            return
        shape = self.shape
        if (
            shape is None
            or (pair and pair != shape)
            or (not pair and is_pair(shape))
            or not value.keys() >= set(shape.needed)
        ):
            self._misfit(number, value, pair)
            return
        used = beside_columns(value, shape)
        self.findings.leave(map(self.how.key, unused_columns(value, shape, used)))
        if row := normalised(value, shape, number, self.findings, self.how):
            self.beside.update(dict.fromkeys(map(self.how.key, used)))
            self._add(row)

    def _add_section(self, section: PlainText) -> None:
        if not section.before:
            found = f"a text file of many megabytes, read in sections of {SECTION:,} characters at most"
            self.findings.add("long_document", section.number, found, fatal=False)
        self.rows.add(section)

    def _add(self, row: Row) -> None:
        """Keep a row, or the sections of a long text."""
        if not isinstance(row, PlainText) or len(row.text) <= SECTION:
            self.rows.add(row)
            return
        found = f"{len(row.text):,} characters, read in sections of {SECTION:,} at most"
        self.findings.add("long_document", row.number, found, fatal=False)
        for section in sections(row):
            self.rows.add(section)

    def _named(self, number: int, value: dict[str, Any]) -> dict[str, Any] | None:
        """Return a row with our names for its columns; None where its prompt cannot be written."""
        if self.prompt:
            prompt, wrong = self.prompt.write(value)
            if wrong:
                wanted = "wanted every column that it names, or a default: {{ title | default('') }}"
                self.findings.add("bad_prompt", number, f"found that {wrong}; {wanted}", field="data.prompt")
                return None
            self.beside.update(dict.fromkeys(self.prompt.columns or ()))
            value = with_prompt(value, prompt, self.prompt.columns, self.how)
        elif self.shape is None and not self.how.columns:
            self.how = replace(self.how, columns=folded_names(value))
        self.findings.leave(self.how.displaced(value))
        return self.how.renamed(value)

    def _without_pair(self, number: int, value: dict[str, Any]) -> None:
        columns = ", ".join(plain(str(name), one_line=True, limit=40) for name in list(value)[:12])
        self.findings.add(
            "no_pair",
            number,
            f"found the columns {columns}, and no two answers; wanted prompt, chosen and rejected, or the other names "
            "that docs/data.md lists. To learn from single answers, leave train.objective at its default",
        )

    def _misfit(self, number: int, value: dict[str, Any], pair: Shape | None) -> None:
        if refuse_media(value, (), number, self.findings):
            return
        other = pair or recognise(value)
        if self.shape is None or other is None:
            self.findings.add(
                "wrong_columns", number, misfit(value, self.shape.format if self.shape else self.how.format, self.how)
            )
            return
        found = f"found {other}; the rows before are {self.shape}. One file holds one format"
        self.findings.add("mixed_formats", number, found)


def _inspected(path: Path, how: Reading, progress: Progress | None) -> tuple[DataSet, Findings]:
    if how.format not in get_args(DataFormat):
        raise BadInput(f"Found the data format '{plain(how.format)}'; wanted one of {', '.join(get_args(DataFormat))}.")
    try:
        place = find_files(path, how, progress=progress)
        cache = RowCache(place, how, progress)
        data, findings = cache.recall() or _read(place, how, cache, progress)
        return replace(data, path=place.path, word=place.word, place_notes=place.notes, commit=place.commit), findings
    except OSError as error:
        shown = plain(str(path), one_line=True, limit=300)
        raise BadInput(f"{shown} cannot be read: {error.strerror or error}.") from None


def _read(place: DataFiles, how: Reading, cache: RowCache, progress: Progress | None) -> tuple[DataSet, Findings]:
    with ExitStack() as stack:
        prompt = stack.enter_context(PromptWriter(how.prompt)) if how.prompt else None
        taken = _Taken(how, Findings(skips=how.on_bad_row == "skip"), RowWriter(cache.scratch), prompt)
        stack.callback(taken.rows.drop)
        for number, value in _raw_rows(place, how, taken.findings, progress):
            taken.take(number, value)
        if not len(taken.rows) and not taken.findings.counts:
            raise BadInput(f"{plain(str(place.path), one_line=True)} holds no rows. Wanted one JSON object a line.")
        shape, findings = taken.shape, taken.findings
        data = DataSet(
            path=place.path,
            format=shape.format if shape else "unknown",
            columns=tuple(map(taken.how.key, shape.needed)) if shape else (),
            ignored_columns=findings.unused,
            beside=tuple(plain(column, one_line=True) for column in taken.beside),
            rows=(),
            findings=findings.kept,
            finding_counts=dict(findings.counts),
            size_bytes=place.size_bytes,
            files=len(place.files),
            skipped=dict(findings.skipped),
        )
        return replace(data, rows=taken.rows.done(lambda folder: cache.keep(folder, data, findings))), findings


def _raw_rows(
    place: DataFiles, how: Reading, findings: Findings, progress: Progress | None
) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) for each row of all files, one after another; numbers go on from file to file."""
    if not place.names:
        yield from _rows_of_file(place.path, "", how, findings, progress)
        return
    total, before, number = max(1, place.size_bytes), 0, 0
    for path, name in zip(place.files, place.names, strict=True):
        size_bytes = path.stat().st_size

        def told(done: int, of: int, before: int = before, size_bytes: int = size_bytes) -> None:
            if progress:
                progress(min(total, before + size_bytes * done // max(1, of)), total)

        findings.enter(plain(name, one_line=True), number)
        if size_bytes:
            for number, value in _rows_of_file(path, name, how, findings, told):
                yield number, value
        before += size_bytes
        number = max(number, findings.furthest)


def _rows_of_file(
    path: Path, name: str, how: Reading, findings: Findings, progress: Progress | None
) -> Iterator[tuple[int, Any]]:
    with opened(path, name) as file:
        kind = kind_of(file)
        findings.from_table = kind in COLUMNAR
        if kind in BY_BYTES:
            yield from BY_BYTES[kind](file, findings, progress)
            return
        if file.packed:
            raise BadInput(f"{file.name} is {kind.capitalize()} packed once more; unpack it first.")
    for number, row in COLUMNAR[kind](path, progress, how):
        yield findings.rows_before + number, row


def _summary(data: DataSet) -> str:
    return f"Found: {counted(data.finding_counts)}."
