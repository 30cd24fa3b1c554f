"""A model by its hub id: in the local Hugging Face cache, or, with a connection, what the hub says of it.

A look downloads no more than `config.json`, and of safetensors their headers by range requests, which describe the
weights without one of them. The upload of an export is here too. huggingface_hub takes long to import, so functions
import it themselves.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, JobFailed
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
_PATTERNS: dict[str, Any] = {
    "allow_patterns": ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"],
    "ignore_patterns": ["*/*", "consolidated*"],
}
_LOGIN = "log in with: hf auth login (or set HF_TOKEN) and push again; the export itself is whole"


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


def find_in_cache(repo: str, revision: str) -> tuple[Path, dict[str, Any], int] | str:
    """Return (folder, config, bytes of the weights) of a cached model, or the reason why it cannot be used.

    Raises:
        BadInput: It is there and damaged.
    """
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415  0.24 s that only hub models pay

    try:
        folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True, **_PATTERNS))
        return folder, *check_folder(folder)
    except CorruptSafetensors as error:
        # A download would keep the damaged file, because one of its name and hash is there.
        raise BadInput(f"{error} It lies in the cache: remove it with `hf cache rm model/{repo}`.") from None
    except BadInput as error:
        return str(error).rstrip(".")
    except Exception:  # noqa: BLE001  not cached: each version of the library has its own error for it
        return f"it is not in the cache {plain(constants.HF_HUB_CACHE, one_line=True)}"


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
    from huggingface_hub import constants, try_to_load_from_cache  # noqa: PLC0415

    found = try_to_load_from_cache(repo, CONFIG, revision=revision or None)
    if isinstance(found, str):
        return read_config(Path(found))
    if revision:
        return None
    # A look asks for the newest commit by its number, so the cache does not note which was the newest.
    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    looked_at = [path for path in snapshots.glob(f"*/{CONFIG}") if path.is_file()]
    return read_config(max(looked_at, key=lambda path: path.stat().st_mtime)) if looked_at else None


def knows_token() -> bool:
    """Return whether the hub's own login has left a token on this computer. The token itself is not looked at."""
    from huggingface_hub import get_token  # noqa: PLC0415

    return bool(get_token())


def way_through_the_gate(repo: str, *, token: bool) -> str:
    """Return what a user does to be given a gated model, where a token of the hub is known on this computer or not."""
    page = f"https://huggingface.co/{repo}"
    if token:
        return f"accept its terms at {page}, with the account of the token on this computer; it may take until granted"
    return f"accept its terms at {page}, then run: hf auth login (or set HF_TOKEN); no token is known on this computer"


def download(repo: str, revision: str, size_bytes: int = 0, told: Callable[[int], None] | None = None) -> Path:
    """Download what training needs of a model into the cache, or what is missing of it, and return its folder.

    Args:
        repo: The hub id.
        revision: Branch, tag or commit; empty for the newest.
        size_bytes: What has to fit on the disk; 0 where that is not known.
        told: Told the bytes that are on the disk so far, repeatedly and from several threads.

    Raises:
        BadInput: The disk has no room for it, the download failed, or the model is not whole.
    """
    _require_room(repo, size_bytes)
    bars: dict[str, Any] = {"tqdm_class": byte_counter(told)} if told else {}
    folder = _fetch(repo, revision, repo, {**_PATTERNS, **bars})
    check_folder(folder)
    return folder


def download_tokenizer(repo: str, revision: str) -> Path:
    """Download a model's tokenizer, config and chat template into the cache and return their folder; no weights.

    Args:
        repo: The hub id.
        revision: Branch, tag or commit; empty for the newest.

    Raises:
        BadInput: The download failed.
    """
    # Everything of `_PATTERNS` but the weights.
    wanted = {**_PATTERNS, "ignore_patterns": [*_PATTERNS["ignore_patterns"], "*.safetensors", "*.index.json"]}
    return _fetch(repo, revision, f"The tokenizer of {repo}", wanted)


def _fetch(repo: str, revision: str, what: str, wanted: dict[str, Any]) -> Path:
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415

    try:
        return Path(snapshot_download(repo, revision=revision or None, **wanted))
    except errors.GatedRepoError:
        raise BadInput(f"{what} is gated: {way_through_the_gate(repo, token=knows_token())}.") from None
    except Exception as error:
        why = f"{type(error).__name__}: {plain(str(error), one_line=True, limit=300)}"
        raise BadInput(f"{what} could not be downloaded ({why}). Try again: it goes on where it stopped.") from error


def _require_room(repo: str, size_bytes: int) -> None:
    from huggingface_hub import constants  # noqa: PLC0415

    cache = Path(constants.HF_HUB_CACHE)
    try:
        there = sum(file.stat().st_size for file in (cache / f"models--{repo.replace('/', '--')}" / "blobs").glob("*"))
        free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    except OSError:
        return
    if (missing := size_bytes - there) > free:
        raise BadInput(
            f"{repo} needs {missing / 1e9:.1f} GB more on the disk of {plain(str(cache), one_line=True)}, which has "
            f"{free / 1e9:.1f} GB free. Free some space, or set HF_HOME to a folder on a larger disk."
        )


