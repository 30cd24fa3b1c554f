"""Makes the embedded model loadable: converts its GGUF file once into a bf16 safetensors folder in the cache.

If two processes need the model at the same time, one converts it and the other waits. A process that is killed half-way
leaves nothing that would be taken for the model. transformers could read the weights too, to the same bits, but it asks
gguf for the names of all tensors once for each of the model's modules (a third of its time on the embedded model), and
tells no progress.
"""

import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from studio.core.errors import BadInput, StudioError
from studio.probe.embedded_model import EmbeddedModel, embedded_header, find_embedded
from studio.probe.model_folder import CONFIG, check_folder
from studio.runs.atomic import mend_folder, publish_folder

Progress = Callable[[str, float], None]
_NEEDED_BYTES = 400 * 10**6  # 273 MB of files, written to a scratch directory before the rename


def ensure_embedded(progress: Progress | None = None) -> Path:
    """Return the folder of the embedded model, converting it first where that has not been done.

    Args:
        progress: Told what is being done, and the fraction done, 0 to 1.

    Raises:
        BadInput: The wheel that holds the model is not installed or is damaged.
        StudioError: The conversion failed, or the disk has no room for it.
    """
    model = find_embedded()
    tell = progress or (lambda stage, fraction: None)
    if _is_whole(model.folder):
        return model.folder
    try:
        model.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(model.folder.with_name(f".{model.folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell("waiting for another process that converts the embedded model", 0.0)
            lock.acquire()
        try:
            mend_folder(model.folder)
            if not _is_whole(model.folder):
                _convert_aside(model, tell)
        finally:
            lock.release()
    except OSError as error:
        where = model.folder.parent
        raise StudioError(f"The embedded model could not be written to {where}: {error.strerror or error}.") from error
    tell("embedded model ready", 1.0)
    return model.folder


def _is_whole(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        return False
    try:
        check_folder(folder)
    except BadInput:
        return False
    return True


def _convert_aside(model: EmbeddedModel, tell: Progress) -> None:
    for leftover in model.folder.parent.glob(f".{model.folder.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(model.folder.parent).free
    if free < _NEEDED_BYTES:
        needed = f"{_NEEDED_BYTES / 1e6:.0f} MB are needed in {model.folder.parent}, {free / 1e6:.0f} MB are free"
        raise StudioError(f"No room for the embedded model: {needed}. Free some, or set LORA_STUDIO_HOME elsewhere.")
    context_length = embedded_header(model).metadata.get("llama.context_length")
    scratch = model.folder.with_name(f".{model.folder.name}.{secrets.token_hex(4)}.part")
    try:
        scratch.mkdir()
        _convert(model.gguf, scratch, context_length, tell)
        check_folder(scratch)
        tell("writing the embedded model to disk", 0.95)
        publish_folder(scratch, model.folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(gguf: Path, folder: Path, context_length: Any, tell: Progress) -> None:
    """Write config, bf16 weights, tokenizer and chat template of a GGUF file into a folder.

    Raises:
        StudioError: transformers cannot read the file.
    """
    # The fractions are shares of the whole time, as measured. Tokenizer and configuration take so much of it because
    # transformers builds the file's 100 000 words anew each time it reads the file.
    tell("loading the libraries", 0.0)
    import torch  # noqa: PLC0415  two seconds that only the first run pays here
    import transformers  # noqa: PLC0415

    from studio.jobs.base.model_class import from_config, model_class  # noqa: PLC0415  torch and transformers, too

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tell("converting the embedded model: tokenizer", 0.1)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        if isinstance(context_length, int):
            tokenizer.model_max_length = context_length
        tokenizer.save_pretrained(folder)
        tell("converting the embedded model: configuration", 0.4)
        config = transformers.AutoConfig.from_pretrained(**source)
        # Without memory for weights: `load_gguf_weights` puts the file's own in their place.
        with torch.device("meta"):
            model = from_config(model_class(config).kind, config, dtype=torch.bfloat16)
        tell("converting the embedded model: list of tensors", 0.65)
        load_gguf_weights(model, gguf, lambda done: tell("converting the embedded model: weights", 0.85 + 0.08 * done))
        tell("converting the embedded model: saving", 0.93)
        model.save_pretrained(folder)
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise StudioError(
            f"The embedded model could not be converted ({type(error).__name__}: {error}). "
            f"It needs transformers with GGUF support; installed is {transformers.__version__}."
        ) from error


_PERMUTED = ("q_proj.weight", "k_proj.weight")
"""Weights whose rows llama.cpp stores in another order: the two halves of each rotated pair side by side."""

_TENSORS_PER_TELLING = 16


def load_gguf_weights(model: Any, file: Path, tell: Callable[[float], None]) -> None:
    """Give a model on the meta device the weights of a GGUF file, in the dtype of its parameters.

    Args:
        model: A transformers model of Llama's architecture.
        file: The GGUF file.
        tell: Told the fraction done after each sixteen tensors, 0 to 1.

    Raises:
        ValueError: The file is of another architecture, or lacks a weight.
    """
    import gguf  # noqa: PLC0415  needed only the first time
    import torch  # noqa: PLC0415

    config = model.config
    if config.model_type != "llama":
        raise ValueError(f"found a model of the architecture {config.model_type}, wanted llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
    state = {}
    for name, parameter in wanted.items():
        tensor = tensors.get(names.get_name(name, try_suffixes=(".weight",)) or "")
        if tensor is None:
            raise ValueError(f"the file lacks {name}")
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(_PERMUTED):
            weight = _as_in_transformers(weight, weight.shape[0] // config.head_dim)
        state[name] = weight.to(parameter.dtype)
        if len(state) % _TENSORS_PER_TELLING == 0:
            tell(len(state) / len(wanted))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()


def _as_in_transformers(weight: Any, heads: int) -> Any:
    """Return a weight `[heads * head_dim, hidden]` in transformers' order of rows.

    In each head the first halves of all rotated pairs come before the second halves; llama.cpp has them alternate.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


if __name__ == "__main__":
    try:
        ensure_embedded()
    except StudioError as failed:
        sys.exit(str(failed))
