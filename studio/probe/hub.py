"""A model by its hub id: in the local Hugging Face cache, or, with a connection, what the hub says of it.

A look downloads no more than `config.json`, and of safetensors their headers by range requests, which describe the
weights without one of them. The upload of an export is here too. huggingface_hub takes long to import, so functions
import it themselves.
"""

import json
import os
import re
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.model_folder import CONFIG, check_folder, read_config, require_safetensors, require_tokenizer
from studio.probe.safetensors_file import CorruptSafetensors, SafetensorsHeader, parse_header

_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256_DIGITS = 64
_UNAUTHORISED = 401
_ASK_SECONDS = 15.0
_AT_ONCE = 8  # shards asked for at the same time; a 70B model has 15 to 30
# What training needs of a repository; pickles, GGUF files and the makers' own checkpoints stay there.
PATTERNS: dict[str, Any] = {
    "allow_patterns": ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"],
    "ignore_patterns": ["*/*", "consolidated*"],
}
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")
"""Variables from which the hub's library takes a token; else it reads a file."""


class HubRefusal(BadInput):
    """The hub gives nothing of a model now.

    Attributes:
        why: The reason in a few words.
        gated: Whether the hub wants its terms accepted first.
    """

    def __init__(self, message: str, why: str, *, gated: bool = False) -> None:
        super().__init__(message)
        self.why, self.gated = why, gated


def is_hub_id(word: str) -> bool:
    """Return whether the word could be a hub id: `name` or `owner/name`."""
    return bool(_ID.fullmatch(word)) and ".." not in word and "--" not in word and len(word) <= 200


def cache_folder(repo: str) -> str:
    """Return the name of a model's folder in the cache."""
    return f"models--{repo.replace('/', '--')}"


def _no_way_there() -> str:
    """Return why no connection to the hub can be made; empty where one can, or where a proxy makes it.

    The hub's library takes 0.2 s to import, which a computer without a connection need not pay.
    """
    from urllib.parse import urlsplit  # noqa: PLC0415  only hub models need it

    from huggingface_hub import constants  # noqa: PLC0415

    if constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    address = urlsplit(constants.ENDPOINT)
    # Other systems have proxies outside of the environment.
    proxies = sys.platform != "linux" or any(name.lower().endswith("_proxy") for name in os.environ)
    if proxies or not address.hostname:
        return ""
    place = address.hostname, address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection(place, timeout=_ASK_SECONDS).close()
    except OSError as error:
        return f"{type(error).__name__}: {plain(str(error), one_line=True, limit=160)}"
    return ""


def find_in_cache(repo: str, revision: str) -> tuple[Path, dict[str, Any], int] | str:
    """Return (folder, config, bytes of the weights) of a cached model, or the reason why it cannot be used.

    Raises:
        BadInput: It is there and damaged.
    """
    from huggingface_hub import constants  # noqa: PLC0415  5 ms that only hub models pay

    missing = f"it is not in the cache {plain(constants.HF_HUB_CACHE, one_line=True)}"
    if not (Path(constants.HF_HUB_CACHE) / cache_folder(repo)).is_dir():
        return missing
    from huggingface_hub import snapshot_download  # noqa: PLC0415  0.2 s that only models in the cache pay

    try:
        folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True, **PATTERNS))
        return folder, *check_folder(folder)
    except CorruptSafetensors as error:
        # A download would keep the damaged file, because one of its name and hash is there.
        raise BadInput(f"{error} It lies in the cache: remove it with `hf cache rm model/{repo}`.") from None
    except BadInput as error:
        return str(error).rstrip(".")
    except Exception:  # noqa: BLE001  not cached: each version of the library has its own error for it
        return missing


def ask_hub(repo: str, revision: str, cached: str) -> tuple[dict[str, Any], int]:
    """Return (config, bytes of the weights) from the hub itself, which must have what training needs.

    Args:
        repo: The hub id.
        revision: Branch, tag or commit; empty for the newest.
        cached: Why the cache could not serve, for the message.

    Raises:
        HubRefusal: No connection, no such model or revision, or a gated model.
        BadInput: There are no safetensors or no tokenizer in it.
    """
    if why := _no_way_there():
        raise HubRefusal(_unasked(repo, revision, cached, why), why)
    from huggingface_hub import HfApi, hf_hub_download  # noqa: PLC0415

    try:
        info = HfApi().model_info(repo, revision=revision or None, files_metadata=True, timeout=_ASK_SECONDS)
        names = {file.rfilename: file.size or 0 for file in info.siblings or []}
        _require_trainable(names, f"The hub's {repo}")
        config = read_config(Path(hf_hub_download(repo, CONFIG, revision=info.sha or revision or None)))
    except BadInput:
        raise
    except Exception as error:  # noqa: BLE001  the transport (requests, httpx, httpx2) differs between versions
        words, why, gated = _refusal(repo, revision, cached, error)
        raise HubRefusal(words, why, gated=gated) from None
    return config, sum(size for name, size in names.items() if name.endswith(".safetensors") and "/" not in name)


