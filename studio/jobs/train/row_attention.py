"""Attention over packed rows: no row can see another, and nothing of the size tokens x tokens is made.

Registered in transformers under names of its own. `ROW_ATTENTION` calls torch's fused attention once per row and runs
everywhere; `VARLEN_ATTENTION` calls torch's flash kernel once for all rows, where the card has one. A block-diagonal
mask would do the same, but costs tokens x tokens of memory and time and loses the flash kernels. Batches that are not
packed go to transformers' own function with transformers' own mask.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROW_ATTENTION, VARLEN_ATTENTION = "studio_rows", "studio_varlen"
"""Their names among transformers' attention implementations."""

_VARLEN_CAPABILITY = (8, 0)
"""Compute capability of torch's flash kernel (aten/src/ATen/native/transformers/cuda/flash_attn)."""


def packed_attentions(implementation: str, device: torch.device) -> tuple[str, ...]:
    """Return which implementations may keep packed rows apart on a device, the fastest first.

    Args:
        implementation: What the model was loaded with; flash-attn itself takes packed rows.
        device: Where it runs.
    """
    if implementation == "flash_attention_2":
        return (implementation,)
    if implementation != "sdpa":
        return ()
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _VARLEN_CAPABILITY
    return (VARLEN_ATTENTION, ROW_ATTENTION) if able else (ROW_ATTENTION,)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Tensor | None = None,
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
        row_lengths: Tokens of each packed row, in order, on the host; None where the batch is not packed.
        sliding_window: How far back a token sees, itself included; None for all of its row.
        **options: What transformers' own function takes: scaling, dropout.
    """
    if row_lengths is None:
        return _attend(module, query, key, value, attention_mask, sliding_window, options)
    lengths = row_lengths.tolist()
    rows = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_attend(module, q, k, v, None, sliding_window, options)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what `row_attention` returns; of packed rows by one kernel. Dropout of scores is left to `row_attention`.

    Args:
        module: The attention layer.
        query: `[batch, heads, seq, head_dim]`, batch 1 where rows are packed.
        key: `[batch, key-value heads, seq, head_dim]`.
        value: Like `key`.
        attention_mask: transformers' mask of a padded batch.
        row_lengths: As for `row_attention`.
        sliding_window: As for `row_attention`.
        **options: Those of `row_attention`, and `cu_seq_lens_q` and `max_length_q` of packed rows.
    """
    if row_lengths is None or options.get("dropout"):
        named: dict[str, Any] = {"row_lengths": row_lengths, "sliding_window": sliding_window}
        return row_attention(module, query, key, value, attention_mask, **named, **options)
    import torch.nn.attention.varlen as torch_varlen  # noqa: PLC0415  only where a card has it

    varlen_attn: Any = torch_varlen.varlen_attn
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    heads, tokens = query.shape[1], query.shape[2]
    rows = (tensor.to(dtype).transpose(1, 2).reshape(tokens, -1, tensor.shape[-1]) for tensor in (query, key, value))
    starts, longest = options["cu_seq_lens_q"], options["max_length_q"]
    output: Tensor = varlen_attn(
        *rows,
        starts,
        starts,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=heads != key.shape[1],
    )
    return output[None], None


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
    """Make transformers' mask where there is padding; otherwise the functions here know all by themselves."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **named)


for _name, _function in ((ROW_ATTENTION, row_attention), (VARLEN_ATTENTION, varlen_attention)):
    # A compiled layer calls them as they are: the number of rows and their lengths are new in every batch.
    AttentionInterface.register(_name, torch.compiler.disable(_function))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(_name, _mask)
