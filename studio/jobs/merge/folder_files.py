"""Writes everything in a merged folder besides the weights: config, tokenizer, chat template, licence, own code."""

import json
import shutil
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.model_folder import CONFIG
from studio.runs.layout import ADAPTER_CONFIG

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".tflite", ".index.json",
)  # fmt: skip
_TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
_GENERATION = "generation_config.json"
_TEMPLATES = "additional_chat_templates"
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"}
_MODEL = "tokenizer.model"
"""SentencePiece's own file, which llama.cpp and others read."""
_LEFT_OUT = {"readme.md", ADAPTER_CONFIG}
_MOST_BYTES = 200 * 10**6
"""Larger files of the base are not copied."""


def write_folder_files(
    out: Path, base: Path, adapter: Path, *, dtype: str | None, untied: bool, vocabulary: int | None
) -> None:
    """Write config and tokenizer of the merged model, and copy what else of the base's files it needs.

    Args:
        out: The folder that holds the merged weights.
        base: The base model's folder.
        adapter: The adapter's folder. Its tokenizer is taken if it is complete, else the base's.
        dtype: New dtype of the weights; None where each kept its own.
        untied: Whether the head no longer shares the embedding's weight.
        vocabulary: New number of tokens; None where it is the base's.

    Raises:
        OSError: The disk refuses.
        BadInput: The base's config cannot be read.
    """
    own = _has_tokenizer(adapter)
    for path in sorted(base.iterdir()):
        name = path.name
        if name.startswith(".") or name == CONFIG or name.lower() in _LEFT_OUT or name.endswith(_WEIGHTS):
            continue
        if own and (name in _TOKENIZER or name == _TEMPLATES):
            continue
        _copy(path, out)
    if own:
        for name in sorted(_TOKENIZER | {_TEMPLATES}):
            _copy(adapter / name, out)
        if not (adapter / _MODEL).is_file() and _same_tokens(adapter, base):
            _copy(base / _MODEL, out)
    table = _config(base / CONFIG)
    _change(table, dtype=dtype, untied=untied, vocabulary=vocabulary)
    end = _other_end(adapter, base) if own else None
    if end is not None and not (out / _GENERATION).is_file():
        _stop_at(table, end)
    (out / CONFIG).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if end is not None and (out / _GENERATION).is_file():
        generation = _config(out / _GENERATION)
        _stop_at(generation, end)
        (out / _GENERATION).write_text(json.dumps(generation, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _other_end(adapter: Path, base: Path) -> int | None:
    """Return the id of the adapter's end token where it is another than the base's, as a chosen template may want."""
    words = []
    for folder in (adapter, base):
        path = folder / "tokenizer_config.json"
        word = _config(path).get("eos_token") if path.is_file() else None
        words.append(word.get("content") if isinstance(word, dict) else word)
    if words[0] == words[1] or not (adapter / "tokenizer.json").is_file():
        return None
    added = _config(adapter / "tokenizer.json").get("added_tokens", ())
    return next((int(token["id"]) for token in added if token.get("content") == words[0]), None)


def _stop_at(table: dict[str, Any], end: int) -> None:
    """Add an end token to those of a config; whoever generates with the model stops at each of them."""
    found = table.get("eos_token_id")
    known = found if isinstance(found, list) else [] if found is None else [found]
    table["eos_token_id"] = [*known, end] if end not in known else found


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """Return the folder whose tokenizer the merged model gets."""
    return adapter if _has_tokenizer(adapter) else base


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and any((folder / name).is_file() for name in _VOCABULARIES)


def _same_tokens(adapter: Path, base: Path) -> bool:
    """Return whether the adapter's tokenizer has the same added tokens as the base's.

    transformers 5 saves no `tokenizer.model`; with the same tokens the base's is still right.
    """
    added = []
    for folder in (adapter, base):
        try:
            table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            added.append({(token["id"], token["content"]) for token in table["added_tokens"]})
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return added[0] == added[1]


def _copy(path: Path, out: Path) -> None:
    if path.is_file() and path.stat().st_size <= _MOST_BYTES:
        shutil.copyfile(path, out / path.name)
    elif path.name == _TEMPLATES and path.is_dir():
        (out / path.name).mkdir()
        for template in path.glob("*.jinja"):
            shutil.copyfile(template, out / path.name / template.name)


def _config(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise BadInput(f"{plain(str(path), one_line=True)} is not JSON: {plain(str(error), one_line=True)}.") from None
    if not isinstance(table, dict):
        raise BadInput(f"{plain(str(path), one_line=True)} is not a JSON object.")
    return table


def _change(table: dict[str, Any], *, dtype: str | None, untied: bool, vocabulary: int | None) -> None:
    """Change a config, and the text config inside it that multimodal models have, with the same fields."""
    inner = table.get("text_config")
    for part in [table] + ([inner] if isinstance(inner, dict) else []):
        if dtype is not None:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
        if untied:
            part["tie_word_embeddings"] = False
        if vocabulary is not None and (part is not table or "vocab_size" in part):
            part["vocab_size"] = vocabulary
