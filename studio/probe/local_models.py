"""The base models to choose from: those on this machine, and those that the hub finds for a word."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED
from studio.core.text import plain
from studio.probe.model_folder import CONFIG
from studio.probe.models import find_base, refuse_untrainable

_MOST_FOLDERS = 200
_MOST_HITS = 20
_ASK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Listed:
    """One model.

    Attributes:
        word: Its name for `model.base`.
        kind: Where it comes from: embedded, folder or hub (its cache).
        size_bytes: Size of its weights; None where they cannot be used.
        path: Its folder; None before a conversion or download.
        problem: Why it cannot be used; empty where it can.
    """

    word: str
    kind: Literal["embedded", "folder", "hub"]
    size_bytes: int | None = None
    path: str | None = None
    problem: str = ""


def local_models(places: Iterable[Path] = ()) -> list[Listed]:
    """Return the embedded model, then those in the Hugging Face cache, then those found in some folders.

    Args:
        places: Folders to look in, and one level below them.
    """
    found = [listed(EMBEDDED, "embedded"), *(listed(word, "hub") for word in cached_models())]
    return [*found, *(listed(str(folder), "folder") for folder in model_folders(places))]


def likely_places() -> tuple[Path, ...]:
    """Return the folders to look for models in: the current one, `models` in it, and `models` at home."""
    try:
        home: tuple[Path, ...] = (Path.home() / "models",)
    except RuntimeError:
        home = ()
    return (Path.cwd(), Path.cwd() / "models", *home)


def model_folders(places: Iterable[Path]) -> list[Path]:
    """Return the folders with a config.json and safetensors in some places, and one level below them."""
    found: dict[Path, None] = {}
    for place in places:
        for folder in (place, *_folders_in(place)):
            try:
                if (folder / CONFIG).is_file() and any(folder.glob("*.safetensors")):
                    found[folder.resolve()] = None
            except OSError:
                continue
    return list(found)


def cached_models() -> list[str]:
    """Return the ids of the models in the Hugging Face cache, by name."""
    from huggingface_hub import scan_cache_dir  # noqa: PLC0415  0.15 s that only this look pays
    from huggingface_hub.errors import CacheNotFound  # noqa: PLC0415

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    return sorted(repo.repo_id for repo in repos if repo.repo_type == "model")


def listed(word: str, kind: Literal["embedded", "folder", "hub"]) -> Listed:
    """Return what is known of one model without loading a weight, with the reason where it cannot be trained on."""
    try:
        base = find_base(word)
        refuse_untrainable(base, "qlora")
    except BadInput as error:
        return Listed(word, kind, problem=str(error))
    return Listed(word, base.kind, base.size_bytes, str(base.path) if base.path else None)


def search_hub(words: str) -> list[str]:
    """Return the ids of the most downloaded text models on the hub that match some words.

    Raises:
        BadInput: The hub cannot be asked; the message says why.
    """
    from huggingface_hub import constants, get_session  # noqa: PLC0415  as above

    if constants.HF_HUB_OFFLINE:
        raise BadInput("The hub is not asked: offline mode is on (HF_HUB_OFFLINE). What lies here is listed.")
    wanted: dict[str, str | int] = {
        "search": words.strip(),
        "pipeline_tag": "text-generation",
        "sort": "downloads",
        "limit": _MOST_HITS,
    }
    try:
        # One page, asked for once: the library's own list_models tries six times, half a minute on a dead line.
        answer = get_session().get(f"{constants.ENDPOINT}/api/models", params=wanted, timeout=_ASK_SECONDS)
        answer.raise_for_status()
        return [plain(str(hit["id"]), one_line=True, limit=200) for hit in answer.json()][:_MOST_HITS]
    except Exception as error:  # noqa: BLE001  the transport (requests, httpx, httpx2) differs between versions
        why = f"{type(error).__name__}: {plain(str(error), one_line=True, limit=160)}"
        raise BadInput(f"The hub cannot be asked ({why}). What lies on this machine is listed.") from None


def _folders_in(place: Path) -> Iterator[Path]:
    try:
        entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return
    yield from entries[:_MOST_FOLDERS]
