"""Files that are broken, foreign or made to hurt: one message with the place in it, nothing else."""

import gc
import json
import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.errors import BadInput
from studio.probe.data import Conversation, inspect_data, read_data
from studio.probe.data import json_rows as json_rows_module

ROW = b'{"prompt": "Why?", "completion": "Because."}'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        read_data(path)
    return str(caught.value)


def test_a_bad_line_has_its_number_its_column_and_what_stands_there(file: Path) -> None:
    file.write_bytes(ROW + b"\n" + b'{"prompt": "a", "completion" "b"}\n' + ROW + b"\n")
    message = refusal(file)
    assert message.startswith("train.jsonl, line 2: not JSON: expecting ':' delimiter at column 30")
    assert '"b"}' in message


def test_a_cut_last_line(file: Path) -> None:
    file.write_bytes(ROW + b"\n" + ROW[:20])
    assert "line 2: not JSON" in refusal(file)


def test_several_bad_lines_are_all_counted(file: Path) -> None:
    file.write_bytes((ROW + b"\nnot json\n\n") * 7)
    message = refusal(file)
    assert "7 problems" in message
    assert "line 2:" in message
    assert "line 14:" in message
    assert "line 17:" not in message


def test_bytes_that_are_not_utf8(file: Path) -> None:
    file.write_bytes(ROW + b"\r\n" + b'{"prompt": "caf\xe9", "completion": "b"}\n')
    offset = len(ROW) + 2 + len(b'{"prompt": "caf')
    assert f"byte 0xe9 at offset {offset} (line 2)" in refusal(file)


def test_the_offset_counts_the_byte_order_mark(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + b'{"a": "\xff"}\n')
    assert "offset 10 (line 1)" in refusal(file)
    (file.parent / "x.json").write_bytes(b"\xef\xbb\xbf[\n" + b'{"a": "\xff"}]\n')
    assert "offset 12 (line 2)" in refusal(file.parent / "x.json")


def test_a_refused_file_is_closed(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf\xff" + ROW)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert "at offset 3 (line 1)" in refusal(file)
        gc.collect()
    assert not seen


def test_utf16_is_named(file: Path) -> None:
    file.write_bytes(ROW.decode().encode("utf-16"))
    assert "looks like UTF-16" in refusal(file)


def test_byte_order_mark_crlf_and_blank_lines_are_read(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + ROW + b"\r\n\r\n" + ROW)
    assert [row.number for row in read_data(file).rows] == [1, 3]


def test_line_separators_inside_text_do_not_split_lines(file: Path) -> None:
    file.write_text('{"prompt": "a\u2028b\u0085c", "completion": "d"}\n', encoding="utf-8")
    assert read_data(file).rows[0].prompt == "a\u2028b\u0085c"


def test_control_characters_stay_in_the_data_and_never_reach_a_message(file: Path) -> None:
    file.write_text(json.dumps({"prompt": "\x1b[2J", "completion": "\x07"}) + "\n")
    assert read_data(file).rows[0].answer == "\x07"
    file.write_text('{"\\u001b]0;owned\\u0007": 1, "\\u202e": 2}\n\x1b[2J\x9b31m\n')
    message = refusal(file)
    assert "\\x1b" in message
    assert all(character.isprintable() or character == "\n" for character in message)
    assert all(finding.message.isprintable() for finding in inspect_data(file).findings)


def test_nan_is_named(file: Path) -> None:
    file.write_text('{"instruction": "a", "input": NaN, "output": "b"}\n')
    assert "input: found NaN, which is not JSON" in refusal(file)


def test_a_key_that_stands_twice(file: Path) -> None:
    file.write_text('{"prompt": "a", "completion": "b", "completion": "c"}\n')
    assert "the key 'completion' stands twice" in refusal(file)


@pytest.mark.parametrize("deep", ["[" * 200_000, '{"a":' * 200_000, '{"prompt": ' + "[" * 200_000])
def test_very_deep_json(file: Path, deep: str) -> None:
    file.write_text(deep)
    assert "nested too deeply" in refusal(file)


def test_a_number_with_too_many_digits(file: Path) -> None:
    file.write_text('{"prompt": ' + "9" * 10_000 + "}\n")
    assert "line 1: not JSON" in refusal(file)


def test_half_a_surrogate_pair(file: Path) -> None:
    file.write_text('{"prompt": "a\\ud83d", "completion": "b"}\n')
    message = refusal(file)
    assert "\\ud83d) at character 1" in message
    assert message.isascii()


def test_an_endless_line_is_not_read_to_its_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows_module, "MAX_LINE_BYTES", 1000)
    file.write_bytes(b'{"prompt": "' + b"a" * 5000)
    assert "line 1 is longer than" in refusal(file)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl.gz", b"\x1f\x8b\x08rest", "gzip"),
        ("a.xlsx", b"PK\x03\x04rest", "spreadsheet"),
        ("a.csv", b"prompt,completion\na,b,c\n", "line 2: found 3 fields with comma between them; wanted 2"),
        ("a.parquet", b"PAR1 and then nothing", "not a whole Parquet file"),
        ("a.parquet", b"not parquet at all", "not a whole Parquet file"),
        ("a.json", b'{"a": [1], "b": [2]}', "an object with the keys a, b"),
        ("a.json", b"3", "a number"),
        ("a.json", b'[{"prompt": "a"', "line 1: not JSON"),
        ("a.json", b'[1, "x", null]', "row 2: found text; wanted an object"),
        ("a.jsonl", b"\x80\x04\x95 a pickle", "not UTF-8"),
        ("\x1b[31mred.jsonl", b"{", "\\x1b[31mred.jsonl"),
    ],
)
def test_foreign_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    assert expected in message
    assert "\x1b" not in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting(file: Path) -> None:
    os.mkfifo(file)
    assert "not a regular file" in refusal(file)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 3000])
