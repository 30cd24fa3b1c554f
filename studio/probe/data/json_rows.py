"""Raw rows of JSON Lines and JSON files. A bad line is a finding and reading goes on; text not in UTF-8 ends it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.data.findings import Findings, json_kind
from studio.probe.data.formats import recognise

Progress = Callable[[int, int], None]
BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 * 2**20  # a row of some ten million tokens; a longer line is no row
_PROGRESS_BYTES = 2**20
_SNIPPET_CHARACTERS = 30


class _DuplicateKey(ValueError):
    """A JSON object that has one key twice, so that it is not known which of the two is meant."""


def line_rows(path: Path, findings: Findings, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) for each line that is JSON, reading one line at a time.

    Blank lines are skipped. `progress` gets (bytes read, bytes in all).

    Raises:
        BadInput: Bytes that are not UTF-8, or a line above `MAX_LINE_BYTES`.
        OSError: The file cannot be read.
    """
    total, done, told = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise BadInput(f"{_name(path)}, line {number} is longer than 64 MiB. JSON Lines wants one row a line.")
            text = decoded(raw, path, offset=done, line=number).strip()
            done += len(raw)
            if text:
                try:
                    yield number, _parsed(text)
                except (ValueError, RecursionError) as error:
                    findings.add("bad_json", number, "not JSON: " + _fault(error, text))
            if progress and (done - told >= _PROGRESS_BYTES or done == total):
                told = done
                progress(done, total)


def document_rows(path: Path, findings: Findings, progress: Progress | None) -> Iterator[tuple[int, Any]]:
    """Yield (place from 1, value) for the rows of an array, of `{"data": [...]}`, or the one row that the file is.

    A file that turns out to be JSON Lines is read as such.

    Raises:
        BadInput: Not UTF-8, not JSON, or another JSON value than those.
        OSError: The file cannot be read.
    """
    raw = path.read_bytes()
    text = decoded(raw, path, offset=0, line=1)
    try:
        document = _parsed(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text.lstrip().startswith("{"):
            findings.row_word = "line"
            yield from line_rows(path, findings, progress)
            return
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"{_name(path)}{where}: not JSON: {_fault(error, text)}") from None
    if isinstance(document, dict):
        data = document.get("data")
        document = data if isinstance(data, list) else [document] if recognise(document) else document
    if not isinstance(document, list):
        raise BadInput(
            f'{_name(path)} holds {json_kind(document)}; wanted an array of rows, {{"data": [rows]}} or one row a line.'
        )
    yield from enumerate(document, start=1)
    if progress:
        progress(len(raw), len(raw))


def decoded(raw: bytes, path: Path, *, offset: int, line: int) -> str:
    """Return the bytes as text, without a byte order mark at the start of the file.

    Args:
        raw: The bytes.
        path: The file, for the message.
        offset: Where in the file `raw` starts, in bytes.
        line: Line number of its first byte, from 1.

    Raises:
        BadInput: The bytes are not UTF-8; says where.
    """
    marked = offset == 0 and raw.startswith(BOM)
    if marked:
        raw = raw.removeprefix(BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        cut = len(BOM) if marked else 0
        at = offset + error.start + cut
        utf16 = offset == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        guess = "It looks like UTF-16. " if utf16 else ""
        raise BadInput(
            f"{_name(path)} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {at} (line {line}). {guess}"
            f"Save it as UTF-8, for example with: iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8"
        ) from None


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        often = Counter(key for key, _ in pairs)
        raise _DuplicateKey(next(key for key in table if often[key] > 1))
    return table


def _fault(error: Exception, text: str) -> str:
    if isinstance(error, json.JSONDecodeError):
        near = text[error.pos : error.pos + _SNIPPET_CHARACTERS]
        found = f"found '{plain(near, one_line=True)}'" if near.strip() else "but the text ends there"
        return f"{error.msg.lower().removesuffix(' at')} at column {error.colno}, {found}"
    if isinstance(error, _DuplicateKey):
        return f"the key '{plain(str(error), one_line=True, limit=40)}' stands twice in one object"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # Of the numbers, Python refuses whole ones of more than 4300 digits, and tells it in terms of its own settings.
    return "a number of thousands of digits"


def _name(path: Path) -> str:
    return plain(path.name, one_line=True)
