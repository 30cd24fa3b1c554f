"""Finds out what a model is made of: from a folder, a config.json, a GGUF file, or any other name of a base model.

Reads configs and headers, never weights.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.quantised_base import GGUF, QuantisedBase, quantised_base
from studio.core.recipe import EMBEDDED
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.core.text import plain
from studio.probe.architecture import untrainable_architecture
from studio.probe.embedded_model import EmbeddedMissing
from studio.probe.gguf_header import GgufHeader, read_gguf_header
from studio.probe.hub import HubRefusal, hub_headers
from studio.probe.known_models import config_instead
from studio.probe.model_folder import CONFIG, read_config, weight_headers
from studio.probe.models import BaseFound, find_base
from studio.probe.safetensors_file import SafetensorsHeader

_GGUF_FAMILIES = {
    "llama": "llama",
    "gemma3": "gemma3_text",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gptneox": "gpt_neox",
}
"""llama.cpp's architecture names that differ from transformers' `model_type` (gguf constants.MODEL_ARCH_NAMES)."""

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_WEIGHTS = ("weight", "weight_packed", "_blocks")
"""Ends of the names of a linear map's weights, packed or not (compressed-tensors, gpt-oss)."""


def find_shape(word: str, revision: str = "") -> ModelShape:
    """Return the shape of the model that a word names: a folder, config.json, .gguf, hub id, or `embedded`.

    A folder or a hub repository needs no more than its config.json. Where it has safetensors too, their headers tell
    how many parameters there really are; those of the hub are read by range requests, and no weight is downloaded.
    Where the hub cannot be asked, the config that it gave last is taken, or the one that ships with this program, and
    `origin` says so.

    Raises:
        BadInput: There is no such model, or its config or headers are damaged.
    """
    try:
        path = Path(word).expanduser() if word != EMBEDDED and "\0" not in word else None
        if path is not None and path.is_dir():
            return _of_folder(path)
        if path is not None and path.is_file():
            return _of_file(path)
    except OSError as error:
        raise BadInput(f"The model {_shown(word)} cannot be read: {error.strerror or error}.") from None
    except RuntimeError:
        raise BadInput(f"There is no home folder for {_shown(word)}; give the whole path.") from None
    try:
        base = find_base(word, revision)
    except (HubRefusal, EmbeddedMissing) as refusal:
        config, origin = config_instead(word, revision, refusal)
        return replace(_described(config), origin=origin)
    if base.kind == "hub" and base.path is None and base.config is not None:
        return _with_tensors(base.config, hub_headers(word, revision) or [])
    return shape_of_base(base)


def shape_of_base(base: BaseFound) -> ModelShape:
    """Return the shape of a base model that was found.

    Raises:
        BadInput: Nothing is known of it yet, or what is known is damaged.
    """
    if base.path is not None and (base.path / CONFIG).is_file():
        return _of_folder(base.path)
    if base.config is None:
        raise BadInput(
            f"Nothing is known yet of the shape of {_shown(base.word)}: it has no config.json before it is downloaded."
        )
    return _described(base.config)


def _of_file(path: Path) -> ModelShape:
    if path.suffix == ".gguf":
        return replace(_described(config_of_gguf(read_gguf_header(path))), quantised=QuantisedBase(GGUF))
    if path.suffix == ".safetensors":
        if (path.parent / CONFIG).is_file():
            return _of_folder(path.parent)
        raise BadInput(
            f"{_shown(str(path))} holds weights without a config.json beside it: its heads cannot be told from that."
        )
    return _described(read_config(path))


def _of_folder(folder: Path) -> ModelShape:
    if not (folder / CONFIG).is_file():
        raise BadInput(f"{_shown(str(folder))} has no config.json; wanted the folder of a transformers model.")
    return _with_tensors(read_config(folder / CONFIG), weight_headers(folder))


def _described(config: dict[str, Any], tensors: dict[str, tuple[int, ...]] | None = None) -> ModelShape:
    """Return the shape of a config, with a note where no training can start on its architecture."""
    shape = shape_from_config(config, tensors)
    why = untrainable_architecture(config)
    note = f"this base is {why}. The plan is of its sizes; train refuses it"
    return replace(shape, notes=(note, *shape.notes)) if why else shape


def _with_tensors(config: dict[str, Any], headers: list[SafetensorsHeader]) -> ModelShape:
    """Return the shape of a config and of the tensors in the headers of its weights, where these are not packed."""
    if quantised_base(config):
        return _described(config)
    if packed := _packed(headers):
        doubt = f"{packed}: it is quantised in a way that its config does not name, and planned as if it were not"
        shape = _described(config)
        return replace(shape, doubts=(*shape.doubts, doubt))
    shapes: dict[str, tuple[int, ...]] = {}
    for header in headers:
        for name, entry in header.tensors.items():
            if entry.dtype not in _FLOATS:
                return _described(config)
            # A name that comes in two files is two tensors on disk.
            shapes[name if name not in shapes else f"{name} {len(shapes)}"] = entry.shape
    return _described(config, shapes)


def _packed(headers: Iterable[SafetensorsHeader]) -> str:
    """Return the first weight that is held in whole numbers, so packed, in words; empty where none is."""
    for header in headers:
        for name, entry in header.tensors.items():
            if name.endswith(_WEIGHTS) and entry.dtype not in _FLOATS:
                return f"the weight {plain(name, one_line=True, limit=80)} lies in {entry.dtype}"
    return ""


def config_of_gguf(header: GgufHeader) -> dict[str, Any]:
    """Return what a GGUF header says of its model's shape, in a config.json's words.

    Raises:
        BadInput: The header lacks a size.
    """
    architecture = str(header.metadata.get("general.architecture", ""))
    said = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    names = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "sliding_window": "attention.sliding_window",
    }
    config: dict[str, Any] = {key: said[name] for key, name in names.items() if name in said}
    config["model_type"] = _GGUF_FAMILIES.get(architecture, architecture)
    embedding = header.shapes.get("token_embd.weight")
    if embedding:
        config["vocab_size"] = max(embedding)
        config["tie_word_embeddings"] = "output.weight" not in header.shapes
    return config


def _shown(word: str) -> str:
    return plain(word, one_line=True, limit=200)
