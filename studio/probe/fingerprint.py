"""What tells one base model from another of equal shape: checksums of its config, its tokenizer and all its weights.

The files themselves are read. How the weights are split into shards does not matter, but their format does. Every
tensor is read, but only once: see `studio.probe.weight_sums`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.model_folder import CONFIG, read_config, weight_files
from studio.probe.weight_sums import Tell, weight_sums
from studio.runs.identity import read_identity
from studio.runs.layout import RunPaths

AT_ONCE_BYTES = 2**28
"""Weights up to this size are read where a user waits, for a second at most; larger ones are left to a job."""

_OF_NO_ACCOUNT = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json", "chat_template.jinja"),
    *("chat_template.json", "processor_config.json"),
)
"""Files of tokenizer and chat template, which decide into which tokens a row is turned."""
_CODE = "*.py"
_NAMED = 3
_MOST_JSON_BYTES = 2**20
"""A larger file is compared byte by byte, since parsing a tokenizer of 17 MB takes most of a second."""


def fingerprint(folder: Path, tell: Tell | None = None) -> dict[str, Any]:
    """Return the fingerprint of a model folder, ready for JSON; the first time, every weight is read for it.

    Args:
        folder: A whole model folder.
        tell: Told the fraction of the weights that is read; it ends the reading by raising an exception.

    Raises:
        BadInput: A file of it is damaged, or was changed meanwhile.
        OSError: A file cannot be read.
    """
    return _fingerprint(folder, tell, None)


def known_fingerprint(folder: Path) -> dict[str, Any]:
    """Return the same without a wait: `tensors` and `weights` are None if more than 256 MiB would have to be read.

    Raises:
        BadInput: A file of it is damaged, or was changed meanwhile.
        OSError: A file cannot be read.
    """
    return _fingerprint(folder, None, AT_ONCE_BYTES)


def short_fingerprint(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint that is enough to tell whether two bases differ, but not in which tensors or fields."""
    return {key: value for key, value in found.items() if key not in ("tensors", "config_fields")}


def recorded_fingerprint(run: str) -> Mapping[str, Any] | None:
    """Return the fingerprint of the base that a training run began with; None where it recorded none.

    Args:
        run: The run's folder; empty for none.
    """
    return read_identity(RunPaths(Path(run))).base if run else None


def difference(trained: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return how the weights of a base differ from those that were trained on, in words; empty where they do not.

    Only what both fingerprints hold is compared.
    """
    wanted, there = trained.get("tensors"), found.get("tensors")
    if not isinstance(wanted, dict) or not isinstance(there, dict):
        wanted = there = {}
    if trained.get("shapes") != found.get("shapes"):
        gone, new = sorted(wanted.keys() - there.keys()), sorted(there.keys() - wanted.keys())
        words = [f"{len(names)} {what} ({_some(names)})" for names, what in ((gone, "missing"), (new, "new")) if names]
        return "its tensors have other names, formats or shapes" + (f": {', '.join(words)}" if words else "")
    if other := [name for name, value in wanted.items() if there.get(name) != value]:
        return f"{len(other)} of its {len(wanted)} tensors hold other numbers ({_some(other)})"
    known = isinstance(trained.get("weights"), str) and isinstance(found.get("weights"), str)
    return "its tensors hold other numbers" if known and trained["weights"] != found["weights"] else ""


def other_files(trained: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return what differs besides weights: config with its fields, tokenizer, chat template, code; safe to print."""
    names = [plain(name, one_line=True, limit=80) for name in _differing(trained.get("files"), found.get("files"))]
    if trained.get("config") == found.get("config"):
        return names
    fields = _differing(trained.get("config_fields"), found.get("config_fields"))
    return [f"{CONFIG} ({_some(fields)})" if fields else CONFIG, *names]


def refuse_another_base(run: str, folder: Path, look: Callable[[Path], Mapping[str, Any]]) -> None:
    """Refuse a base other than the one that a run trained on, also where the shapes are equal.

    Args:
        run: The training run's folder; empty where it is not known, and then nothing is compared.
        folder: The base.
        look: Returns its fingerprint: `known_fingerprint` where a user waits; a job may read every weight.

    Raises:
        BadInput: The weights differ.
    """
    trained = recorded_fingerprint(run)
    if trained is None or trained.get("quantized"):
        return
    if differs := difference(trained, look(folder)):
        raise BadInput(
            f"{plain(str(folder), one_line=True)} is not the base that this adapter was trained on: {differs}. "
            "With it, the model would not be the one that was trained. Name the right one with --base."
        )


def _fingerprint(folder: Path, tell: Tell | None, most_bytes: int | None) -> dict[str, Any]:
    config = {key: value for key, value in read_config(folder / CONFIG).items() if key not in _OF_NO_ACCOUNT}
    seen = weight_sums(weight_files(folder), tell, most_bytes=most_bytes)
    fields = {key: _sum_json(value) for key, value in config.items()}
    return {
        "config": _sum_json(fields),
        "config_fields": fields,
        "files": {path.name: _sum_file(path) for path in _text_files(folder)},
        "shapes": _sum_json(seen.shapes),
        "tensors": seen.sums,
        "weights": None if seen.sums is None else _sum_json(seen.sums),
        "quantized": "quantization_config" in config,
    }


def _text_files(folder: Path) -> list[Path]:
    there = [folder / name for name in _TEXT_FILES if (folder / name).is_file()]
    return [*there, *sorted(path for path in folder.glob(_CODE) if path.is_file())]


def _differing(one: object, other: object) -> list[str]:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return []
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    shown = [plain(str(name), one_line=True, limit=120) for name in listed[:_NAMED]]
    more = len(listed) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _sum_file(path: Path) -> str:
    """Return a checksum of a file; of JSON that of its values, whatever the white space and the order."""
    data = path.read_bytes()
    if path.suffix == ".json" and len(data) <= _MOST_JSON_BYTES:
        try:
            return _sum_json(json.loads(data))
        except (ValueError, RecursionError):
            pass
    return _sum(data)


def _sum_json(value: object) -> str:
    return _sum(json.dumps(value, sort_keys=True).encode())


def _sum(data: bytes) -> str:
    import xxhash  # noqa: PLC0415  not needed for the first frame

    return xxhash.xxh3_128(data).hexdigest()
