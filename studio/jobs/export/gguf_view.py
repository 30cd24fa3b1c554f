"""Makes the folder that llama.cpp's converter reads in place of a model folder, without Python code.

The converter loads tokenizers with `trust_remote_code=True`, which would run a model's own code unasked. This folder
has no code, and no `auto_map` that would fetch some. It also has the added tokens of SentencePiece vocabularies, and
the class of Phi-4's tokenizer, where the converter looks for them; transformers 5 no longer writes them there.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.model_folder import INDEX
from studio.runs.layout import ADAPTER_CONFIG

_WEIGHTS = ".safetensors"
_SMALL = (".json", ".jinja", ".model", ".txt")
_CONFIG, _TOKENIZER, _TOKENS = "config.json", "tokenizer_config.json", "tokenizer.json"
_UNNAMED = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""General tokenizer classes, which say nothing: `tokenizer.json` alone describes such a tokenizer."""


def make_view(view: Path, folders: Sequence[Path], *, weights: Path | None = None) -> Path:
    """Fill a folder with config, tokenizer and, where wanted, links to the weights; return it.

    Args:
        view: A new folder.
        folders: Where the files come from; if several have a file of the same name, the last one's is taken.
        weights: A folder whose weights are linked, too.

    Raises:
        BadInput: A config is no JSON.
        OSError: A file cannot be read or written.
    """
    view.mkdir()
    for folder in folders:
        for path in sorted(folder.iterdir()):
            small = path.suffix in _SMALL and not path.name.endswith((".index.json", ADAPTER_CONFIG))
            if path.is_file() and small:
                shutil.copyfile(path, view / path.name)
    for name in (_CONFIG, _TOKENIZER):
        if (view / name).is_file():
            _change(view / name, lambda table: table.pop("auto_map", None))
    _complete_tokenizer(view)
    if weights is not None:
        listed = set((_read(weights / INDEX).get("weight_map") or {}).values())
        for path in sorted(weights.iterdir()):
            named = path.name.startswith("model")
            if path.name in listed or (named and path.name.endswith((_WEIGHTS, INDEX))):
                # The converter reads only files whose names begin with "model", although an index may list any.
                _link(path, view / (path.name if named else f"model-{path.name}"))
    return view


def strips_after_tokens(view: Path) -> bool:
    """Return whether the tokenizer drops white space after a special token, as llama.cpp does for names with Phi-3."""
    return any(token.get("rstrip") for token in _read(view / _TOKENS).get("added_tokens") or [])


def _complete_tokenizer(view: Path) -> None:
    saved, config = _read(view / _TOKENS), _read(view / _CONFIG)
    model = saved.get("model") or {}
    if not (view / _TOKENIZER).is_file() or model.get("type") != "BPE":
        return
    if model.get("byte_fallback") and "▁" in model["vocab"]:
        added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in saved["added_tokens"]}
        _change(view / _TOKENIZER, lambda table: table.setdefault("added_tokens_decoder", added))
    elif config.get("model_type") == "phi3" and _read(view / _TOKENIZER).get("tokenizer_class") in _UNNAMED:
        _change(view / _TOKENIZER, lambda table: table.update(tokenizer_class="GPT2Tokenizer"))


def _change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = _read(path)
    change(table)
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one without a file, or if the file holds something else."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:
        raise BadInput(f"{plain(path.name, one_line=True)} is not JSON: {plain(str(error), one_line=True)}.") from None
    return table if isinstance(table, dict) else {}


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.absolute())
    except OSError:  # Windows allows symbolic links to few users
        os.link(path, link)
