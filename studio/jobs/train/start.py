"""Starts of an adapter that look at the base's weights: PiSSA (LoRA) and LoftQ (QLoRA).

With W the base's weight, s the adapter's scaling and r its rank:
PiSSA puts the r largest singular directions of W into s*B*A and takes them out of the base, which is then no longer the
ordinary one; what is saved is therefore the difference to the start, of rank 2r, which any peft loads onto the ordinary
base (Meng et al. 2024, appendix C). LoftQ sets s*B*A to the best rank-r picture of W minus its 4-bit form (Li et al.
2023, one iteration, so that the base stays the ordinary 4-bit one). peft's own LoftQ leaves s out and overshoots.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from studio.jobs.base.weights.tensors import FolderTensors

_ADAPTER = "default"
_EXACT_UP_TO = 512
_POWER_STEPS = 8
"""Subspace iterations of the randomised decomposition; its error then no longer matters (tests/jobs/test_start.py)."""

Pair = dict[str, Tensor]
"""An adapter's tensors by their names in a PEFT file."""


def adapter_weights(model: PeftModel) -> Pair:
    """Return the adapter's tensors and nothing else.

    peft's "auto" would ask the hub whether the base's vocabulary was resized (ours never is), and add the embeddings
    where the head is adapted.
    """
    weights: Pair = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


def start_pissa(model: PeftModel) -> Pair:
    """Move the main directions of every adapted linear weight from the base into the adapter.

    Returns:
        The adapter as it now is, fp32 on the host: what `pissa.difference` and `take_out` need later.
    """
    for _, layer in _linear_layers(model):
        weight = _as_linear(layer, _weight(layer).float())
        _set_pair(layer, weight)
    start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapter_weights(model).items()}
    take_out(model, start)
    return start


def take_out(model: PeftModel, start: Pair) -> None:
    """Subtract the start from an ordinary base: the same arithmetic at the first start and at every resume."""
    for name, layer in _linear_layers(model):
        weight = _weight(layer)
        first, second = (start[f"{name}.lora_{part}.weight"].to(weight.device) for part in "AB")
        moved = _as_linear(layer, (second @ first) * layer.scaling[_ADAPTER])
        weight.data.copy_((weight.float() - moved).to(weight.dtype))


def doubled_config(config: LoraConfig) -> dict[str, Any]:
    """Return the values of a PEFT config that describe `pissa.difference`: twice the rank at the same scaling."""
    factor = 2**0.5 if config.use_rslora else 2
    alphas = {name: alpha * factor for name, alpha in config.alpha_pattern.items()}
    ranks = {name: rank * 2 for name, rank in config.rank_pattern.items()}
    return {"r": config.r * 2, "lora_alpha": config.lora_alpha * factor, "rank_pattern": ranks, "alpha_pattern": alphas}


def start_loftq(model: PeftModel, folder: Path) -> int:
    """Let every adapted 4-bit layer begin with what quantisation took from it.

    Args:
        model: Adapters on a freshly quantised base.
        folder: The base's 16-bit safetensors.

    Returns:
        How many layers were started so; layers that are not in 4 bits have lost nothing and are left as they are.

    Raises:
        JobFailed: The folder does not hold the layer's 16-bit weight.
    """
    causal: Any = model.get_base_model()
    names = {id(module): name for name, module in causal.named_modules()}
    tensors = FolderTensors(folder, prefix=str(getattr(causal, "base_model_prefix", "")))
    count = 0
    for _, layer in _linear_layers(model):
        weight = _weight(layer)
        if not isinstance(weight, Params4bit):
            continue
        held = dequantize_4bit(weight.data, weight.quant_state).float()
        exact = tensors.read(f"{names[id(layer)]}.weight", tuple(held.shape)).to(held.device, torch.float32)
        _set_pair(layer, exact - held)
        count += 1
    return count


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A `[rank, in]` and B `[out, rank]` whose product is the best picture of a matrix `[out, in]`."""
    if min(matrix.shape) <= _EXACT_UP_TO:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.T
    else:
        # Twice the directions are followed and half of them dropped: the wanted ones then converge.
        left, values, right = torch.svd_lowrank(matrix, q=min(2 * rank + 8, *matrix.shape), niter=_POWER_STEPS)
    root = values[:rank].sqrt()
    first, second = (right[:, :rank] * root).T, left[:, :rank] * root
    missing = rank - first.shape[0]
    return nn.functional.pad(first, (0, 0, 0, missing)), nn.functional.pad(second, (0, missing))


def _set_pair(layer: LoraLayer, matrix: Tensor) -> None:
    """Let the adapter's contribution `scaling * B @ A` be the best picture of a matrix `[out, in]`."""
    first, second = low_rank(matrix / layer.scaling[_ADAPTER], layer.r[_ADAPTER])
    for module, value in ((layer.lora_A[_ADAPTER], first), (layer.lora_B[_ADAPTER], second)):
        module.weight.data.copy_(value)


def _linear_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield adapted linear layers by their names in a PEFT file; weights shared with the embeddings are left out."""
    embedding = cast(Any, model.get_base_model()).get_input_embeddings()
    shared = getattr(getattr(embedding, "base_layer", embedding), "weight", None)
    for name, module in model.named_modules():
        is_linear = isinstance(module, LoraLayer) and _ADAPTER in module.lora_A
        if is_linear and _weight(module) is not shared and _weight(module).dim() == 2:
            yield name, module


def _weight(layer: LoraLayer) -> Any:
    return layer.get_base_layer().weight


def _as_linear(layer: LoraLayer, weight: Tensor) -> Tensor:
    """Turn a weight between `[in, out]` (GPT-2's Conv1D) and `[out, in]`; it is its own inverse."""
    return weight.T if layer.fan_in_fan_out else weight
