"""The GGUF header reader, on files built here and on the embedded model where it is installed."""

import struct
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.probe.embedded_model import config_from_gguf, embedded_header, find_embedded
from studio.probe.gguf_header import read_gguf_header


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word.encode())) + word.encode()


def build(*, version: int = 3, entries: int | None = None) -> bytes:
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("ab") + text("ç"),
        text("types") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<3i", 1, 2, 3),
        text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 0, 2) + b"\1\2",
        text("llama.block_count") + struct.pack("<II", 4, 30),
        text("flag") + struct.pack("<I?", 7, True),
    ]
    tensors = [text("w") + struct.pack("<I2QIQ", 2, 64, 32, 0, 0), text("b") + struct.pack("<IQIQ", 1, 64, 0, 0)]
    head = struct.pack("<IQQ", version, len(tensors), len(pairs) if entries is None else entries)
    return b"GGUF" + head + b"".join(pairs) + b"".join(tensors)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_scalars_and_shapes_are_read_and_arrays_skipped(file: Path) -> None:
    file.write_bytes(build())
    header = read_gguf_header(file)
    assert header.metadata == {"general.architecture": "llama", "llama.block_count": 30, "flag": True}
    assert header.shapes == {"w": (64, 32), "b": (64,)}
    assert header.parameters == 64 * 32 + 64


@pytest.mark.parametrize("length", range(0, len(build()), 7))
def test_a_cut_file_is_refused(file: Path, length: int) -> None:
    file.write_bytes(build()[:length])
    with pytest.raises(BadInput, match="GGUF"):
        read_gguf_header(file)


@pytest.mark.parametrize("content", [b"not gguf", build(version=9), build(entries=2**60), b"GGUF" + b"\xff" * 60])
def test_foreign_content_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(BadInput, match="no whole GGUF file"):
        read_gguf_header(file)


@pytest.mark.parametrize("kind", [0, 8, 12])
@pytest.mark.parametrize("count", [2**40, 2**63, 2**64 - 1])
def test_a_list_longer_than_the_file(file: Path, kind: int, count: int) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("tokens")
    file.write_bytes(head + struct.pack("<IIQQ", 9, kind, count, count))
    with pytest.raises(BadInput, match="no whole GGUF file"):
        read_gguf_header(file)


def test_missing_file(file: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_gguf_header(file)


def test_the_embedded_model_says_its_shape() -> None:
    header = embedded_header(find_embedded())
    assert header.parameters == 134_515_008
    config = config_from_gguf(header)
    assert config is not None
    expected = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    assert config.items() >= expected.items()
    assert config["tie_word_embeddings"] is True


def test_another_architecture_has_no_config(file: Path) -> None:
    file.write_bytes(build().replace(b"llama\x06", b"qwen2\x06").replace(text("llama"), text("qwen2")))
    assert config_from_gguf(read_gguf_header(file)) is None
