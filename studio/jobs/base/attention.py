"""Chooses the attention implementation that a model is loaded with: the wanted one where model and device allow it."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.integrations import sdpa_attention
from transformers.utils.import_utils import is_flash_attn_2_available

from studio.core.errors import BadInput
from studio.core.recipe import Attention
from studio.jobs.base import sinks
from studio.jobs.base.model_class import ModelClass

_FLASH_CAPABILITY = (8, 0)
"""Compute capability that flash-attn 2 needs (its README: Ampere, Ada or Hopper)."""


def attention_for(picked: ModelClass, wanted: Attention, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention to load a model with, by its name in transformers.

    torch's fused attention cannot compute the scores of some models (Gemma 2 caps them). transformers refuses to load
    those with `sdpa`, so they get `eager`. Sinks (gpt-oss) are put into it by `studio.jobs.base.sinks`.

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
        return attention_of(picked, device)
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
    elif torch.cuda.get_device_capability(device) < _FLASH_CAPABILITY:
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
    return half and torch.cuda.get_device_capability(key.device) >= _FLASH_CAPABILITY


_asks_for_groups = getattr(sdpa_attention, "use_gqa_in_sdpa", None)
"""transformers' own choice between grouped heads and repeated keys; None in versions that do not have it."""


def _use_groups(attention_mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
    """Return whether transformers may leave heads grouped; it repeats keys and values otherwise.

    Where only the plain kernel takes grouped heads, repeating needs less memory than its seq x seq matrices.
    """
    return bool(_asks_for_groups and _asks_for_groups(attention_mask, key, value)) and has_grouped_kernel(key)


if _asks_for_groups:
    sdpa_attention.use_gqa_in_sdpa = _use_groups
