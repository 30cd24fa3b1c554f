"""What goes between the hub and this machine: models and tokenizers into the cache, single files, a pushed folder.

huggingface_hub takes long to import, so functions import it themselves.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, JobFailed
from studio.core.text import plain
from studio.probe.hub import PATTERNS, cache_folder, knows_token, way_through_the_gate
from studio.probe.model_folder import check_folder

_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256_DIGITS = 64
_LOGIN = "log in with: hf auth login (or set HF_TOKEN) and push again; the export itself is whole"


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
    folder = _fetch(repo, revision, repo, {**PATTERNS, **bars})
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
    # Everything of `PATTERNS` but the weights.
    wanted = {**PATTERNS, "ignore_patterns": [*PATTERNS["ignore_patterns"], "*.safetensors", "*.index.json"]}
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
        there = sum(file.stat().st_size for file in (cache / cache_folder(repo) / "blobs").glob("*"))
        free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    except OSError:
        return
    if (missing := size_bytes - there) > free:
        raise BadInput(
            f"{repo} needs {missing / 1e9:.1f} GB more on the disk of {plain(str(cache), one_line=True)}, which has "
            f"{free / 1e9:.1f} GB free. Free some space, or set HF_HOME to a folder on a larger disk."
        )


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
