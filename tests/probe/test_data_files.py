"""Every kind of file that becomes rows, and files of each kind that do not, with what is said of them."""

import bz2
import functools
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from studio.core.errors import BadInput
from studio.probe.data import (
    DataSet,
    PlainText,
    Reading,
    documents,
    inspect_data,
    json_rows,
    opened,
    read_data,
    table_rows,
)
from studio.probe.data.sampled import guess_rows

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}, Zoë says; “quoted” 日本語."} for n in range(1, 4)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in ROWS
]


def csv_of(separator: str = ",", end: str = "\n", quote: bool = True) -> str:
    """The rows as a spreadsheet saves them."""
    cells = [["prompt", "completion"], *(list(row.values()) for row in ROWS)]
    written = (separator.join(f'"{cell}"' if quote else cell for cell in line) for line in cells)
    return "".join(line + end for line in written)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def in_bytes(write: Callable[[Any, str], None]) -> Callable[[Path], None]:
    return lambda path: write(pa.Table.from_pylist(ROWS), str(path))


def stream(table: Any, path: str) -> None:
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def packed_arrow(table: Any, path: str) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)


PRETTY = json.dumps(ROWS, ensure_ascii=False, indent=2).encode()
CSV = csv_of().encode()

SKIP = Reading(on_bad_row="skip")

GOOD: dict[str, bytes | Callable[[Path], None]] = {
    "lines.jsonl": LINES,
    "lines.ndjson": LINES,
    "no_suffix": LINES,
    "SHOUTED.JSONL": LINES,
    "marked.jsonl": b"\xef\xbb\xbf" + LINES,
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "blank_lines.jsonl": b"\n\n" + LINES.replace(b"\n", b"\n\n"),
    "lines_in.json": LINES,
    "lines_in.txt": LINES,
    "array.json": json.dumps(ROWS).encode(),
    "array_in.jsonl": json.dumps(ROWS).encode(),
    "pretty.json": PRETTY,
    "marked.json": b"\xef\xbb\xbf \r\n" + PRETTY,
    "data_key.json": json.dumps({"version": 1, "data": ROWS, "by": ["me"]}).encode(),
    "data_key_pretty.json": json.dumps({"data": ROWS, "end": {}}, indent=1).encode(),
    "objects_one_after_another.json": b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
    "objects_one_after_another.jsonl": b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
    "lines.jsonl.gz": gzip.compress(LINES),
    "two_members.jsonl.gz": gzip.compress(LINES[:70]) + gzip.compress(LINES[70:]),
    "lines.jsonl.bz2": bz2.compress(LINES),
    "lines.jsonl.xz": lzma.compress(LINES),
    "two_streams.jsonl.xz": lzma.compress(LINES[:70]) + lzma.compress(LINES[70:]) + b"\0" * 4,
    "lines.jsonl.zst": zstd(LINES),
    "two_frames.jsonl.zst": zstd(LINES[:70]) + zstd(LINES[70:]),
    "packed_without_saying_so.jsonl": gzip.compress(LINES),
    "array.json.gz": gzip.compress(PRETTY),
    "table.csv": CSV,
    "table.csv.gz": gzip.compress(CSV),
    "marked.csv": b"\xef\xbb\xbf" + CSV,
    "excel_in_german.csv": csv_of(";", "\r\n").encode(),
    "tabs.tsv": csv_of("\t", quote=False).encode(),
    "bars.csv": csv_of("|").encode(),
    "header_without_quotes.csv": CSV.replace(b'"prompt","completion"', b" prompt , completion"),
    "blank_lines.csv": CSV.replace(b"\n", b"\n\n"),
    "no_last_line_end.csv": CSV.rstrip(),
    "table.parquet": in_bytes(pq.write_table),
    "parquet_by_its_bytes": in_bytes(pq.write_table),
    "table.feather": in_bytes(feather.write_feather),
    "stream.arrow": in_bytes(stream),
    "packed.arrow": in_bytes(packed_arrow),
}


def put(path: Path, content: bytes | Callable[[Path], None]) -> Path:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", GOOD)
def test_files_of_every_kind_have_the_same_rows(tmp_path: Path, name: str) -> None:
    told: list[tuple[int, int]] = []
    data = read_data(put(tmp_path / name, GOOD[name]), progress=lambda done, total: told.append((done, total)))
    assert [(row.prompt, row.answer) for row in data.rows] == [tuple(row.values()) for row in ROWS]
    assert data.format == "prompt_completion"
    assert data.findings == ()
    assert told
    assert told[-1][0] == told[-1][1], "progress ends at its end"


