"""Finds the base model that a word names, and checks it as far as possible without loading a weight."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from studio.core.base_form import four_bit_refusal, refusal
from studio.core.errors import BadInput
from studio.core.quantised_base import QuantisedBase, quantised_base
from studio.core.recipe import EMBEDDED, Method
from studio.core.text import plain
from studio.probe.architecture import untrainable_architecture
from studio.probe.embedded_model import config_from_gguf, embedded_header, find_embedded
from studio.probe.hub import HubRefusal, ask_hub, find_in_cache, is_hub_id
from studio.probe.known_models import without_the_hub
from studio.probe.model_folder import CONFIG, check_folder, json_word, read_config

_BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class BaseFound:
    """A base model that can be loaded.

    Attributes:
        kind: Where it comes from: embedded, a local folder, or the hub (or its cache).
        word: The word by which the user named it.
        path: The folder to load from; None if it must be converted (embedded) or downloaded (hub) first.
        config: Its `config.json`; None where it is not known yet.
        size_bytes: Size of the weights: on disk, or in bf16 for the embedded model before it is converted.
        revision: Branch, tag or commit on the hub; empty for the newest.
        gguf: The file that the embedded model is converted from.
    """

    kind: Literal["embedded", "folder", "hub"]
    word: str
    path: Path | None
    config: dict[str, Any] | None
    size_bytes: int
    revision: str = ""
    gguf: Path | None = None

    @property
    def quantization(self) -> str:
        """What has quantised the weights on disk: `gptq`, `bitsandbytes`, ...; empty for 16- or 32-bit weights."""
        return self.quantised.method if self.quantised else ""

    @property
    def quantised(self) -> QuantisedBase | None:
        """How the weights of a prequantised model lie on disk; None for 16- or 32-bit weights."""
        return quantised_base(self.config or {})


def find_base(base: str, revision: str = "") -> BaseFound:
    """Return the model that `embedded`, a folder's path or a hub id names.

    A folder wins over a hub id of the same name. The hub is asked only when neither a folder nor the cache has it.

    Raises:
        BadInput: No such model can be loaded; the message says what was tried, what is wrong and what to do.
    """
    if base == EMBEDDED:
        return _embedded()
    try:
        return _on_disk(base, revision) or _on_hub(base, revision)
    except OSError as error:
        shown = plain(base, one_line=True, limit=200)
        raise BadInput(f"The model {shown} cannot be looked at: {error.strerror or error}.") from None


def word_anywhere(base: str) -> str:
    """Return the word that names the same base for a process in another folder: of a folder the absolute path."""
    if base in ("", EMBEDDED):
        return base
    try:
        path = Path(base).expanduser()
        return str(path.absolute()) if path.is_dir() else base
    except (OSError, RuntimeError):  # find_base says what is wrong with it
        return base


def refuse_untrainable(base: BaseFound, method: Method) -> None:
    """Refuse to train on an architecture that continues no text, on a prequantised model, or in 4 bits that cannot be.

    4-bit bitsandbytes weights are trained on under QLoRA.

    Raises:
        BadInput: It is one of these; the message says which, and what to name instead.
    """
    config = base.config or {}
    why = untrainable_architecture(config) or refusal(base.quantised, method)
    if why := why or four_bit_refusal(str(config.get("model_type")), method):
        raise BadInput(f"The base model {plain(base.word, one_line=True, limit=200)} is {why}.")


def _on_disk(base: str, revision: str) -> BaseFound | None:
    try:
        path = Path(base).expanduser()
    except RuntimeError:
        raise BadInput(f"There is no home folder for {plain(base, one_line=True, limit=200)}.") from None
    if path.is_dir():
        if revision:
            found = f"model.revision is {plain(revision, one_line=True, limit=80)!r}, but {_shown(path)} is a folder"
            raise BadInput(f"{found}. A revision belongs to a hub model: leave it empty.")
        config, size_bytes = check_folder(path)
        return BaseFound("folder", base, path.absolute(), config, size_bytes)
    if path.exists():
        raise BadInput(f"{_shown(path)} is a file; wanted the folder of a model{_hint_for_file(path)}.")
    if _looks_like_path(base) or not is_hub_id(base):
        raise BadInput(
            f"There is no model folder {_shown(path)}, and it is no hub id either. "
            "Wanted a folder with config.json, a hub id such as owner/name, or 'embedded'."
        )
    return None


def _on_hub(base: str, revision: str) -> BaseFound:
    cached = find_in_cache(base, revision)
    if not isinstance(cached, str):
        return BaseFound("hub", base, *cached, revision=revision)
    try:
        config, size_bytes = ask_hub(base, revision, cached)
    except HubRefusal as refusal:
        raise HubRefusal(f"{refusal}{without_the_hub(base)}", refusal.why, gated=refusal.gated) from None
    return BaseFound("hub", base, None, config, size_bytes, revision=revision)


def _embedded() -> BaseFound:
    model = find_embedded()
    if (model.folder / CONFIG).is_file():
        config, size_bytes = check_folder(model.folder)
        return BaseFound("embedded", EMBEDDED, model.folder, config, size_bytes, gguf=model.gguf)
    header = embedded_header(model)
    size_bytes = _BF16_BYTES * header.parameters
    return BaseFound("embedded", EMBEDDED, None, config_from_gguf(header), size_bytes, gguf=model.gguf)


def _looks_like_path(word: str) -> bool:
    return word.startswith((".", "/", "~")) or "\\" in word or word.count("/") > 1


def _hint_for_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return ": GGUF is a format to run models with, training wants the original safetensors"
    if path.name == CONFIG:
        kind = json_word(path, "model_type")
        return f", the one that this config.json{f' ({kind})' if kind else ''} lies in: {_shown(path.parent)}"
    return ", a hub id or 'embedded'"


def _shown(path: Path) -> str:
    return plain(str(path), one_line=True)


__all__ = ["BaseFound", "find_base", "read_config", "refuse_untrainable", "word_anywhere"]
