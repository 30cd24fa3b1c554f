"""Raw rows of JSON Lines and JSON files, never more than one row and a block of them in memory.

A bad line is a finding and reading goes on. In a JSON array nothing says where the next row begins after a bad one, so
that ends it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from json import JSONDecodeError
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.findings import Findings, json_kind
from studio.probe.data.formats import recognise
from studio.probe.data.opened import BOM, MAX_LINE_BYTES, NotUtf8, Opened, Progress, decoded, plain_suffix

_PROGRESS_BYTES = 2**20
_BLOCK_BYTES = 2**20
_LONGEST_FIRST_BYTES = 2**22  # a longer first line of a .json file is taken for the whole document
_SNIPPET_CHARACTERS = 30
_SPACE = " \t\n\r"
_ROWS_KEY = "data"


class _DuplicateKey(ValueError):
    """A JSON object that has one key twice, so that it is not known which of the two is meant."""


def json_rows(file: Opened, findings: Findings, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) for each row of JSON Lines, or of one JSON document.

    A document is an array of rows, `{"data": [rows]}`, one row, or several objects one after another. Numbers are those
    of lines, or places in a document, counted on from `findings.rows_before`. `progress` gets (bytes read, in all).

    Raises:
        BadInput: Bytes that are not UTF-8, a row above `MAX_LINE_BYTES`, or a document that is none of these.
        OSError: The file cannot be read.
    """
    lines = iter(lambda: file.stream.readline(MAX_LINE_BYTES + 1), b"")
    text = file.head.removeprefix(BOM).lstrip()
    named = plain_suffix(file.name) == ".json"
    pretty = text[:1] == b"{" and not text.partition(b"\n")[0][1:].strip()
    if text[:1] == b"[" or (pretty and b"\n" in text) or (named and text[:1] != b"{"):
        return _document_rows(_Text(file, b"", progress), findings)
    start: list[bytes] = []
    if named:
        start = _to_text(iter(lambda: file.stream.readline(_LONGEST_FIRST_BYTES), b""))
        rest = _to_text(lines) if _is_object(start[-1]) else []
        if not b"".join(rest).strip():
            return _document_rows(_Text(file, b"".join(start), progress), findings)
        start += rest
    findings.row_word = "line"
    return _line_rows(chain(start, lines), file, findings, progress)


def _to_text(lines: Iterable[bytes]) -> list[bytes]:
    """Return the lines up to the first that is not blank."""
    found: list[bytes] = []
    for line in lines:
        found.append(line)
        if line.removeprefix(BOM).strip():
            break
    return found