@pytest.mark.parametrize("block", [3, 4, 7, 50])
def test_a_document_is_read_in_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_rows, "_BLOCK_BYTES", block)
    monkeypatch.setattr(json_rows, "_LONGEST_FIRST_BYTES", 2)
    for name in ("array.json", "pretty.json", "data_key.json", "marked.json", "objects_one_after_another.json"):
        data = read_data(put(tmp_path / name, GOOD[name]))
        assert [row.answer for row in data.rows] == [row["completion"] for row in ROWS]
    numbers = put(tmp_path / "numbers.json", json.dumps([{"prompt": 123456, "completion": -1.5e300}] * 2).encode())
    assert inspect_data(numbers).finding_counts == {"not_text": 2}
    broken = put(tmp_path / "broken.json", json.dumps(ROWS, indent=1).replace('2?",', '2?"').encode())
    with pytest.raises(
        BadInput, match=r"broken.json, line 8: not JSON: expecting ',' delimiter at column 3, found '\"c"
    ):
        read_data(broken)


def test_multi_line_cells_quotes_and_lists_of_messages_in_a_table(tmp_path: Path) -> None:
    cell = json.dumps(CHATS[0]["messages"]).replace('"', '""')
    chats = read_data(put(tmp_path / "chats.csv", f'id,messages\n1,"{cell}"\n'.encode()))
    assert (chats.format, chats.rows[0].prompt, chats.ignored_columns) == ("chat", ROWS[0]["prompt"], ("id",))
    text = b'prompt,completion\n"a ""b"", c","d\ne"\nf,g\n'
    data = read_data(put(tmp_path / "lines.csv", text))
    assert [(row.prompt, row.answer, row.number) for row in data.rows] == [('a "b", c', "d\ne", 2), ("f", "g", 4)]
    escaped = read_data(put(tmp_path / "mysql.csv", b'prompt,completion\n"a \\"b\\", c","d"\n"e","f"\n'))
    assert [(row.prompt, row.answer) for row in escaped.rows] == [('a "b", c', "d"), ("e", "f")]


def test_a_column_of_row_numbers_without_a_name(tmp_path: Path) -> None:
    data = read_data(put(tmp_path / "pandas.csv", b",prompt,completion\n0,a,b\n1,c,d\n"))
    assert (len(data.rows), data.ignored_columns) == (2, ("column 1",))


