"""What tells one base model from another of equal shape: hashes of its config and of a few of its weights.

Read straight from the files; the split into shards does not matter, the format of the weights does.
"""

import json
from pathlib import Path
from typing import Any

from studio.core.events import Finished
from studio.core.text import plain
from studio.probe.model_folder import CONFIG, INDEX, WEIGHTS, read_config
from studio.probe.safetensors_header import TensorEntry, read_header
from studio.runs.layout import RunPaths
from studio.runs.log import read_events

FINGERPRINT = "base_fingerprint"
"""Under this name a training run keeps the fingerprint of its base in the result of its last event."""
_SAMPLED_TENSORS = 8
_SAMPLED_BYTES = 2**20
_OF_NO_ACCOUNT = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return the fingerprint of a model folder, ready for JSON.

    Raises:
        BadInput: A file of it is damaged.
        OSError: A file cannot be read.
    """
    config = {key: value for key, value in read_config(folder / CONFIG).items() if key not in _OF_NO_ACCOUNT}
    places = _places(folder)
    shapes = sorted((name, list(entry.shape)) for name, (_, _, entry) in places.items())
    matrices = sorted(name for name, (_, _, entry) in places.items() if len(entry.shape) > 1) or sorted(places)
    apart = max(1, len(matrices) // _SAMPLED_TENSORS)
    return {
        "config": _hash(json.dumps(config, sort_keys=True).encode()),
        "shapes": _hash(json.dumps(shapes).encode()),
        "tensors": {name: _sum(*places[name]) for name in matrices[::apart][:_SAMPLED_TENSORS]},
        "quantized": "quantization_config" in config,
    }


def recorded_fingerprint(run: str) -> dict[str, Any] | None:
    """Return the fingerprint of the base that a training run kept; None where it kept none.

    Args:
        run: The run's folder; empty for none.
    """
    paths = RunPaths(Path(run))
    if not run or not paths.events.is_file():
        return None
    kept = None
    for event in read_events(paths.events):
        if isinstance(event, Finished) and isinstance(event.result.get(FINGERPRINT), dict):
            kept = event.result[FINGERPRINT]
    return kept


def difference(trained: dict[str, Any], found: dict[str, Any]) -> str:
    """Return how the weights of a base differ from those that were trained on, in words; empty where they do not."""
    if trained.get("shapes") != found.get("shapes"):
        return "its tensors have other names or shapes"
    wanted, there = trained.get("tensors"), found.get("tensors")
    if not isinstance(wanted, dict) or not isinstance(there, dict):
        return ""
    other = [name for name, value in wanted.items() if there.get(name) != value]
    if other:
        shown = plain(str(other[0]), one_line=True, limit=120)
        return f"{len(other)} of {len(wanted)} compared tensors hold other numbers, the first is {shown}"
    return ""


def _places(folder: Path) -> dict[str, tuple[Path, int, TensorEntry]]:
    """Return file, offset in the file and entry of every tensor."""
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        files = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
    places: dict[str, tuple[Path, int, TensorEntry]] = {}
    for name in files:
        header = read_header(folder / name)
        start = 8 + header.header_bytes
        places |= {key: (folder / name, start + entry.begin, entry) for key, entry in header.tensors.items()}
    return places


def _sum(path: Path, offset: int, entry: TensorEntry) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return _hash(entry.dtype.encode() + file.read(min(entry.size_bytes, _SAMPLED_BYTES)))


def _hash(data: bytes) -> str:
    import hashlib  # noqa: PLC0415  brings OpenSSL, 5 MiB that the studio's screens need not hold

    return hashlib.sha256(data).hexdigest()[:32]
