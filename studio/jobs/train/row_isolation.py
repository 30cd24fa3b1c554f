"""What keeps packed rows apart: attention that knows where rows end, and a call per row of layers with a state.

Two attention functions are registered in transformers under names of their own. `ROW_ATTENTION` calls torch's fused
attention once per row and runs everywhere; `VARLEN_ATTENTION` calls torch's flash kernel once for all rows, where the
card has one. Neither allocates anything of size tokens x tokens, as a block-diagonal mask would, which also rules out
the flash kernels. Batches that are not packed go to transformers' own function with transformers' own mask.

Layers that carry a state from token to token (Mamba, Gated DeltaNet, short convolutions) are called once for each row.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from studio.core.tiles import groups_heads, head_groups
from studio.jobs.base import sinks
from studio.jobs.base.device import FLASH_CAPABILITY
from studio.jobs.base.head_groups import attention_by_groups, by_groups
from studio.jobs.base.sinks import (
    SINK_ATTENTION,
    KernelCall,
    packed_sink_attention,
    sink_attention,
    sink_mask,
    window_mask,
)

ROW_ATTENTION, VARLEN_ATTENTION = "studio_rows", "studio_varlen"
"""Their names among transformers' attention implementations."""

_OF_THE_PACK = ("cu_seq_lens", "max_length", "position_")
"""Beginnings of the names of arguments that describe a whole packed sequence."""

_WHOLE = "of_whole_batches"


def attends(causal: nn.Module) -> bool:
    """Return whether a model has attention at all; Mamba, for one, has none."""
    config: Any = causal.config
    return bool(getattr(config.get_text_config(), "num_attention_heads", 0))


def stateful_layers(causal: nn.Module) -> list[nn.Module]:
    """Return the parts of a model's layers that carry something from token to token other than by attention.

    Each of them begins with a short convolution: Mamba, Gated DeltaNet, and LFM2's, which is nothing else.
    """
    return [
        module
        for module in causal.modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children()) and not isinstance(module, BaseTunerLayer)
    ]


def call_by_row(causal: nn.Module) -> None:
    """Have a model's stateful layers called once for each packed row; batches that are not packed go as before."""
    for layer in stateful_layers(causal):
        if not hasattr(layer.forward, _WHOLE):
            by_row = _by_row(layer.forward)
            setattr(by_row, _WHOLE, layer.forward)
            layer.forward = by_row


def call_whole(causal: nn.Module) -> None:
    """Undo `call_by_row`."""
    for layer in stateful_layers(causal):
        layer.forward = getattr(layer.forward, _WHOLE, layer.forward)


def _by_row(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the forward of a layer that is called once for each packed row, whose state so begins anew.

    Its kernels might keep packed rows apart themselves, but not every version of each of them does.
    """

    def run(hidden_states: Tensor, *, row_lengths: Tensor | None = None, **named: Any) -> Tensor:
        if row_lengths is None:
            return forward(hidden_states, **named)
        of_row = {name: value for name, value in named.items() if not name.startswith(_OF_THE_PACK)}
        rows = torch.split(hidden_states, row_lengths.tolist(), dim=1)
        return torch.cat([forward(row, **of_row) for row in rows], dim=1)

    # Not compiled: as for the attention functions below.
    return cast(Callable[..., Tensor], torch.compiler.disable(run))  # type: ignore[no-untyped-call]


def packed_attentions(implementation: str, device: torch.device) -> tuple[str, ...]:
    """Return the attention implementations that may keep packed rows apart on a device, fastest first.

    Args:
        implementation: The one that the model was loaded with. flash-attn takes packed rows itself; `eager` and others
            have no counterpart here.
        device: Where the model runs.
    """
    if implementation == "flash_attention_2":
        return (implementation,)
    if implementation not in ("sdpa", SINK_ATTENTION):
        return ()
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
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
        attention_mask: transformers' mask of a padded batch; None where there is nothing to mask but the future.
        row_lengths: Tokens of each packed row, in order, on the host; None where the batch is not packed.
        sliding_window: How many tokens back a token sees, itself included; None for all of its row.
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
    """Return what `row_attention` returns, but compute all packed rows with one kernel.

    The kernel has no dropout of attention scores, so with dropout `row_attention` is called.

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
    kind = query.device.type
    # Autocast does not know this function, so its inputs are cast here; the flash kernel takes 16 bits only.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    grouped, tokens = query.shape[1] != key.shape[1], query.shape[2]
    # The kernel's layout: [tokens, heads, head_dim] without a batch; `starts` are the rows' first places and the end.
    query, key, value = (x.to(dtype).transpose(1, 2).reshape(tokens, -1, x.shape[-1]) for x in (query, key, value))
    starts, longest, scale = options["cu_seq_lens_q"], options["max_length_q"], options.get("scaling")
    if (own := options.get("s_aux")) is not None:
        named = {"starts": starts, "longest": longest, "scale": scale, "window": sliding_window}
        return packed_sink_attention(query, key, value, own, **named)[None], None
    if groups_heads(tokens) and sliding_window is None and torch.is_grad_enabled():
        call = KernelCall("flash", scale or query.shape[-1] ** -0.5, causal=True, longest=longest)
        return by_groups((query, key, value), call, head_groups(key.shape[1]), starts)[None], None
    import torch.nn.attention.varlen as torch_varlen  # noqa: PLC0415  seconds, and only a card has it

    varlen_attn: Any = torch_varlen.varlen_attn
    output: Tensor = varlen_attn(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        # (left, right) of the token itself: -1 is without limit, and a right of 0 makes it causal.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=grouped,
    )
    return output[None], None


def _attend(  # noqa: PLR0917  the order of transformers' function
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None, options: Any
) -> tuple[Tensor, None]:
    if options.get("s_aux") is not None:
        return sink_attention(module, query, key, value, mask, sliding_window=window, **options)
    if mask is None and window is not None and key.shape[2] > window:
        mask = window_mask(query.shape[2], key.shape[2], window, query.device)
    return attention_by_groups(module, query, key, value, mask, **options)


def _mask(*, attention_mask: Tensor | None = None, **named: Any) -> Tensor | None:
    """Return transformers' mask for a padded batch, and None for a packed one, whose rows the functions here know."""
    if attention_mask is None:
        return None
    made = sink_mask if named["config"].model_type in sinks.FAMILIES else sdpa_mask
    return made(attention_mask=attention_mask, **named)


for _name, _function in ((ROW_ATTENTION, row_attention), (VARLEN_ATTENTION, varlen_attention)):
    # Never compiled, even inside a compiled layer: the number of rows and their lengths are new in every batch.
    AttentionInterface.register(_name, torch.compiler.disable(_function))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(_name, _mask)
