"""Attention over packed rows: torch's own attention, once per row, so that no row can see another.

Registered in transformers under a name of its own. A block-diagonal mask would do the same, but costs tokens x tokens
of memory and time and loses the flash kernels; row by row both stay those of the rows. Batches that are not packed
go to transformers' own function with transformers' own mask.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROW_ATTENTION = "studio_rows"
"""Its name among transformers' attention implementations."""


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output `[batch, seq, heads, head_dim]`, and None for its weights.

    Args:
        module: The attention layer.
        query: `[batch, heads, seq, head_dim]`.
        key: `[batch, key-value heads, seq, head_dim]`.
        value: Like `key`.
        attention_mask: transformers' mask of a padded batch.
        row_lengths: Tokens of each packed row, in order; None where the batch is not packed.
        sliding_window: How far back a token sees, itself included; None for all of its row.
        **options: What transformers' own function takes: scaling, dropout.
    """
    if row_lengths is None:
        return _attend(module, query, key, value, attention_mask, sliding_window, options)
    rows = zip(*(torch.split(tensor, list(row_lengths), dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_attend(module, q, k, v, None, sliding_window, options)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def _attend(  # noqa: PLR0917  the order of transformers' function
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None, options: Any
) -> tuple[Tensor, None]:
    if mask is None and window is not None and key.shape[2] > window:
        mask = _window_mask(query.shape[2], key.shape[2], window, query.device)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output


def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return who sees whom, `[1, 1, queries, keys]`: the last `window` tokens up to oneself."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    return ((behind >= 0) & (behind < window))[None, None]


def _mask(*, attention_mask: Tensor | None = None, **named: Any) -> Tensor | None:
    """Make transformers' mask where there is padding; otherwise `row_attention` knows all by itself."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **named)


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, _mask)
