"""The headers of a hub model's safetensors, read by range requests: they describe its weights without downloading any.

huggingface_hub takes long to import, so the function imports it itself.
"""

import json
from typing import Any

from studio.core.text import plain
from studio.probe.safetensors_file import CorruptSafetensors, SafetensorsHeader, parse_header

_ASK_SECONDS = 15.0
_AT_ONCE = 8  # shards asked for at the same time; a 70B model has 15 to 30


def hub_headers(repo: str, revision: str) -> list[SafetensorsHeader] | None:
    """Return the header of every shard of a hub model, some 100 kB each; None where the hub does not give them.

    Args:
        repo: The hub id.
        revision: Branch, tag or commit; empty for the newest.

    Raises:
        CorruptSafetensors: A header breaks the format's rules, or names more bytes than its file has.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  5 ms that only hub models pay

    from huggingface_hub import HfApi  # noqa: PLC0415
    from huggingface_hub.errors import SafetensorsParsingError  # noqa: PLC0415

    hub = HfApi()

    def header_of(name: str, size: int) -> SafetensorsHeader:
        try:
            told = hub.parse_safetensors_file_metadata(repo, name, revision=commit, timeout=_ASK_SECONDS)
        except (SafetensorsParsingError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            found = f"the hub's copy has no header that can be read ({plain(str(error), one_line=True, limit=120)})"
            raise CorruptSafetensors(name, "bad_json", found) from None
        entries = {key: _entry(info) for key, info in told.tensors.items()}
        header = parse_header(json.dumps(entries).encode(), name)
        if size and header.buffer_bytes >= size:
            found = f"it has {size} bytes; its header speaks of {header.buffer_bytes} of tensors alone"
            raise CorruptSafetensors(name, "wrong_length", found)
        return header

    try:
        info = hub.model_info(repo, revision=revision or None, files_metadata=True, timeout=_ASK_SECONDS)
        commit = info.sha or revision or None
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _is_weights(file.rfilename)}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(header_of, sizes, sizes.values())) or None
    except CorruptSafetensors:
        raise
    except Exception:  # noqa: BLE001  the transport (requests, httpx) differs between versions; the config is enough
        return None


def _is_weights(name: str) -> bool:
    """Whether transformers loads this file; it does not load the makers' own checkpoints, or files in folders."""
    return name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")


def _entry(info: Any) -> dict[str, Any]:
    return {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