@pytest.mark.parametrize("name", ["book.txt", "notes.md", "book.txt.gz", "one.MARKDOWN"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    content = "# Title\r\n\r\nOnce upon a time; [“x”].\r\n".encode()
    data = read_data(put(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content))
    assert data.rows == (PlainText("# Title\n\nOnce upon a time; [“x”].\n", 1),)


def bomb(suffix: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}[suffix]
        path.write_bytes(packed(LINES + b'{"text": "' + b"a" * 3_000_000 + b'"}\n'))

    return write


def second(line: str) -> bytes:
    return CSV + line.encode() + b"\n"


BAD: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "cut.jsonl.gz": (gzip.compress(LINES * 500)[:-40], "packed with gzip and damaged or cut off"),
    "damaged.jsonl.gz": (gzip.compress(LINES)[:-8] + b"12345678", "damaged or cut off (CRC check failed"),
    "cut.jsonl.bz2": (bz2.compress(LINES)[:-10], "packed with bzip2 and damaged or cut off"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-20], "packed with xz and damaged or cut off"),
    "damaged.jsonl.zst": (zstd(LINES) + b"not a frame", "packed with zstd and damaged or cut off"),
    "twice.jsonl.gz.gz": (gzip.compress(gzip.compress(LINES)), "packed twice; unpack the outer gzip first"),
    "table.parquet.gz": (gzip.compress(b"PAR1 and more"), "Parquet packed once more"),
    "bomb.jsonl.gz": (bomb("gz"), "unpacks to more than 0.0 GB, half of the free memory"),
    "bomb.jsonl.bz2": (bomb("bz2"), "unpacks to more than"),
    "bomb.jsonl.xz": (bomb("xz"), "unpacks to more than"),
    "bomb.jsonl.zst": (bomb("zst"), "unpacks to more than"),
    "rows.zip": (b"PK\x03\x04 and more", "a zip archive or a spreadsheet; unpack it"),
    "old.xls": (b"\xd0\xcf\x11\xe0 and more", "Microsoft Office; save the sheet as CSV"),
    "paper.pdf": (b"%PDF-1.7", "a PDF document; save its text as .txt"),
    "rows.tar": (b"rows.jsonl".ljust(257, b"\0") + b"ustar  ", "a tar archive; unpack it first"),
    "rows.jsonl.tar.gz": (gzip.compress(b"x".ljust(257, b"\0") + b"ustar  "), "a tar archive"),
    "rows.db": (b"SQLite format 3\0", "an SQLite database; save the table as CSV"),
    "pointer.parquet.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "model.gguf": (b"GGUF\x03", "a model (GGUF), not data"),
    "picture.txt": (b"\x89PNG\r\n", "is a picture"),
    "wrong_fields.csv": (second('"a"'), "wrong_fields.csv, line 5: found 1 field with comma between them; wanted 2"),
    "many_fields.csv": (second("a, b, c"), "line 5: found 3 fields with comma between them; wanted 2 as in the first"),
    "open_quote.csv": (second('"a","b'), "line 5: a field begins with a quote that is not closed"),
    "quote_within.csv": (second('"a"b,c'), "line 5: not CSV: a quote within a field, which is no end of it"),
    "twice.csv": (b"prompt,prompt\na,b\n", "line 1: the column 'prompt' stands twice"),
    "no_header.csv": (b"What is 1?,It is 1\nWhat is 2?,It is 2\n", "found the columns What is 1?, It is 1; wanted"),
    "header_alone.csv": (b"prompt,completion\n", "holds no rows"),
    "latin1.csv": (CSV.replace("ë".encode(), b"\xeb"), "is not UTF-8: byte 0xeb at offset"),
    "utf16.csv": (csv_of().encode("utf-16"), "It looks like UTF-16"),
    "nul.csv": (second("a\0,b"), "line 5 holds a NUL character"),
    "latin1.md": (b"caf\xe9", "is not UTF-8: byte 0xe9 at offset 3"),
    "binary.txt": (b"ab\0cd", "holds NUL bytes: it is no text"),
    "cut.json": (PRETTY[:-2], "cut.json, line 13: not JSON: expecting ',' delimiter"),
    "rest.json": (PRETTY + b"{}", "not JSON: extra data at column 2, found '{}'"),
    "comma.json": (PRETTY.replace(b"\n  }\n]", b"\n  },\n]"), "line 14: not JSON: expecting value at column 1"),
    "no_key.json": (b'{"data": [], 3: 4}', "expecting property name enclosed in double quotes"),
    "key_twice.json": (b'{\n"data": [],\n"data": []}', "line 3: not JSON: the key 'data' stands twice"),
    "other_key.json": (json.dumps({"train": ROWS, "test": ROWS}).encode(), "an object with the keys train, test"),
    "endless_row.json": (b'[{"prompt": "' + b"a" * 9000, "the row that begins in line 1 is longer than"),
    "latin1.json": (PRETTY.replace("ë".encode(), b"\xeb"), "is not UTF-8: byte 0xeb at offset 64 (line 4)"),
    "numbers.json": (b"[1, 2", "not JSON: expecting ',' delimiter"),
    "cut.arrow": (lambda path: cut(path, stream), "is not a whole Arrow file"),
    "cut.feather": (lambda path: cut(path, feather.write_feather), "is not a whole Arrow file"),
    "not_arrow.arrow": (b"ARROW1 and then nothing", "is not a whole Arrow file"),
    "other_columns.arrow": (lambda path: stream(pa.table({"a": [1]}), str(path)), "found the columns a; wanted"),
}


def cut(path: Path, write: Callable[[Any, str], None]) -> None:
    in_bytes(write)(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content, said = BAD[name]
    path = put(tmp_path / name, content)
    monkeypatch.setattr(opened, "free_bytes", lambda: 2e6)
    if name == "endless_row.json":
        for module in (json_rows, table_rows):
            monkeypatch.setattr(module, "MAX_LINE_BYTES", 4000)
            monkeypatch.setattr(json_rows, "_BLOCK_BYTES", 1000)
    with pytest.raises(BadInput) as caught:
        read_data(path)
    assert name in str(caught.value)
    assert said in str(caught.value)


def test_a_packed_arrow_file_is_not_unpacked_into_more_than_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studio.probe.data import parquet_rows

    monkeypatch.setattr(parquet_rows, "_free_bytes", lambda: 20e6)
    path = tmp_path / "bomb.arrow"
    packed_arrow(pa.table({"text": ["a" * 30_000_000]}), str(path))
    assert path.stat().st_size < 100_000
    with pytest.raises(BadInput, match=r"one of its batches alone hold 0\.0 GB"):
        read_data(path)


@pytest.mark.parametrize("name", GOOD)
def test_damaged_files_give_rows_or_a_message(tmp_path: Path, name: str) -> None:
    """Offsets and lengths in an Arrow file may point anywhere; the reader's process must not end by them."""
    chance = random.Random(name)  # noqa: S311
    sound = put(tmp_path / name, GOOD[name]).read_bytes()
    for _ in range(100 if "arrow" in name else 20):
        broken = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(broken))
            if chance.random() < 0.7:
                broken[at] = chance.choice((0, 1, 10, 34, 44, 91, 93, 123, 125, 127, 128, 255))
            else:
                del broken[at : at + chance.randint(1, 20)]
        path = put(tmp_path / name, bytes(broken or b"x"))
        for how in (Reading(), SKIP):
            try:
                inspect_data(path, how)
            except BadInput as error:
                assert not any(unicodedata.category(letter) == "Cc" for letter in str(error).replace("\n", ""))
        guess_rows(str(path))


