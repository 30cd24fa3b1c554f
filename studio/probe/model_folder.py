"""Checks a model folder before anything heavy is loaded: config, weights (whole, in safetensors), tokenizer."""

import json
import math
from codecs import BOM_UTF8
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.json_size import MOST_VALUES, values_in
from studio.probe.safetensors_file import CorruptSafetensors, SafetensorsHeader, read_header
from studio.runs.layout import ADAPTER_CONFIG

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_MOST_JSON_BYTES, _MOST_INDEX_BYTES = 8 * 2**20, 50 * 2**20
"""Configs of large mixtures that list every unquantised module have some 3 MB, their indices some 25 MB."""

_FLOAT, _SPECIAL_FLOATS = "__float__", {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""How transformers 5 writes floats that JSON does not have, such as the limit of Mamba 2's time steps."""

_MOST_SHARDS = 10_000
"""Models of a trillion parameters come in 62 to 191 files, and each file that the index names is looked for."""


def read_config(path: Path) -> dict[str, Any]:
    """Return a model's `config.json`; numbers that are not finite are read as transformers writes them.

    Raises:
        BadInput: Missing, not JSON, or not an object that names a model type.
    """
    config = _json(path)
    if not isinstance(config.get("model_type"), str):
        raise BadInput(f"{_shown(path)} names no model_type; wanted the config.json of a transformers model.")
    return config


def check_folder(folder: Path) -> tuple[dict[str, Any], int]:
    """Return the config and the size of the weights in bytes of a folder that can be loaded.

    Raises:
        BadInput: A file is missing, damaged or refused; the message says which, and what to do.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if CONFIG not in names:
        raise BadInput(_no_config(folder, names))
    config = read_config(folder / CONFIG)
    require_safetensors(names, _shown(folder))
    headers = weight_headers(folder)
    if not headers:
        raise BadInput(f"{_shown(folder)} lacks every shard that its {INDEX} names. Copy them too.")
    require_tokenizer(names, _shown(folder))
    return config, sum(header.buffer_bytes for header in headers)


def weight_headers(folder: Path) -> list[SafetensorsHeader]:
    """Return the headers of the weights that transformers loads from a folder, each of a whole file.

    Returns:
        Nothing where the folder has none, or an index without any of its shards: a config is enough for a plan.

    Raises:
        BadInput: The index is damaged, or a file that it names is missing or not whole; the message says which.
    """
    if (folder / WEIGHTS).is_file():
        return [read_header(folder / WEIGHTS)]
    return _sharded(folder) if (folder / INDEX).is_file() else []


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights that transformers loads from a folder.

    Raises:
        BadInput: There are none, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in _shards(folder / INDEX)]


def require_safetensors(names: Iterable[str], where: str) -> None:
    """Check that the file names include weights that transformers loads.

    Raises:
        BadInput: They do not, or only in formats that we refuse.
    """
    there = set(names)
    if WEIGHTS in there or INDEX in there:
        return
    if pickles := sorted(name for name in there if name.endswith(_PICKLES)):
        raise BadInput(
            f"{where} has its weights only as pickles ({_some(pickles)}), and loading a pickle can run any code in it. "
            f"Wanted {WEIGHTS}: look for a safetensors version of the model, or convert it where you trust its source."
        )
    if gguf := sorted(name for name in there if name.endswith(".gguf")):
        raise BadInput(f"{where} holds GGUF weights ({_some(gguf)}); training wants the original model as {WEIGHTS}.")
    other = sorted(name for name in there if name.endswith(".safetensors"))
    found = f"found {_some(other)}" if other else "found none"
    raise BadInput(f"{where} has no weights that can be loaded: {found}; wanted {WEIGHTS} or {INDEX} with its shards.")


def require_tokenizer(names: Iterable[str], where: str) -> None:
    """Check that a tokenizer is among the file names.

    Raises:
        BadInput: There is none.
    """
    if not set(names) & set(_TOKENIZERS):
        wanted = "tokenizer.json, or tokenizer.model, or vocab.json with merges.txt"
        raise BadInput(
            f"{where} has no tokenizer; wanted {wanted}. Copy the tokenizer files of the same model beside it."
        )


def _sharded(folder: Path) -> list[SafetensorsHeader]:
    """Return the headers of all shards of the index; each is whole and holds the tensors that the index names."""
    shards = _shards(folder / INDEX)
    lacking = [name for name in shards if not (folder / name).is_file()]
    if len(lacking) == len(shards):
        return []
    if lacking:
        raise BadInput(
            f"{_shown(folder)} lacks the shard {plain(lacking[0], one_line=True)} that its index names. Copy it too."
        )
    headers = []
    for name, tensors in shards.items():
        header = read_header(folder / name)
        missing = [tensor for tensor in tensors if tensor not in header.tensors]
        if missing:
            shown = plain(missing[0], one_line=True, limit=120)
            found = f"it lacks {len(missing)} tensors that the index names, such as {shown}"
            raise CorruptSafetensors(name, "bad_entry", found)
        headers.append(header)
    return headers


def _shards(index: Path) -> dict[str, list[str]]:
    """Return the tensors of each shard that an index names, shards by name."""
    table = _json(index, _MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise BadInput(f"{_shown(index)} has no weight_map from tensors to files. Copy or download it again.")
    shards: dict[str, list[str]] = {}
    for tensor, shard in table.items():
        if not isinstance(shard, str):
            shown = plain(repr(shard), one_line=True, limit=40)
            raise _misplaced(index, tensor, f"{shown}; wanted the name of a file")
        shards.setdefault(shard, []).append(tensor)
        if len(shards) > _MOST_SHARDS:
            raise BadInput(f"{_shown(index)} names more than {_MOST_SHARDS} files; wanted the index of one model.")
    for shard, tensors in shards.items():
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            shown = plain(shard, one_line=True, limit=120)
            raise _misplaced(index, tensors[0], f"{shown}, which points outside its folder; wanted a file beside it")
    return dict(sorted(shards.items()))


def _misplaced(index: Path, tensor: str, found: str) -> BadInput:
    return BadInput(f"{_shown(index)}: weight_map has {plain(tensor, one_line=True, limit=120)} in {found}.")


def _json(path: Path, most_bytes: int = _MOST_JSON_BYTES) -> dict[str, Any]:
    try:
        if path.stat().st_size > most_bytes:
            most = f"{most_bytes // 2**20} MiB"
            raise BadInput(f"{_shown(path)} is larger than {most} and cannot be what its name says.")
        raw = path.read_bytes()
        if raw.startswith(BOM_UTF8):
            found = "begins with a byte order mark, which transformers cannot read"
            raise BadInput(f"{_shown(path)} {found}. Save it as UTF-8 without one.")
        if (values := values_in(raw)) > MOST_VALUES:
            found = f"holds {values} values, and cannot be what its name says; wanted at most {MOST_VALUES}"
            raise BadInput(f"{_shown(path)} {found}.")
        table = json.loads(raw.decode("utf-8"), object_hook=_special_float)
    except OSError as error:
        raise BadInput(f"{_shown(path)} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{_shown(path)} is not JSON: {plain(str(error), one_line=True, limit=120)}.") from None
    if not isinstance(table, dict):
        raise BadInput(f"{_shown(path)} is not a JSON object.")
    return table


def _special_float(table: dict[str, Any]) -> Any:
    """Return the number that `{"__float__": "Infinity"}` stands for (transformers 5, configuration_utils.py)."""
    word = table.get(_FLOAT) if len(table) == 1 else None
    return _SPECIAL_FLOATS.get(word, table) if isinstance(word, str) else table


def _no_config(folder: Path, names: set[str]) -> str:
    if ADAPTER_CONFIG in names:
        base = json_word(folder / ADAPTER_CONFIG, "base_model_name_or_path")
        hint = f" Its base is {base}." if base else ""
        return f"{_shown(folder)} is an adapter, not a base model (adapter_config.json and no config.json).{hint}"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))[:3]
    hint = f" Did you mean the folder {_some(inner)} in it?" if inner else ""
    return f"{_shown(folder)} has no config.json; wanted the folder of a transformers model.{hint}"


def json_word(path: Path, key: str) -> str:
    """Return a text of a JSON file, made harmless; empty where it is not there."""
    try:
        value = _json(path).get(key)
    except BadInput:
        return ""
    return plain(value, one_line=True, limit=200) if isinstance(value, str) else ""


def _some(names: list[str]) -> str:
    shown = ", ".join(plain(name, one_line=True) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _shown(path: Path) -> str:
    return plain(str(path), one_line=True)
