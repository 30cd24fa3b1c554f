"""Fingerprints tell bases of equal shape apart, and do not see how a base is cut into shards."""

import json
import struct
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.events import Identified, event_to_dict
from studio.probe.fingerprint import (
    difference,
    fingerprint,
    recorded_fingerprint,
    refuse_another_base,
    short_fingerprint,
)
from studio.runs.identity import RowHashes, write_identity
from studio.runs.layout import RunPaths

NAMES = ("embed.weight", "layer.0.weight", "layer.1.weight", "norm.weight")


def _file(path: Path, tensors: dict[str, bytes]) -> None:
    table, offset = {}, 0
    for name, data in tensors.items():
        shape = [len(data) // 2] if "norm" in name else [2, len(data) // 4]
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(tensors.values()))


def _base(folder: Path, fill: int = 1, *, sharded: bool = False, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8, **config}))
    tensors = {name: bytes([fill + place] * 16) for place, name in enumerate(NAMES)}
    if not sharded:
        _file(folder / "model.safetensors", tensors)
        return folder
    for place, name in enumerate(NAMES):
        _file(folder / f"model-{place}.safetensors", {name: tensors[name]})
    places = {name: f"model-{place}.safetensors" for place, name in enumerate(NAMES)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_the_same_weights_in_other_shards_are_the_same_base(tmp_path: Path) -> None:
    one, many = fingerprint(_base(tmp_path / "one")), fingerprint(_base(tmp_path / "many", sharded=True))
    assert difference(one, many) == ""
    assert one == many


def test_other_numbers_in_equal_shapes_are_another_base(tmp_path: Path) -> None:
    one, other = fingerprint(_base(tmp_path / "one")), fingerprint(_base(tmp_path / "other", 9))
    assert one["shapes"] == other["shapes"]
    assert "4 of its 4 tensors hold other numbers (embed.weight" in difference(one, other)


def test_versions_and_paths_in_the_config_do_not_count_and_sizes_do(tmp_path: Path) -> None:
    one = fingerprint(_base(tmp_path / "one", transformers_version="4"))
    same = fingerprint(_base(tmp_path / "same", transformers_version="5", _name_or_path="x"))
    assert one["config"] == same["config"]
    assert fingerprint(_base(tmp_path / "other", rope_theta=5))["config"] != one["config"]


def _run(folder: Path, base: Path) -> str:
    folder.mkdir()
    found = fingerprint(base)
    write_identity(RunPaths(folder), found, RowHashes(""))
    event = Identified(at=1.0, base=short_fingerprint(found), rows={"train": 0})
    (folder / "events.jsonl").write_text(json.dumps(event_to_dict(event)) + "\n")
    return str(folder)


def test_a_run_refuses_another_base_and_takes_its_own(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    run = _run(tmp_path / "run", base)
    assert recorded_fingerprint(run) == fingerprint(base)
    refuse_another_base(run, base, fingerprint)
    with pytest.raises(BadInput, match="is not the base that this adapter was trained on"):
        refuse_another_base(run, _base(tmp_path / "other", 9), fingerprint)


def test_nothing_is_refused_where_nothing_is_known_or_the_run_had_a_quantised_base(tmp_path: Path) -> None:
    other = _base(tmp_path / "other", 9)
    refuse_another_base("", other, fingerprint)
    refuse_another_base(str(tmp_path / "gone"), other, fingerprint)
    quantised = _base(tmp_path / "four", quantization_config={"quant_method": "bitsandbytes"})
    refuse_another_base(_run(tmp_path / "run", quantised), other, fingerprint)
