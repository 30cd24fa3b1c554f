"""The safetensors header reader: agrees with the library on whole files, refuses every kind of broken one."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.probe.json_size import MOST_VALUES
from studio.probe.safetensors_file import MAX_HEADER_BYTES, CorruptSafetensors, parse_header, read_header


def build(header: object, buffer: bytes = b"", *, length: int | None = None, padding: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * padding
    return struct.pack("<Q", len(raw) if length is None else length) + raw + buffer


def tensor(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = {"a": tensor(0, 8), "b": tensor(8, 12)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_agrees_with_the_library(file: Path) -> None:
    numpy = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    tensors = {"w": numpy.zeros((3, 5), numpy.float16), "b": numpy.ones(7, numpy.int64), "none": numpy.zeros((0, 4))}
    save_file(tensors, file, metadata={"format": "pt"})
    header = read_header(file)
    assert {name: entry.shape for name, entry in header.tensors.items()} == {n: t.shape for n, t in tensors.items()}
    assert header.tensors["w"].dtype == "F16"
    assert header.tensors["w"].size_bytes == 30
    assert header.tensors["w"].parameters == 15
    assert header.metadata == {"format": "pt"}
    assert header.buffer_bytes == 30 + 56


def test_a_padded_header_and_an_empty_file_of_tensors_are_whole(file: Path) -> None:
    file.write_bytes(build(GOOD, bytes(12), padding=5))
    assert set(read_header(file).tensors) == {"a", "b"}
    file.write_bytes(build({}))
    assert read_header(file).tensors == {}


def test_formats_of_less_than_a_byte(file: Path) -> None:
    file.write_bytes(build({"a": tensor(0, 3, [6], "F4"), "b": tensor(3, 6, [4], "F6_E2M3")}, bytes(6)))
    assert read_header(file).tensors["b"].parameters == 4


BROKEN = {
    "empty": (b"", "too_short"),
    "seven bytes": (b"\0" * 7, "too_short"),
    "length above the cap": (build(b"{}", length=MAX_HEADER_BYTES + 1), "header_too_large"),
    "length of all ones": (b"\xff" * 8 + b"{}", "header_too_large"),
    "length above the file": (build(b"{}", length=1000), "header_cut"),
    "cut inside the header": (build(GOOD, bytes(12))[:30], "header_cut"),
    "not UTF-8": (build(b'{"\xff": 1}'), "not_utf8"),
    "not JSON": (build(b"{nope"), "bad_json"),
    "a list": (build([]), "bad_json"),
    "very deep": (build(b"[" * 100_000), "bad_json"),
    "an HTML page": (b"<!DOCTYPE html><html>" + b" " * 100, "header_too_large"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "header_too_large"),
    "buffer cut": (build(GOOD, bytes(11)), "wrong_length"),
    "bytes left over": (build(GOOD, bytes(13)), "wrong_length"),
    "overlap": (build({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "bad_offsets"),
    "hole": (build({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "bad_offsets"),
    "does not start at 0": (build({"a": tensor(4, 8)}, bytes(8)), "bad_offsets"),
    "end before begin": (build({"a": tensor(8, 0, [2])}, bytes(8)), "bad_offsets"),
    "shape asks for more": (build({"a": tensor(0, 8, [3])}, bytes(8)), "bad_offsets"),
    "shape overflows": (build({"a": tensor(0, 8, [2**40, 2**40])}, bytes(8)), "bad_offsets"),
    "negative shape": (build({"a": tensor(0, 8, [-1, -2])}, bytes(8)), "bad_entry"),
    "fractional shape": (build({"a": tensor(0, 8, [2.0])}, bytes(8)), "bad_entry"),
    "true as shape": (build({"a": tensor(0, 4, [True])}, bytes(4)), "bad_entry"),
    "huge offset": (build({"a": tensor(2**70, 2**70 + 8, [2])}, bytes(8)), "bad_entry"),
    "unknown dtype": (build({"a": tensor(0, 8, [2], "F128")}, bytes(8)), "bad_entry"),
    "dtype is a list": (build({"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}), "bad_entry"),
    "no shape": (build({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "bad_entry"),
    "three offsets": (build({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 0, 0]}}), "bad_entry"),
    "shape is a number": (build({"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}}), "bad_entry"),
    "entry is text": (build({"a": "F32"}), "bad_entry"),
    "metadata holds numbers": (build({"__metadata__": {"a": 1}}), "bad_entry"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(file: Path, case: str) -> None:
    content, fault = BROKEN[case]
    file.write_bytes(content)
    with pytest.raises(CorruptSafetensors, match="corrupt or truncated") as caught:
        read_header(file)
    assert caught.value.fault == fault


def test_missing_and_folder(tmp_path: Path, file: Path) -> None:
    for path in (file, tmp_path):
        with pytest.raises(CorruptSafetensors) as caught:
            read_header(path)
        assert caught.value.fault == "unreadable"


def test_a_huge_claimed_header_is_never_read(file: Path) -> None:
    """A sparse file of 3 GB whose header claims all of it: the cap refuses it before a byte is read."""
    with file.open("wb") as out:
        out.write(struct.pack("<Q", 3 * 10**9 - 8))
        out.truncate(3 * 10**9)
    with pytest.raises(CorruptSafetensors) as caught:
        read_header(file)
    assert caught.value.fault == "header_too_large"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":{"dtype":"U8","shape":[' + b"1," * MOST_VALUES + b'1],"data_offsets":[0,1]}}',
        b'{"a":[' + b"[]," * (MOST_VALUES // 2) + b"[]]}",
        b'{"__metadata__":{"a":"' + b"," * MOST_VALUES + b'"}}',
    ],
    ids=["numbers", "lists", "commas in a text"],
)
def test_a_header_of_more_values_than_any_model_has_is_not_parsed(raw: bytes) -> None:
    with pytest.raises(CorruptSafetensors, match=rf"values; wanted at most {MOST_VALUES}") as caught:
        parse_header(raw, "x")
    assert caught.value.fault == "header_too_large"


@pytest.mark.slow
def test_a_header_of_a_hundred_thousand_tensors_is_read() -> None:
    """As a file of a large mixture in fp8 has them: a matrix for each expert and projection, with a long name."""
    name = "model.language_model.layers.{}.mlp.experts.{}.down_proj.weight_scale_inv"
    entries = (
        f'"{name.format(number // 1000, number % 1000)}":{json.dumps(tensor(4 * number, 4 * number + 4, [1, 1]))}'
        for number in range(100_000)
    )
    raw = f"{{{','.join(entries)}}}".encode()
    assert 14_000_000 < len(raw) < MAX_HEADER_BYTES / 2
    assert len(parse_header(raw, "x").tensors) == 100_000


def test_names_from_the_file_are_made_harmless(file: Path) -> None:
    file.write_bytes(build({"\x1b[2Jevil": tensor(0, 8, [3])}, bytes(8)))
    with pytest.raises(CorruptSafetensors) as caught:
        read_header(file)
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[2Jevil" in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        parse_header(raw, "x")
    except CorruptSafetensors as error:
        assert error.fault