def skipped(path: Path) -> DataSet:
    with pytest.raises(BadInput):
        read_data(path)
    return read_data(path, SKIP)


@pytest.mark.parametrize(
    ("name", "content", "left_out"),
    [
        ("a.jsonl", LINES + b"{\n" + LINES + b"[]\n", {"bad_json": 1, "not_an_object": 1}),
        ("a.jsonl", LINES + b'{"prompt": "a", "completion": "caf\xe9"}\n' + LINES, {"not_utf8": 1}),
        ("a.jsonl", LINES + b'{"prompt": "' + b"a" * 10_000 + b'"}\n' + LINES, {"too_long": 1}),
        ("a.jsonl", LINES + b'{"prompt": 7, "completion": 8}\n' + LINES, {"not_text": 1}),
        ("a.jsonl", LINES + b'{"text": "a"}\n' + LINES, {"mixed_formats": 1}),
        ("a.jsonl.gz", gzip.compress(LINES + b"no\n" + LINES), {"bad_json": 1}),
        ("a.csv", CSV + b"a\n" + b'"b"c,d\n' + CSV.partition(b"\n")[2], {"bad_csv": 2}),
        ("a.csv", CSV + b'caf\xe9,"b\nc\xff\n"\n' + CSV.partition(b"\n")[2], {"not_utf8": 1}),
        ("a.json", json.dumps([*ROWS, 3, *ROWS]).encode(), {"not_an_object": 1}),
    ],
)  # fmt: skip
def test_bad_rows_are_left_out_by_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, left_out: dict[str, int]
) -> None:
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 4000)
    data = skipped(put(tmp_path / name, content))
    assert [row.prompt for row in data.rows] == [row["prompt"] for row in ROWS] * 2
    assert data.left_out == left_out
    assert not any(finding.fatal for finding in data.findings)
    (note,) = data.notes()
    assert f"{name}: {sum(left_out.values())} row" in note
    assert "left out, 6 rows kept" in note


def test_where_every_row_is_bad_nothing_is_trained(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no row can be used"):
        read_data(put(tmp_path / "a.jsonl", b"no\nrow\n"), SKIP)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b" "])
def test_a_large_text_file_is_read_in_the_sections_of_the_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: bytes
) -> None:
    text = ending.join(f"Zeile {number}: größer, 日本語 🙂".encode() for number in range(3000))
    path = put(tmp_path / "book.txt", b"\xef\xbb\xbf" + text)
    (whole,) = read_data(path).rows
    assert isinstance(whole, PlainText)
    monkeypatch.setattr(table_rows, "MAX_LINE_BYTES", 4000)
    monkeypatch.setattr(table_rows, "_PIECE_BYTES", 1000)
    kept = functools.partial(documents.streamed, most=5000, context=300)
    monkeypatch.setattr(table_rows, "streamed", kept)
    data = read_data(path)
    assert list(data.rows) == list(documents.sections(whole, most=5000, context=300)) and len(data.rows) > 10
    assert data.format == "text" and data.finding_counts == {"long_document": 1}
    assert "".join(row.text for row in data.rows) == text.decode().replace("\r\n", "\n")
    path.write_bytes(text + b"\xff")
    with pytest.raises(BadInput, match=r"book\.txt is not UTF-8: byte 0xff at offset \d+ \(line \d+\)"):
        read_data(path)
    path.write_bytes(text + b"\0")
    with pytest.raises(BadInput, match="holds NUL bytes"):
        read_data(path)
    path.write_bytes(text)
    with pytest.raises(BadInput):
        read_data(path, Reading("chat"))


@pytest.mark.slow
def test_a_text_file_of_half_a_gigabyte_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraph = b"It is a truth universally acknowledged, that a model in possession of data must want memory.\n"
    with path.open("wb") as file:
        for _ in range(500):
            file.write(paragraph * (2**20 // len(paragraph)))
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom studio.probe.data import read_data\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "data = read_data(Path(sys.argv[1]))\n"
        "assert sum(len(row.text) for row in data.rows) == Path(sys.argv[1]).stat().st_size\n"
        "print(len(data.rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    home = {**os.environ, "LORA_STUDIO_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, env=home, check=True
    )
    rows, kilobytes = map(int, done.stdout.split())
    assert rows >= 500 and kilobytes < 300 * 1024