def cached_config(repo: str, revision: str) -> dict[str, Any] | None:
    """Return the config that the hub gave when it was last asked; None where none is in the cache.

    Raises:
        BadInput: It is damaged.
    """
    from huggingface_hub import constants  # noqa: PLC0415

    if not (Path(constants.HF_HUB_CACHE) / cache_folder(repo)).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  as above

    found = try_to_load_from_cache(repo, CONFIG, revision=revision or None)
    if isinstance(found, str):
        return read_config(Path(found))
    if revision:
        return None
    # A look asks for the newest commit by its number, so the cache does not note which was the newest.
    snapshots = Path(constants.HF_HUB_CACHE) / cache_folder(repo) / "snapshots"
    looked_at = [path for path in snapshots.glob(f"*/{CONFIG}") if path.is_file()]
    return read_config(max(looked_at, key=lambda path: path.stat().st_mtime)) if looked_at else None


def knows_token() -> bool:
    """Return whether the hub's own login has left a token on this computer. The token itself is not looked at."""
    from huggingface_hub import constants  # noqa: PLC0415

    # Only where there may be one is the library asked, which takes 0.1 s to import.
    if not any(name in os.environ for name in _TOKENS) and not Path(constants.HF_TOKEN_PATH).exists():
        return False
    from huggingface_hub import get_token  # noqa: PLC0415  as above

    return bool(get_token())


def way_through_the_gate(repo: str, *, token: bool) -> str:
    """Return what a user does to be given a gated model, where a token of the hub is known on this computer or not."""
    page = f"https://huggingface.co/{repo}"
    if token:
        return f"accept its terms at {page}, with the account of the token on this computer; it may take until granted"
    return f"accept its terms at {page}, then run: hf auth login (or set HF_TOKEN); no token is known on this computer"


def _require_trainable(names: Iterable[str], where: str) -> None:
    if CONFIG not in names:
        raise BadInput(f"{where} has no config.json; wanted a transformers model.")
    require_safetensors(names, where)
    require_tokenizer(names, where)


def _refusal(repo: str, revision: str, cached: str, error: Exception) -> tuple[str, str, bool]:
    """Return what to tell the user, the reason in a few words, and whether the model is gated."""
    from huggingface_hub import errors  # noqa: PLC0415

    name = _named(repo, revision)
    match error:
        case errors.GatedRepoError():
            return f"{name} is gated: {way_through_the_gate(repo, token=knows_token())}.", "it is gated there", True
        case errors.RevisionNotFoundError():
            words = f"{name} was not found: the hub has the model, not this revision. Empty means the newest."
            return words, "it has no such revision", False
        case errors.RepositoryNotFoundError():
            words = f"{name} is not on the hub, or it is private. Check the name; for a private one run: hf auth login."
            return words, "it is not there, or private", False
        case errors.HfHubHTTPError(response=answer) if answer is not None and answer.status_code == _UNAUTHORISED:
            words = (
                f"{name} is not given: the hub does not accept the token of this computer (HTTP 401). It may have "
                "ended: run hf auth login again, or hf auth logout to ask without one; where HF_TOKEN is set, it is "
                "the one that is used."
            )
            return words, "it does not accept this computer's token", False
        case errors.OfflineModeIsEnabled():
            why = "offline mode is on (HF_HUB_OFFLINE)"
        case _:
            why = f"{type(error).__name__}: {plain(str(error), one_line=True, limit=160)}"
    return _unasked(repo, revision, cached, why), why, False


def _named(repo: str, revision: str) -> str:
    return f"The model {repo}" + (f" at revision {plain(revision, one_line=True, limit=80)}" if revision else "")


def _unasked(repo: str, revision: str, cached: str, why: str) -> str:
    """Return what to do where the hub cannot be asked."""
    return (
        f"{_named(repo, revision)} cannot be found: there is no such folder here; {cached}; and the hub cannot be "
        f"asked ({why}). On a machine with a connection run: hf download {repo} --local-dir FOLDER, and give the path "
        "of its copy. Without any of it, the model 'embedded' is there."
    )


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