def test_names_that_no_file_system_takes(name: str) -> None:
    assert refusal(Path(name))


@given(st.binary(max_size=300))
def test_any_bytes_give_rows_or_one_message(content: bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"studio-hostile-{os.getpid()}.jsonl"  # noqa: S108
    path.write_bytes(content)
    try:
        assert read_data(path).rows
    except BadInput as error:
        assert not any(unicodedata.category(c) == "Cc" for c in str(error).replace("\n", ""))
    finally:
        path.unlink()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "x"]), inner)
    ),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"messages": JSON_VALUES}))
def test_any_messages_give_rows_or_findings(row: dict[str, object]) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"studio-messages-{os.getpid()}.jsonl"  # noqa: S108
    path.write_text(json.dumps(row))
    try:
        data = inspect_data(path)
        assert len(data.rows) + len(data.findings) >= 1
        assert all(isinstance(row, Conversation) and row.messages[-1].role == "assistant" for row in data.rows)
    finally:
        path.unlink()


def test_a_large_file_is_streamed(tmp_path: Path) -> None:
    """Reading 60 MB of blank padding between rows must not hold the file in memory."""
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        for _ in range(60):
            file.write(ROW + b" " * 2**20 + b"\n")
    code = (
        "import resource, sys; from pathlib import Path; from studio.probe.data import read_data;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "assert len(read_data(Path(sys.argv[1])).rows) == 60;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000, "kilobytes"


def test_the_room_never_imports_the_jobs_libraries() -> None:
    code = (
        "import sys, studio.probe.data, studio.probe.models;"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_object_with_a_million_keys_of_which_one_stands_twice(file: Path) -> None:
    """Looking for the twin must not compare every key with every other: that took hours."""
    keys = ",".join(f'"k{number}":1' for number in range(300_000))
    file.write_bytes(ROW + b"\n{" + keys.encode() + b',"k299999":2}\n')
    script = f"from pathlib import Path; from studio.probe.data import read_data; read_data(Path({str(file)!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert "line 2: not JSON: the key 'k299999' stands twice" in done.stderr


def test_faults_are_told_in_plain_words(file: Path) -> None:
    file.write_bytes(b'{"prompt": "a\x00", "completion": "b"}\n{"prompt": ' + b"9" * 5000 + b"}\n" + ROW + b"\n")
    message = refusal(file)
    assert "line 1: not JSON: invalid control character at column 14, found" in message
    assert "line 2: not JSON: a number of thousands of digits" in message
