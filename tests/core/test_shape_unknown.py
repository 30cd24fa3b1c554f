"""Architectures that are not in the table: sized from their tensors, or from a config alone with a range that holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.core import shape_from_config as reader
from studio.core.checkpoint_tensors import checkpoint_tensors
from studio.core.shape import ModelShape
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup
from studio.probe.shape import find_shape
from tests.fakes.families import make_family

SETUPS = (
    Setup(method="qlora", seq_len=512),
    Setup(method="lora", seq_len=512, micro_batch=2, recompute="none"),
)
DENSE = ("apertus", "cohere", "gemma2", "glm4", "gpt_neox", "olmo2", "phi3", "stablelm", "starcoder2")
SPARSE = ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "minimax_m2", "phimoe", "qwen2_moe")
GUESSED = ("gpt_oss", "granitemoe", "llama4", "qwen3_5")
"""Their attention, their experts or what mixes their tokens is in no header: only the range holds."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")

    def made(name: str) -> Path:
        return root / name if (root / name).exists() else make_family(root / name, name)

    return made


def forgotten(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    for table in ("FAMILIES", "HYBRIDS"):
        rows = {name: row for name, row in getattr(reader, table).items() if name != family}
        monkeypatch.setattr(reader, table, rows)


def peaks(shape: ModelShape) -> list[int]:
    return [estimate_vram(shape, setup).allocated.expected for setup in SETUPS]


def in_range(shape: ModelShape, truths: list[int]) -> bool:
    ranges = [estimate_vram(shape, setup).allocated for setup in SETUPS]
    return all(one.low <= truth <= one.high for one, truth in zip(ranges, truths, strict=True))


@pytest.mark.parametrize("name", [*DENSE, *SPARSE, *GUESSED])
def test_a_forgotten_family(name: str, folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders(name)
    known = find_shape(str(folder))
    assert not known.doubts
    truths = peaks(known)
    forgotten(monkeypatch, known.family)
    by_tensors = find_shape(str(folder))
    by_config = reader.shape_from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert "is not known here" in by_tensors.doubts[0]
    assert "is not known here" in by_config.doubts[0]
    assert by_tensors.parameters == known.parameters
    names = [{linear.name for _, linear in shape.all_linears()} for shape in (known, by_tensors)]
    assert names[0] <= names[1]
    assert in_range(by_tensors, truths)
    assert in_range(by_config, truths)
    if name not in GUESSED:
        for found, truth in zip(peaks(by_tensors), truths, strict=True):
            assert found == pytest.approx(truth, rel=0.1)


def test_layers_that_predict_more_tokens_are_on_disk_and_not_in_memory(folders: Any) -> None:
    for name in ("deepseek_v3", "glm4_moe", "qwen3_next"):
        shape = find_shape(str(folders(name)))
        alone = reader.shape_from_config(json.loads((folders(name) / "config.json").read_text(encoding="utf-8")))
        assert (shape.parameters, shape.doubts) == (alone.parameters, ())


@pytest.mark.parametrize("name", ["gemma3", "internvl", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_towers_are_told_apart_from_the_language_model(name: str, folders: Any) -> None:
    shape = find_shape(str(folders(name)))
    assert not shape.doubts
    assert shape.tower_parameters > 0
    assert "towers" in shape.notes[0]
    assert not estimate_vram(shape, SETUPS[0]).components.base > 2 * shape.parameters


def test_which_stack_of_layers_is_the_language_model() -> None:
    tensors = {
        "visual.blocks.0.attn.qkv.weight": (96, 32),
        "visual.patch_embed.weight": (32, 12),
        "visual.merger.mlp.weight": (64, 32),
        "model.embed_tokens.weight": (320, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.1.self_attn.q_proj.weight": (64, 64),
        "model.layers.2.self_attn.q_proj.weight": (64, 64),
        "mtp.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (320, 64),
    }
    found = checkpoint_tensors(tensors, 2, multimodal=True)
    assert list(found.layers) == [0, 1]
    assert sorted(found.outside) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert (found.head, found.embedding) == ("lm_head.weight", (320, 64))
    assert (found.towers, found.unread) == (96 * 32 + 32 * 12 + 64 * 32, 2 * 64 * 64)
    alone = checkpoint_tensors({"weight": (2, 2)}, 2, multimodal=False)
    assert (alone.layers, alone.outside) == ({}, {"weight": (2, 2)})


@pytest.mark.parametrize(
    ("place", "shape"),
    [
        ("layers.0.self_attn.q_a_proj.weight", (0, 64)),
        ("layers.0.mlp.experts.down_proj", (0, 64, 64)),
        (f"layers.{'1' * 5000}.mlp.up_proj.weight", (64, 64)),
        (f"layers.0.mlp.experts.{'1' * 5000}.up_proj.weight", (64, 64)),
    ],
    ids=["empty map", "empty stack", "layer without end", "expert without end"],
)
def test_tensors_that_are_in_no_model(place: str, shape: tuple[int, ...]) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 64)
    config = {"model_type": "new", "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 320, **sizes}
    names = ("q_proj", "q_b_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj_with_mqa")
    tensors = {f"model.layers.0.self_attn.{name}.weight": (64, 64) for name in names}
    tensors |= {"model.embed_tokens.weight": (320, 64), f"model.{place}": shape}
    found = reader.shape_from_config(config, tensors)
    assert "is not known here" in found.doubts[0]
    assert peaks(found)[0] > 0