def _is_object(line: bytes) -> bool:
    """Return whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line.removeprefix(BOM).decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _line_rows(
    lines: Iterable[bytes], file: Opened, findings: Findings, progress: Progress | None
) -> Iterator[tuple[int, Any]]:
    number, done, told = findings.rows_before, 0, 0
    skipping = False
    for raw in lines:
        offset, done = done, done + len(raw)
        if skipping:  # the rest of a line that was too long
            skipping = len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n")
            continue
        number += 1
        local = number - findings.rows_before
        if len(raw) > MAX_LINE_BYTES:
            found = f"longer than {MAX_LINE_BYTES / 2**20:.0f} MiB. JSON Lines wants one row a line"
            if not findings.skips:
                raise BadInput(f"{file.name}, line {local} is {found}.")
            findings.add("too_long", number, found)
            skipping = not raw.endswith(b"\n")
            continue
        try:
            text = decoded(raw, file.name, offset=offset, line=local).strip()
            if text:
                yield number, _parsed(text)
        except NotUtf8 as error:
            if not findings.skips:
                raise
            findings.add("not_utf8", number, f"not UTF-8: {error.byte}")
        except (ValueError, RecursionError) as error:
            findings.add("bad_json", number, "not JSON: " + _fault(error))
        if progress and done - told >= _PROGRESS_BYTES:
            told = done
            progress(file.done, file.total)
    if progress:
        progress(file.total, file.total)


def _document_rows(text: "_Text", findings: Findings) -> Iterator[tuple[int, Any]]:
    first = findings.rows_before + 1
    if text.next() == "[":
        yield from enumerate(text.array(), first)
    elif text.next() == "{":
        table: dict[str, Any] = {}
        streamed = False
        for key in text.keys(table):
            if key == _ROWS_KEY and text.next() == "[":
                streamed = True
                yield from enumerate(text.array(), first)
            else:
                table[key] = text.value()
        if not streamed:
            if not text.next() and not recognise(table):
                raise _no_rows(text.name, table)
            yield first, table
            yield from enumerate(text.values(), first + 1)
    else:
        value = text.value()
        text.refuse_rest()
        raise _no_rows(text.name, value)
    text.refuse_rest()
    text.tell()


def _no_rows(name: str, value: object) -> BadInput:
    return BadInput(f'{name} holds {json_kind(value)}; wanted an array of rows, {{"data": [rows]}} or one row a line.')


class _Text:
    """The text of a JSON document, of which no more is held than the value that is read and a block."""

    def __init__(self, file: Opened, start: bytes, progress: Progress | None) -> None:
        self.name = file.name
        self._file, self._progress = file, progress
        self._text, self._at = "", 0
        self._lines, self._columns = 0, 0  # that lie before `_text`: line ends, and characters of its first line
        self._offset, self._torn, self._ended = 0, b"", False
        self._scan = json.JSONDecoder(object_pairs_hook=_unique).raw_decode
        if start:
            self._take(start, last=False)

    def next(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Read one value."""
        self.next()
        while True:
            if len(self._text) - self._at > MAX_LINE_BYTES + _BLOCK_BYTES:
                raise self._too_long()
            try:
                value, end = self._scan(self._text, self._at)
            except JSONDecodeError as error:
                # Near the end of what was read, more of the text may mend it; a text without an end begins anywhere.
                open_ended = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                fault, at = self._fault(error), error.pos - self._at
                if not (open_ended and self._more()):
                    raise self._bad(fault, self._at + at) from None
            except (ValueError, RecursionError) as error:
                raise self._bad(_fault(error), self._at) from None
            else:
                if end < len(self._text) or self._text[end - 1] in '}]"' or not self._more():
                    self._at = end
                    return value

    def array(self) -> Iterator[Any]:
        """Yield each value of an array that begins here."""
        self._at += 1
        if self.next() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self._expect(",]") == "]":
                return

    def keys(self, table: dict[str, Any]) -> Iterator[str]:
        """Yield each key of an object that begins here; its value must be read before the next is asked for.

        Args:
            table: What has been read of it.
        """
        self._at += 1
        seen: set[str] = set()
        if self.next() == "}":
            self._at += 1
            return
        held = 0
        while True:
            if self.next() != '"':
                raise self._expecting("property name enclosed in double quotes")
            key = self.value()
            if key in seen:
                raise self._bad(_fault(_DuplicateKey(key)), self._at)
            seen.add(key)
            self._expect(":")
            before = self._offset
            yield key
            held += self._offset - before if key in table else 0
            if held > 2 * MAX_LINE_BYTES:
                raise self._too_long()
            if self._expect(",}") == "}":
                return

    def values(self) -> Iterator[Any]:
        """Yield each value up to the end of the file."""
        while self.next():
            yield self.value()

    def refuse_rest(self) -> None:
        """Refuse anything but white space in the rest of the file.

        Raises:
            BadInput: There is some.
        """
        if self.next():
            raise self._bad(self._fault(JSONDecodeError("Extra data", self._text, self._at)), self._at)

    def tell(self) -> None:
        """Tell how much of the file was read."""
        if self._progress:
            self._progress(self._file.done, self._file.total)

    def _expect(self, characters: str) -> str:
        if (found := self.next()) and found in characters:
            self._at += 1
            return found
        raise self._expecting(f"'{characters[0]}' delimiter")

    def _expecting(self, what: str) -> BadInput:
        return self._bad(self._fault(JSONDecodeError(f"Expecting {what}", self._text, self._at)), self._at)

    def _too_long(self) -> BadInput:
        line = 1 + self._lines + self._text.count("\n", 0, self._at)
        return BadInput(
            f"{self.name}: the row that begins in line {line} is longer than {MAX_LINE_BYTES / 2**20:.0f} MiB, or it "
            "never ends. Wanted an array of rows."
        )

    def _more(self) -> bool:
        """Read on; return whether there was anything."""
        if self._ended:
            return False
        gone = self._text[: self._at]
        if ends := gone.count("\n"):
            self._lines += ends
            self._columns = 0
        self._columns += len(gone) - 1 - gone.rfind("\n")
        # A long value is read in ever larger blocks, because it is looked through again after each.
        block = self._file.stream.read(max(_BLOCK_BYTES, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :], 0
        self._take(block, last=not block)
        self.tell()
        return not self._ended

    def _take(self, block: bytes, *, last: bool) -> None:
        raw = self._torn + block
        torn = 0 if last else _torn_bytes(raw)  # a character may lie across two blocks
        whole, self._torn = raw[: len(raw) - torn], raw[len(raw) - torn :]
        line = 1 + self._lines + self._text.count("\n")
        self._text += decoded(whole, self.name, offset=self._offset, line=line)
        self._offset += len(whole)
        self._ended = last

    def _fault(self, error: JSONDecodeError) -> str:
        first = "\n" not in self._text[: error.pos]
        return _fault(error, self._columns if first else 0)

    def _bad(self, fault: str, at: int) -> BadInput:
        line = 1 + self._lines + self._text.count("\n", 0, at)
        return BadInput(f"{self.name}, line {line}: not JSON: {fault}")


def _torn_bytes(raw: bytes) -> int:
    """Return how many bytes at the end begin a character of UTF-8 that is longer."""
    for back in (1, 2, 3):
        byte = raw[-back] if len(raw) >= back else 0
        if byte >= 0xC0:
            whole = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if whole > back else 0
        if byte < 0x80:
            break
    return 0


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        often = Counter(key for key, _ in pairs)
        raise _DuplicateKey(next(key for key in table if often[key] > 1))
    return table


def _fault(error: Exception, columns: int = 0) -> str:
    """Return what is wrong in words.

    Args:
        error: As it was raised.
        columns: Characters of the line that lie before the text which was parsed.
    """
    if isinstance(error, JSONDecodeError):
        near = error.doc[error.pos : error.pos + _SNIPPET_CHARACTERS]
        found = f"found '{plain(near, one_line=True)}'" if near.strip() else "but the text ends there"
        return f"{error.msg.lower().removesuffix(' at')} at column {error.colno + columns}, {found}"
    if isinstance(error, _DuplicateKey):
        return f"the key '{plain(str(error), one_line=True, limit=40)}' stands twice in one object"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # Of the numbers, Python refuses whole ones of more than 4300 digits, and tells it in terms of its own settings.
    return "a number of thousands of digits"
