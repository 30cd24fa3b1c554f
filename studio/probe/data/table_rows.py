"""Raw rows of CSV and TSV files, and the one row of a text file. A CSV's first row names its columns."""

import csv
import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.documents import streamed
from studio.probe.data.findings import Findings
from studio.probe.data.opened import MAX_LINE_BYTES, NotUtf8, Opened, Progress, decoded

_PROGRESS_BYTES = 2**20
_PIECE_BYTES = 2**20
_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8 at most."""
_SAMPLE_LINES = 200
_DELIMITERS = ",\t;|"
_MOST_COLUMNS = 10_000


class _Dialect(csv.Dialect):
    """CSV as RFC 4180 has it: fields in double quotes where needed, a quote in them written twice."""

    quotechar = '"'
    doublequote = True
    lineterminator = "\n"
    quoting = csv.QUOTE_MINIMAL
    strict = True

    def __init__(self, delimiter: str, *, escaped: bool = False) -> None:
        self.delimiter = delimiter
        if escaped:  # as databases export it: \" and no quote twice
            self.escapechar, self.doublequote = "\\", False
        super().__init__()


def table_rows(file: Opened, findings: Findings, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    """Yield (line number, columns as a dict) for each row of a CSV file; every value is a text.

    A row's number is that of its first line, counted on from `findings.rows_before`. A cell that is a list of messages
    as JSON text becomes that list. A row with more or fewer fields than the first one is a finding. `progress` gets
    (bytes read, in all).

    Raises:
        BadInput: Bytes that are not UTF-8, a row above `MAX_LINE_BYTES`, a quote that is opened and never closed, or a
            first row that cannot name columns.
        OSError: The file cannot be read.
    """
    findings.row_word = "line"
    csv.field_size_limit(MAX_LINE_BYTES)  # of the process; any other reader of CSV can do with more than 128 kB
    lines = _Lines(file, findings, progress)
    sample = lines.ahead(_SAMPLE_LINES)
    dialect = _dialect(sample)
    reader = csv.reader(lines, dialect)
    header: list[str] = []
    while True:
        lines.begin_row()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            lines.refuse_row(error, dialect.delimiter)
            continue
        if fields is None:
            break
        if byte := lines.spoiled:
            findings.add("not_utf8", lines.number, f"not UTF-8: {byte}")
            continue
        if not any(map(str.strip, fields)):
            continue
        if not header:
            header = _header(fields, file.name, lines.row)
        elif len(fields) != len(header):
            found = f"found {_many(len(fields))} {_apart(dialect.delimiter)}; wanted {len(header)} as in the first line"
            shown = ", ".join(plain(name, one_line=True, limit=40) for name in header[:8])
            findings.add("bad_csv", lines.number, f"{found} ({shown}). A field with the separator in it needs quotes")
        else:
            yield lines.number, {name: _value(text) for name, text in zip(header, fields, strict=True)}
    lines.tell(end=True)


def text_row(file: Opened, findings: Findings, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    """Yield the one row of a file that is a document: its whole text, without line ends of other systems.

    Of a text of more than `MAX_LINE_BYTES` its sections are yielded, as rows that are made already.

    Raises:
        BadInput: It is not UTF-8, or holds NUL bytes.
        OSError: The file cannot be read.
    """
    raw = file.stream.read(MAX_LINE_BYTES + 1)
    number = findings.rows_before + 1
    if len(raw) > MAX_LINE_BYTES:
        yield from ((number, section) for section in streamed(_pieces(raw, file, progress), number))
        return
    if b"\0" in raw and raw[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise BadInput(f"{file.name} holds NUL bytes: it is no text. Save it as UTF-8 text.")
    try:
        text = decoded(raw, file.name, offset=0, line=1)
    except NotUtf8 as error:
        if not findings.skips:
            raise
        findings.add("not_utf8", number, f"not UTF-8: {error.byte}")
    else:
        yield number, {"text": text.replace("\r\n", "\n")}
    if progress:
        progress(file.done, file.total)


def _pieces(raw: bytes, file: Opened, progress: Progress | None) -> Iterator[str]:
    """Yield the text of a large file: first the bytes that were read of it, then the rest.

    Raises:
        BadInput: It is not UTF-8, or holds NUL bytes.
        OSError: The file cannot be read.
    """
    offset, line, left = 0, 1, b""
    parts = chain((raw[at : at + _PIECE_BYTES] for at in range(0, len(raw), _PIECE_BYTES)), _rest(file))
    for part in parts:
        block = left + part
        # Cut behind a line end, or behind a whole character, and not between the two of a line end.
        cut = block.rfind(b"\n") + 1 or max(0, len(block) - _LONGEST_CHARACTER)
        while cut and cut < len(block) and block[cut] & 0xC0 == 0x80:
            cut -= 1
        yield _text_of(block[:cut], file.name, offset, line)
        offset, line, left = offset + cut, line + block.count(b"\n", 0, cut), block[cut:]
        if progress:
            progress(file.done, file.total)
    yield _text_of(left, file.name, offset, line)


def _rest(file: Opened) -> Iterator[bytes]:
    while part := file.stream.read(_PIECE_BYTES):
        yield part


def _text_of(raw: bytes, name: str, offset: int, line: int) -> str:
    if b"\0" in raw:
        raise BadInput(f"{name} holds NUL bytes: it is no text. Save it as UTF-8 text.")
    return decoded(raw, name, offset=offset, line=line).replace("\r\n", "\n")


class _Lines:
    """The lines of a CSV file as text, which knows where the row that is read begins, and how large it is.

    Attributes:
        row: The line in the file where the row begins, from 1.
    """

    def __init__(self, file: Opened, findings: Findings, progress: Progress | None) -> None:
        self._file, self._findings, self._progress = file, findings, progress
        self._next, self._offset, self._told = 1, 0, 0
        self._ahead: list[str] = []
        self._held = 0
        self._spoiled: dict[int, str] = {}
        self.row = 1

    @property
    def number(self) -> int:
        """The number of the row, as findings count."""
        return self._findings.rows_before + self.row

    @property
    def spoiled(self) -> str:
        """What is no UTF-8 in the row; empty where all of it is."""
        if not self._spoiled:
            return ""
        return next((self._spoiled[line] for line in range(self.row, self._next) if line in self._spoiled), "")

    def ahead(self, many: int) -> list[str]:
        """Return the first lines, which are still to come."""
        while len(self._ahead) < many and sum(map(len, self._ahead)) < 2**20 and (line := self._read(len(self._ahead))):
            self._ahead.append(line)
        return list(self._ahead)

    def begin_row(self) -> None:
        """Note that a row begins with the next line."""
        self.row, self._held = self._next, 0
        if self._offset - self._told >= _PROGRESS_BYTES:
            self.tell()

    def tell(self, *, end: bool = False) -> None:
        """Tell how much was read."""
        self._told = self._offset
        if self._progress:
            self._progress(self._file.total if end else self._file.done, self._file.total)

    def refuse_row(self, error: csv.Error, delimiter: str) -> None:
        """Note that a row breaks the rules; the next one begins in the line after it, where that can be known.

        Raises:
            BadInput: It is not known where the next row begins: a quote is open up to the end, or for 64 MiB.
        """
        said = str(error)
        if "end of data" in said or "field limit" in said:
            raise self._unclosed()
        if "expected after" in said:
            found = f"a quote within a field, which is no end of it: after it comes no {_named(delimiter)}"
            said = f"{found}. Write a quote in a field twice"
        self._findings.add("bad_csv", self.number, f"not CSV: {plain(said, one_line=True, limit=160)}")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.pop(0) if self._ahead else self._read(0)
        if not line:
            raise StopIteration
        self._held += len(line)
        if self._held > MAX_LINE_BYTES:
            raise self._unclosed()
        self._next += 1
        return line

    def _read(self, before: int) -> str:
        line = self._next + before
        raw = self._file.stream.readline(MAX_LINE_BYTES + 1)
        if len(raw) > MAX_LINE_BYTES:
            raise BadInput(f"{self._file.name}, line {line} is longer than {MAX_LINE_BYTES / 2**20:.0f} MiB.")
        offset, self._offset = self._offset, self._offset + len(raw)
        if not raw:
            return ""
        try:
            text = decoded(raw, self._file.name, offset=offset, line=line)
        except NotUtf8 as error:
            if not self._findings.skips:
                raise
            self._spoiled[line] = error.byte
            text = raw.decode("latin-1")  # only the row's end is looked for in it
        if "\0" in text:
            raise BadInput(f"{self._file.name}, line {line} holds a NUL character: it is no CSV text in UTF-8.")
        return text or "\n"  # a byte order mark alone is no end of the file

    def _unclosed(self) -> BadInput:
        return BadInput(
            f"{self._file.name}, line {self.row}: a field begins with a quote that is not closed, so that all that "
            "follows would belong to it. Close it, or write a quote in a field twice."
        )


def _header(fields: list[str], name: str, line: int) -> list[str]:
    if len(fields) > _MOST_COLUMNS:
        raise BadInput(f"{name}, line {line}: found {len(fields):,} columns; at most {_MOST_COLUMNS:,} are read.")
    # pandas writes its row numbers as a first column without a name.
    header = [text.strip() or f"column {place}" for place, text in enumerate(fields, start=1)]
    if twice := next((text for place, text in enumerate(header) if text in header[:place]), None):
        shown = plain(twice, one_line=True, limit=40)
        raise BadInput(f"{name}, line {line}: the column '{shown}' stands twice; wanted a name of its own for each.")
    return header


def _dialect(sample: list[str]) -> _Dialect:
    """Return how a file is written, by its first lines: the way in which most rows have as many fields as the first."""

    def score(dialect: _Dialect) -> tuple[float, int]:
        fields: list[int] = []
        try:
            fields.extend(len(row) for row in csv.reader(sample, dialect) if row)
        except csv.Error as error:
            # The sample may end within a row, which is no fault; what was read up to there counts.
            if "end of data" not in str(error):
                fields.append(0)
        if not fields or fields[0] < 2:
            return 0.0, 0
        return sum(many == fields[0] for many in fields) / len(fields), fields[0]

    ways = (False, True) if any('\\"' in line for line in sample) else (False,)
    choices = [_Dialect(delimiter, escaped=escaped) for escaped in ways for delimiter in _DELIMITERS]
    best = max(choices, key=score)
    return best if score(best)[0] > 0 else choices[0]


def _value(text: str) -> Any:
    """Return a cell's text, or the messages that it holds as JSON."""
    if not text.startswith(("[{", "[ {", "[\n")):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    messages = value and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
    return value if messages else text


def _many(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"


def _apart(delimiter: str) -> str:
    return f"with {_named(delimiter)} between them"


def _named(delimiter: str) -> str:
    return {",": "comma", "\t": "tab", ";": "semicolon"}.get(delimiter, "bar")
