"""Reads the weights of a GGUF file of Llama's architecture into a model, a tensor at a time.

transformers does it too, to the same bits, but asks gguf for the names of all tensors once for each of a model's
modules (a third of its time on the embedded model), and tells nothing meanwhile.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

_PERMUTED = ("q_proj.weight", "k_proj.weight")
"""llama.cpp holds their rows with the two halves of each rotated pair side by side."""

_TENSORS_PER_TELLING = 16


def load_gguf_weights(model: Any, file: Path, tell: Callable[[float], None]) -> None:
    """Give a model on the meta device the weights of a file, in the type of its parameters.

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
    """Return a weight `[heads * head size, width]` with the first halves of all pairs of a head before the second."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
