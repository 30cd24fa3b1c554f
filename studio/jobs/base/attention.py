"""Chooses the attention implementation that a model is loaded with: the wanted one where model and device allow it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.integrations import sdpa_attention
from transformers.utils.import_utils import is_flash_attn_2_available

from studio.core.errors import BadInput
from studio.core.recipe import Attention
from studio.jobs.base import sinks
from studio.jobs.base.device import FLASH_CAPABILITY
from studio.jobs.base.model_class import ModelClass
from studio.runs.failure import leaves_no_other_way

_TRIED, _NEAR = 70, 0.05
"""Tokens that attention with sinks is tried on, and how far it may be off, as a share of a tensor's largest number. A
mistake in a kernel's use is as large as the numbers; rounding was below .008, in bf16 on a CPU."""


def attention_for(picked: ModelClass, wanted: Attention, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention to load a model with, by its name in transformers.

    torch's fused attention cannot compute the scores of some models (Gemma 2 caps them). transformers refuses to load
    those with `sdpa`, so they get `eager`. Sinks (gpt-oss) are put into it by `studio.jobs.base.sinks`, where that
    gives the right numbers on the device.

    Args:
        picked: The model's class.
        wanted: What the recipe says.
        device: Where the model will run.
        dtype: Format of its matrix products.

    Raises:
        BadInput: flash_attention_2 cannot be used, with the reason.
    """
    if wanted == "flash_attention_2":
        _require_flash(device, dtype)
    if wanted == "eager":
        return wanted
    if wanted == "sdpa":
        found = attention_of(picked, device)
        return found if found != sinks.SINK_ATTENTION or sinks_are_right(device, dtype) else "eager"
    if sinks.serves(picked.config.get_text_config(), device):
        raise BadInput(
            "train.attention is flash_attention_2: the package flash-attn knows no attention sinks, which this model "
            "has. With sdpa they are put into torch's own kernels."
        )
    return wanted


def attention_of(picked: ModelClass, device: torch.device) -> str:
    """Return what computes a model's attention by torch's kernels; `eager` where none does."""
    if sinks.serves(picked.config.get_text_config(), device):
        return sinks.SINK_ATTENTION
    return "sdpa" if getattr(picked.attending or picked.kind, "_supports_sdpa", True) else "eager"


def sinks_are_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether attention with sinks gives a few random numbers the output and the gradients that it should.

    It hands kernels of a device numbers that they made otherwise, so it is tried on the device before it is used.

    Args:
        device: Where the model will run.
        dtype: Of queries, keys and values.

    Raises:
        RuntimeError: The memory is full or the card has failed.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, _TRIED, 64), (2, 2, _TRIED, 64), (2, 2, _TRIED, 64), (4,))
    tried = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    exact = [tensor.detach().float().requires_grad_() for tensor in tried]
    nobody: Any = None
    try:
        for window in (_TRIED, _TRIED // 3):
            query, key, value, own = tried
            found = sinks.sink_attention(nobody, query, key, value, None, s_aux=own, sliding_window=window)[0]
            wanted = _by_definition(exact, window)
            made = (found, *torch.autograd.grad(found.float().square().sum(), tried))
            right = (wanted, *torch.autograd.grad(wanted.square().sum(), exact))
            pairs = zip(made, right, strict=True)
            if not all(bool((one.float() - other).abs().max() <= _NEAR * other.abs().max()) for one, other in pairs):
                return False
    except (RuntimeError, TypeError, AttributeError) as error:
        if leaves_no_other_way(error):
            raise
        return False  # this torch has no such operator, or another one
    return True


def _by_definition(given: Sequence[Tensor], window: int) -> Tensor:
    """Return attention `[batch, seq, heads, head_dim]` by a softmax with a column for the sink."""
    query, key, value, own = given
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    seen = sinks.window_mask(query.shape[2], key.shape[2], window, query.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    column = own.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return (torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)


def only_for_text(config: PretrainedConfig, attention: str) -> Any:
    """Return the value of transformers' `attn_implementation` that sets the language model's attention.

    The towers beside it keep what they choose for themselves: not each of them can compute every attention.
    """
    text = config.get_text_config()
    if text is config:
        return attention
    return {name: attention for name in config.sub_configs if getattr(config, name, None) is text}


def _require_flash(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda":
        why = f"it runs on CUDA cards only, and this run is on {device.type}"
    elif torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        why = f"it needs compute capability 8.0, and this card has {major}.{minor}"
    elif dtype == torch.float32:
        why = "it computes in 16 bits, and model.dtype is fp32"
    elif not is_flash_attn_2_available():
        why = "the package flash-attn is not installed (pip install flash-attn)"
    else:
        return
    raise BadInput(f"train.attention is flash_attention_2: {why}. With sdpa torch brings a flash kernel of its own.")


def has_grouped_kernel(key: Tensor) -> bool:
    """Return whether torch has a fused kernel in which several query heads share one key-value head.

    On a card only the flash kernel does that, in 16 bits and from compute capability 8.0 on. The memory-efficient
    kernel takes no grouped heads (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp), and the plain one makes
    matrices of seq x seq.

    Args:
        key: `[batch, key-value heads, seq, head_dim]`.
    """
    if key.device.type != "cuda":
        return True
    half = key.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
    return half and torch.cuda.get_device_capability(key.device) >= FLASH_CAPABILITY


_asks_for_groups = getattr(sdpa_attention, "use_gqa_in_sdpa", None)
"""transformers' own choice between grouped heads and repeated keys; None in versions that do not have it."""


def _use_groups(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
    """Return whether transformers may leave heads grouped; it repeats keys and values otherwise.

    Where only the plain kernel takes grouped heads, repeating needs less memory than its seq x seq matrices.
    """
    return bool(_asks_for_groups and _asks_for_groups(attention_mask, key, value)) and has_grouped_kernel(key)


if _asks_for_groups:
    sdpa_attention.use_gqa_in_sdpa = _use_groups