def _require_trainable(names: Iterable[str], where: str) -> None:
    if CONFIG not in names:
        raise BadInput(f"{where} has no config.json; wanted a transformers model.")
    require_safetensors(names, where)
    require_tokenizer(names, where)


def _refusal(repo: str, revision: str, cached: str, error: Exception) -> tuple[str, str, bool]:
    """Return what to tell the user, the reason in a few words, and whether the model is gated."""
    from huggingface_hub import errors  # noqa: PLC0415

    name = f"The model {repo}" + (f" at revision {plain(revision, one_line=True, limit=80)}" if revision else "")
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
    words = (
        f"{name} cannot be found: there is no such folder here; {cached}; and the hub cannot be asked ({why}). "
        f"On a machine with a connection run: hf download {repo} --local-dir FOLDER, and give the path of its copy. "
        "Without any of it, the model 'embedded' is there."
    )
    return words, why, False


def byte_counter(told: Callable[[int], None]) -> type[Any]:
    """Return a bar class for `snapshot_download(tqdm_class=...)` that tells the bytes on disk so far.

    The client opens several bars: of files, of bytes received, and of bytes written, which counts what an earlier
    download left. The highest number of bytes is told.
    """
    from tqdm import tqdm  # noqa: PLC0415  comes with huggingface_hub, which only hub models import

    furthest = 0

    class ByteCounter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options | {"disable": False, "delay": 0})

        def display(self, *_: Any, **__: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal furthest
            updated: bool | None = super().update(n)
            if self.unit == "B" and self.n > furthest:
                furthest = int(self.n)
                told(furthest)
            return updated

    return ByteCounter


def download_on(repo: str, commit: str, name: str, bars: dict[str, Any]) -> None:
    """Put a large file of a data set into the client's cache, from where an earlier download of it has stopped.

    The client goes on by itself after a lost connection, but starts again in a new process. So the file is fetched here
    into a part beside its place among the cache's blobs, which bear the name of their checksum; the client then finds
    it there and has only to link it.

    Args:
        repo: The data set.
        commit: Of the file.
        name: Its path in the repository.
        bars: The client's arguments for its progress.

    Raises:
        OSError: The disk refuses, or what came is not what its checksum says.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url  # noqa: PLC0415
    from huggingface_hub.file_download import http_get  # noqa: PLC0415
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    url = hf_hub_url(repo, name, repo_type="dataset", revision=commit)
    seen = get_hf_file_metadata(url)
    if not seen.etag or not _CHECKSUM.fullmatch(seen.etag) or not seen.size:
        return
    blob = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "blobs" / seen.etag
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.lora-studio.part")
    with suppress(Timeout), FileLock(f"{part}.lock", timeout=0):  # who comes second leaves it to the client
        with part.open("ab") as file:
            if file.tell() > seen.size:
                file.truncate(0)
            there = file.tell()
            if there < seen.size:
                http_get(url, file, resume_size=there, headers=build_hf_headers(), expected_size=seen.size, **bars)
        if len(seen.etag) == _SHA256_DIGITS and _sha256(part) != seen.etag:
            part.unlink()
            raise OSError(f"{name} is not what its checksum says; what was downloaded of it is removed")
        part.replace(blob)
    Path(f"{part}.lock").unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    import hashlib  # noqa: PLC0415  OpenSSL: 3 ms and 5 MiB that a plan has no use for

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def push_folder(out: Path, repository: str) -> str:
    """Upload a folder, or one file, and return the repository's address.

    A new repository is private; the user can make it public on the hub.

    Raises:
        JobFailed: There is no token, the hub refuses, or it cannot be reached. The message holds no token.
    """
    from huggingface_hub import HfApi, errors  # noqa: PLC0415

    hub = HfApi()
    message = "Upload an export of lora-studio"
    try:
        made = hub.create_repo(repository, private=True, exist_ok=True)
        if out.is_dir():
            hub.upload_folder(repo_id=made.repo_id, folder_path=out, commit_message=message)
        else:
            hub.upload_file(repo_id=made.repo_id, path_or_fileobj=out, path_in_repo=out.name, commit_message=message)
    except errors.LocalTokenNotFoundError:
        raise JobFailed("push_refused", "no token of the hub is known on this computer", _LOGIN) from None
    except errors.HFValidationError as error:
        why = plain(str(error), one_line=True, limit=200)
        raise JobFailed("push_refused", why, "name the repository as OWNER/NAME") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise JobFailed("push_refused", f"the hub refused the upload (HTTP {status})", _LOGIN) from None
    except Exception as error:  # noqa: BLE001  the transport (requests, httpx, httpx2) differs between versions
        why = type(error).__name__  # not its message, which may hold headers with the user's token
        raise JobFailed(
            "push_failed", f"the upload did not succeed ({why})", "try again later; the export itself is whole"
        ) from None
    return str(made)


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
